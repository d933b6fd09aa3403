"""The vectorized DAMSM losses against a plain transcription of the paper's formulas."""

import math

import pytest
import torch

from icsd.models.damsm import DAMSMConfig, damsm_losses, word_matches
from icsd.models.image_encoder import ImageFeatures
from icsd.models.text import TextFeatures

LENGTHS = [1, 5, 3, 4]


@pytest.fixture
def features():
    torch.manual_seed(0)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    images = ImageFeatures(torch.randn(4, 6, 9).double(), torch.randn(4, 6).double())
    text = TextFeatures(torch.randn(4, 6, 5).double(), torch.randn(4, 6).double(), mask)
    return images, text


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def relevance_of(regions, words, config):
    """R(Q, D) of one sentence, a list of vectors, and one image, a list of vectors: equations (7) to (10)."""
    s = [[(e @ v).item() for v in regions] for e in words]
    normalized = [
        [math.exp(s[i][j]) / sum(math.exp(s[k][j]) for k in range(len(words))) for j in range(len(regions))]
        for i in range(len(words))
    ]
    total = 0.0
    for e, row in zip(words, normalized, strict=True):
        weights = [math.exp(config.attention_sharpness * x) for x in row]
        context = sum(weight / sum(weights) * v for weight, v in zip(weights, regions, strict=True))
        total += math.exp(config.word_sharpness * cosine(context, e))
    power = 1 / config.word_sharpness if config.mode == "paper" else 1
    return math.log(total**power)


def losses_of(scores, config, wrong):
    """L1 + L2 of equations (11) and (12) over a batch of scores R(Q_i, D_j), of which only `wrong(i, j)` compete."""
    size, loss = len(scores), 0.0
    for i in range(size):
        for pairs in ([(i, j) for j in range(size)], [(j, i) for j in range(size)]):
            competing = [pair for pair in pairs if pair == (i, i) or wrong(*pair)]
            exponentials = {pair: math.exp(config.match_sharpness * scores[pair[0]][pair[1]]) for pair in competing}
            loss -= math.log(exponentials[i, i] / sum(exponentials.values()))
    return loss / size


@pytest.mark.parametrize("config", [DAMSMConfig(), DAMSMConfig(2.0, 3.0, 7.0), DAMSMConfig(mode="code")], ids=str)
@pytest.mark.parametrize("classes", [None, [0, 1, 0, 2]], ids=str)
def test_losses_are_those_of_the_paper(features, config, classes):
    images, text = features
    words = [text.words[c, :, :length].T for c, length in enumerate(LENGTHS)]
    by_word = [[relevance_of(images.regions[i].T, words[c], config) for c in range(4)] for i in range(4)]
    whole = [[cosine(images.whole[i], text.sentence[c]) for c in range(4)] for i in range(4)]

    def wrong(i, j):
        return classes is None or classes[i] != classes[j]

    torch.testing.assert_close(word_matches(images, text, config), torch.tensor(by_word).double())
    ours = damsm_losses(images, text, config, None if classes is None else torch.tensor(classes))
    assert ours.words.item() == pytest.approx(losses_of(by_word, config, wrong))
    assert ours.sentence.item() == pytest.approx(losses_of(whole, config, wrong))


def test_padding_changes_nothing(features):
    images, text = features
    longer = TextFeatures(
        torch.cat([text.words, torch.full((4, 6, 3), 7.0)], 2),
        text.sentence,
        torch.cat([text.mask, torch.zeros(4, 3, dtype=torch.bool)], 1),
    )
    for a, b in zip(
        damsm_losses(images, text, DAMSMConfig()), damsm_losses(images, longer, DAMSMConfig()), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_autocast_does_not_lower_the_precision(features):
    images, text = features
    images = ImageFeatures(*(each.float() for each in images))
    text = TextFeatures(text.words.float(), text.sentence.float(), text.mask)
    expected = damsm_losses(images, text, DAMSMConfig())
    with torch.autocast("cpu", torch.bfloat16):
        losses = damsm_losses(images, text, DAMSMConfig())
    torch.testing.assert_close(losses, expected)


def test_same_class_counts_where_asked(features):
    images, text = features
    classes = torch.zeros(4, dtype=torch.int64)
    assert sum(damsm_losses(images, text, DAMSMConfig(), classes)) == 0
    config = DAMSMConfig(same_class_is_wrong=True)
    assert damsm_losses(images, text, config, classes) == damsm_losses(images, text, config)


def test_images_that_share_a_caption_are_left_out_whatever_their_class(features):
    images, text = features
    by_caption, by_class = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 1, 1, 2])
    config = DAMSMConfig(same_class_is_wrong=True)
    assert damsm_losses(images, text, config, by_class, by_caption) == damsm_losses(
        images, text, DAMSMConfig(), by_caption
    )
    both = torch.tensor(
        [[i != j and (i, j) not in {(0, 2), (2, 0), (1, 2), (2, 1)} for j in range(4)] for i in range(4)]
    )
    cosines = [[cosine(images.whole[i], text.sentence[c]) for c in range(4)] for i in range(4)]
    ours = damsm_losses(images, text, DAMSMConfig(), by_class, by_caption)
    assert ours.sentence.item() == pytest.approx(losses_of(cosines, DAMSMConfig(), lambda i, j: both[i, j]))


def test_gradients(features):
    images, text = features

    def losses(regions, whole, words, sentence):
        return damsm_losses(ImageFeatures(regions, whole), TextFeatures(words, sentence, text.mask), DAMSMConfig())

    inputs = [each.clone().requires_grad_() for each in (*images, text.words, text.sentence)]
    assert torch.autograd.gradcheck(losses, inputs)

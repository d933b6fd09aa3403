"""AttnGAN's released encoders, with made-up weights in the names and layout of the release."""

import os
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from icsd.data import Vocabulary
from icsd.errors import InputError
from icsd.models.attngan import Release, find_release, load_release
from icsd.models.inception import InceptionV3

WORDS = ["a", "beak", "bird", "blue", "red", "short", "small", "with"]
CAPTIONS = ["a small red bird with a short blue beak", "blue beak", "a bird with a red beak"]


def text_state(width=6):
    """Return an embedding and an LSTM with AttnGAN's names of their weights, and their state."""
    network = nn.ModuleDict(
        {"encoder": nn.Embedding(len(WORDS) + 1, 5), "rnn": nn.LSTM(5, width, 1, batch_first=True, bidirectional=True)}
    )
    return network, dict(network.state_dict())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as DAMSMencoders/bird, in the format of PyTorch 0.3: without counts of batches, and not zipped."""
    folder = tmp_path_factory.mktemp("DAMSMencoders") / "bird"
    folder.mkdir()
    torch.manual_seed(3)
    text, state = text_state()
    torch.save(state, folder / "text_encoder200.pth", _use_new_zipfile_serialization=False)
    image = InceptionV3().eval()
    heads = {"emb_features.weight": torch.randn(12, 768, 1, 1) / 28, "emb_cnn_code.weight": torch.randn(12, 2048) / 45}
    heads["emb_cnn_code.bias"] = torch.randn(12)
    weights = {name: value for name, value in image.state_dict().items() if not name.endswith("num_batches_tracked")}
    torch.save(weights | heads, folder / "image_encoder200.pth", _use_new_zipfile_serialization=False)
    write_words(folder / "captions.pickle", WORDS)
    return folder, text.eval(), image, heads


def write_words(path, words):
    by_index = dict(enumerate(["<end>", *words]))
    path.write_bytes(pickle.dumps([[[1]], [[1]], by_index, {word: index for index, word in by_index.items()}], 2))


@pytest.fixture(scope="module")
def loaded(published):
    return load_release(find_release(published[0]), None)


@torch.no_grad()
def test_text_features_are_those_of_the_published_encoder(published, loaded):
    _, network, _, _ = published
    damsm, config = loaded
    assert (config.dim, config.embedding_dim, config.max_words) == (12, 5, 18)
    features = damsm.eval().text_encoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        ids = torch.tensor([[WORDS.index(word) + 1 for word in caption.split()]])
        packed = pack_padded_sequence(network["encoder"](ids), [ids.shape[1]], batch_first=True)
        states, (last, _) = network["rnn"](packed)
        words, _ = pad_packed_sequence(states, batch_first=True)
        torch.testing.assert_close(features.words[row, :, : ids.shape[1]], words[0].T)
        torch.testing.assert_close(features.sentence[row], last.transpose(0, 1).reshape(12))
        assert features.mask[row].sum() == ids.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("resolution", [64, 299])
def test_image_features_are_those_of_the_published_encoder(published, loaded, resolution):
    _, _, network, heads = published
    images = torch.rand(2, 3, resolution, resolution) * 2 - 1
    regions, whole = network(F.interpolate(images, size=(299, 299), mode="bilinear"))
    features = loaded[0].eval().image_encoder(images)
    expected = torch.einsum("ec,bcij->beij", heads["emb_features.weight"][:, :, 0, 0], regions).flatten(2)
    torch.testing.assert_close(features.regions, expected, rtol=1e-4, atol=1e-5)
    expected = whole @ heads["emb_cnn_code.weight"].T + heads["emb_cnn_code.bias"]
    torch.testing.assert_close(features.whole, expected, rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_published_code(loaded):
    assert loaded[0].config.mode == "code"
    sharpness = loaded[0].config
    assert (sharpness.attention_sharpness, sharpness.word_sharpness, sharpness.match_sharpness) == (4, 5, 10)


def test_a_folder_or_its_text_encoder_is_found(published, tmp_path):
    folder = published[0]
    expected = Release(*(folder / name for name in ("text_encoder200.pth", "image_encoder200.pth", "captions.pickle")))
    assert find_release(folder) == find_release(folder / "text_encoder200.pth") == expected
    assert find_release(tmp_path) is None
    assert find_release(tmp_path / "step-00000100.safetensors") is None
    with pytest.raises(InputError, match=r"image_encoder200\.pth has the suffix .* give their text encoder"):
        find_release(folder / "image_encoder200.pth")
    torch.save({}, tmp_path / "text_encoder100.pth")
    with pytest.raises(InputError, match=r"no encoder at .*image_encoder100\.pth: both encoders"):
        find_release(tmp_path)
    torch.save({}, tmp_path / "text_encoder200.pth")
    with pytest.raises(InputError, match=r"holds text_encoder100\.pth, text_encoder200\.pth: give one"):
        find_release(tmp_path)


def test_the_words_come_from_the_data_set_where_no_pickle_is_beside(published, tmp_path):
    release = find_release(published[0])._replace(captions=tmp_path / "captions.pickle")
    damsm, _ = load_release(release, Vocabulary(WORDS))
    assert damsm.text_encoder.tokenizer.vocabulary.words == WORDS
    with pytest.raises(InputError, match=r"words of .*text_encoder200\.pth are missing: put the captions\.pickle"):
        load_release(release, None)
    with pytest.raises(InputError, match="knows 8 words, but the vocabulary has 3"):
        load_release(release, Vocabulary(WORDS[:3]))
    write_words(release.captions, WORDS[:5])
    with pytest.raises(InputError, match="knows 8 words, but the vocabulary has 5"):
        load_release(release, Vocabulary(WORDS))


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, "encoder.weight": Harm()}, "cannot be read as weights of AttnGAN"),
        (lambda state: [*state.values()], "it is not a dict of tensors"),
        (lambda state: {"encoder.weight": state["encoder.weight"]}, "is not AttnGAN's text encoder"),
        (lambda state: {**state, "rnn.weight_hh_l0": torch.zeros(24)}, "is not AttnGAN's text encoder"),
        (
            lambda state: {**state, "rnn.bias_hh_l0": torch.zeros(7)},
            r"is not AttnGAN's text encoder .*lstm\.bias_hh_l0",
        ),
        (lambda state: {**state, "rnn.bias_hh_l0": torch.zeros(24).int()}, r"lstm\.bias_hh_l0 is torch\.int32"),
        (lambda state: {**state, "rnn.bias_ih_l0": torch.full((24,), torch.nan)}, r"rnn\.bias_ih_l0 is not finite"),
        (lambda state: {**state, "rnn.weight_ih_l1": torch.zeros(24, 12)}, "is not AttnGAN's text encoder"),
    ],
)
def test_other_files_are_refused_in_one_line(published, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    torch.save(change(text_state()[1]), tmp_path / "text_encoder7.pth")
    release = Release(tmp_path / "text_encoder7.pth", published[0] / "image_encoder200.pth", tmp_path / "none")
    with pytest.raises(InputError, match=message) as raised:
        load_release(release, Vocabulary(WORDS))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "harm").exists()


def test_an_image_encoder_of_another_width_is_refused(published, tmp_path):
    torch.save(text_state(width=4)[1], tmp_path / "text_encoder7.pth")
    release = find_release(published[0])._replace(text=tmp_path / "text_encoder7.pth")
    with pytest.raises(InputError, match=r"image_encoder200\.pth is not AttnGAN's image encoder .*regions\.weight"):
        load_release(release, Vocabulary(WORDS))

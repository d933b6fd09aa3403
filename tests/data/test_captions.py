import json

import pytest
import torch

from icsd.data import Vocabulary, tokenize
from icsd.data.captions import with_article
from icsd.errors import InputError

CAPTIONS = ["A bird, with RED wings!", "a red-bellied bird", "der Vogel hat rote Flügel"]


@pytest.fixture
def vocabulary():
    return Vocabulary.build(CAPTIONS)


def test_tokenize_takes_words_in_lower_case():
    assert tokenize("A medium-light, 2nd Bird_x!") == ["a", "medium", "light", "2nd", "bird_x"]
    assert tokenize(" ...!? ") == []


def test_tokenize_composes_accents():
    assert tokenize("Flu\u0308gel") == tokenize("Flügel") == ["flügel"]


def test_with_article():
    assert with_article("a orange bird on a apple, a bird") == "an orange bird on an apple, a bird"


def test_vocabulary_is_independent_of_order(vocabulary):
    assert vocabulary.words == Vocabulary.build(reversed(CAPTIONS)).words == sorted(set(vocabulary.words))
    assert len(vocabulary) == len(vocabulary.words) + 1


def test_vocabulary_round_trip_through_json(vocabulary):
    restored = Vocabulary(json.loads(json.dumps(vocabulary.words)))
    tokens, lengths = vocabulary.encode(CAPTIONS)
    assert torch.equal(restored.encode(CAPTIONS)[0], tokens)
    assert torch.equal(restored.encode(CAPTIONS)[1], lengths)


@pytest.mark.parametrize("words", [["a", "a"], ["a", 3], [["a"]]])
def test_foreign_vocabulary_is_refused(words):
    with pytest.raises(InputError, match="distinct words"):
        Vocabulary(words)


def test_encode_pads_with_zero(vocabulary):
    tokens, lengths = vocabulary.encode(["a red bird", "bird"])
    assert tokens.dtype == lengths.dtype == torch.int64
    assert lengths.tolist() == [3, 1]
    assert [[vocabulary.words[i - 1] for i in row if i] for row in tokens.tolist()] == [["a", "red", "bird"], ["bird"]]
    assert tokens[1, 1:].tolist() == [0, 0]


def test_unknown_words_are_named_and_skipped(vocabulary):
    assert vocabulary.unknown("a plaid bird on a plaid kite") == ["plaid", "on", "kite"]
    assert vocabulary.unknown("a bird") == []
    tokens, lengths = vocabulary.encode(["a plaid bird"])
    assert torch.equal(tokens, vocabulary.encode(["a bird"])[0])
    assert lengths.tolist() == [2]


@pytest.mark.parametrize("caption", ["", "?!", "quantum chromodynamics"])
def test_caption_without_a_known_word_is_the_end_token(vocabulary, caption):
    tokens, lengths = vocabulary.encode([caption, "a bird"])
    assert lengths.tolist() == [1, 2]
    assert tokens[0].tolist() == [0, 0]


def test_no_captions(vocabulary):
    tokens, lengths = vocabulary.encode([])
    assert tokens.shape == (0, 0)
    assert lengths.shape == (0,)


def test_long_captions_are_cut():
    words = [f"w{i:02}" for i in range(30)]
    vocabulary = Vocabulary(words)
    caption = " ".join(words)
    tokens, lengths = vocabulary.encode([caption])
    assert tokens.tolist() == [list(range(1, 19))]
    assert lengths.tolist() == [18]
    torch.manual_seed(0)
    first, _ = vocabulary.encode([caption], max_words=10, training=True)
    second, _ = vocabulary.encode([caption], max_words=10, training=True)
    torch.manual_seed(0)
    again, _ = vocabulary.encode([caption], max_words=10, training=True)
    assert first.shape == (1, 10)
    assert (first.diff() > 0).all(), "a sorted subset, so no word twice"
    assert not torch.equal(first, second)
    assert torch.equal(first, again)

from dataclasses import replace

import pytest

from icsd.data import DataConfig, open_dataset
from icsd.data.captions import Vocabulary
from icsd.errors import InputError
from icsd.models.tokens import WordTokenizer
from icsd.training.captions import check_captions, describe_data, differences


@pytest.fixture(scope="module")
def dataset():
    return open_dataset(DataConfig(name="procedural-flowers", size=10), "train", 8)


def of(dataset, *captions):
    return replace(dataset, captions=[[caption] for caption in captions])


def check(dataset, known, train, test=("a red bird",)):
    return check_captions(WordTokenizer(Vocabulary(known.split()), 18), of(dataset, *train), of(dataset, *test))


def test_known_captions_give_no_note(dataset):
    assert check(dataset, "a bird red", ["a red bird", "red"]) == []


def test_unknown_words_are_counted_and_named_with_the_most_frequent_first(dataset):
    (note,) = check(dataset, "a bird red", ["a teal bird", "a mauve bird", "a mauve red"])
    assert note.endswith("does not know 2 words of the training captions, left out: mauve, teal")
    many = [f"a bird {word}" for word in "bcdefghijklm"]
    (note,) = check(dataset, "a bird red", many)
    assert "12 words" in note
    assert note.endswith(", ...")


def test_unknown_words_of_held_out_captions_are_told_apart(dataset):
    notes = check(dataset, "a bird red", ["a red bird"], ["a teal bird", "ein Vogel"])
    assert "3 words of the held-out captions" in notes[0]
    assert "does not know any word of 1 held-out captions, such as 'ein Vogel'" in notes[1]


@pytest.mark.parametrize("caption", ["un oiseau", "eine Amsel", "an ultraviolet hexagon"])
def test_training_captions_without_a_known_word_are_an_error(dataset, caption):
    with pytest.raises(InputError, match=rf"does not know any word of 1 of 2 captions, such as '{caption}'"):
        check(dataset, "a bird red", ["a red bird", caption])


def test_changed_data_is_noticed(dataset):
    saved = describe_data(dataset)
    assert differences(saved, describe_data(dataset)) == []
    assert differences(None, saved) == []
    more = open_dataset(DataConfig(name="procedural-flowers", size=20), "train", 8)
    assert (
        f"with {len(dataset)} images, now it is procedural-flowers with {len(more)}"
        in differences(saved, describe_data(more))[0]
    )
    other = of(dataset, *["a red bird"] * len(dataset))
    assert "and other captions" in differences(saved, describe_data(other))[0]
    classes = replace(dataset, class_ids=[0] * len(dataset))
    assert len(differences(saved, describe_data(classes))) == 1

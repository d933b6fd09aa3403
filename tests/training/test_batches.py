import random

import pytest
import torch

from icsd.data import DataConfig, open_dataset
from icsd.data.captions import Vocabulary
from icsd.models.tokens import WordTokenizer
from icsd.training.batches import Batch, SampledDataset, batch_indices, mismatched_captions

LONG = ["one two three four five six seven eight", "a b c d e f g h i j", "the quick brown fox jumps over it", "red"]


class Captions(torch.utils.data.Dataset):
    """Items without random choices of their own."""

    def __len__(self):
        return len(LONG)

    def __getitem__(self, index):
        return {"image": torch.full((3, 4, 4), float(index)), "caption": LONG[index], "class_id": index % 2}


def sampled(max_words=4, seed=3):
    return SampledDataset(Captions(), WordTokenizer(Vocabulary.build(LONG), max_words), batch_size=3, seed=seed)


def test_batches_cover_every_epoch_and_resume_anywhere():
    batches = list(batch_indices(length=10, batch_size=4, seed=1, start=0, stop=5))
    drawn = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert list(batch_indices(10, 4, seed=1, start=3, stop=5)) == batches[3:]
    assert list(batch_indices(10, 4, seed=2, start=0, stop=5)) != batches


def test_batches_may_be_larger_than_the_set():
    (batch,) = batch_indices(length=3, batch_size=7, seed=0, start=0, stop=1)
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_words_of_long_captions_depend_on_the_place_in_the_run_only(workers):
    whole = list(sampled().batches_of(0, 6, workers))
    torch.manual_seed(123)
    late = list(sampled().batches_of(4, 6, 0))
    for first, second in zip(whole[4:], late, strict=True):
        assert first.captions == second.captions
        assert torch.equal(first.ids, second.ids)
    read = {caption: set() for caption in LONG}
    for batch in whole:
        assert batch.ids.shape[1] == batch.lengths.max() <= 4
        for caption, row, length in zip(batch.captions, batch.ids.tolist(), batch.lengths.tolist(), strict=True):
            assert all(row[:length])
            assert not any(row[length:])
            read[caption].add(tuple(row))
    assert len(read["red"]) == 1
    assert all(len(read[caption]) > 1 for caption in LONG[:3])


def test_another_seed_reads_other_words():
    first, second = (list(sampled(seed=seed).batches_of(0, 8, 0)) for seed in (1, 2))
    assert any(not torch.equal(a.ids, b.ids) for a, b in zip(first, second, strict=True))


def test_a_batch_of_a_real_set_holds_what_the_networks_take():
    train_set = open_dataset(DataConfig(name="procedural-birds", size=20), "train", 8)
    captions = [caption for captions in train_set.captions for caption in captions]
    (batch,) = SampledDataset(train_set, WordTokenizer(Vocabulary.build(captions), 18), 6, 0).batches_of(0, 1, 0)
    assert batch.images.shape == (6, 3, 8, 8)
    assert batch.ids.shape == (6, batch.lengths.max())
    assert len(batch.captions) == 6
    assert [len(each) for each in (batch.class_ids, batch.caption_ids, batch.mismatched)] == [6] * 3


@pytest.mark.parametrize(
    ("classes", "captions", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], [3, 0, 1, 2]),  # the caption before it, as in a plain roll
        ([0, 0, 1, 1], [0, 1, 2, 3], [3, 3, 1, 1]),  # of another class
        ([0, 1, 2, 3], [0, 0, 1, 2], [3, 3, 1, 2]),  # not the same caption
        ([0, 0, 0], [0, 1, 2], [0, 1, 2]),  # one class only: none
        ([0, 1, 2], [0, 0, 0], [0, 1, 2]),  # one caption only: none
        ([0, 0, 1, 0], [0, 0, 0, 1], [0, 1, 3, 2]),
        ([5, 6], [7, 8], [1, 0]),
    ],
)
def test_wrong_captions_differ_in_class_and_caption_where_they_can(classes, captions, expected):
    assert mismatched_captions(classes, captions).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_wrong_captions_of_random_batches(seed):
    numbers = random.Random(seed)
    count = numbers.randint(2, 24)
    classes = [numbers.randrange(3) for _ in range(count)]
    captions = [numbers.randrange(4) for _ in range(count)]
    for own, wrong in enumerate(mismatched_captions(classes, captions).tolist()):
        possible = [k for k in range(count) if captions[k] != captions[own] and classes[k] != classes[own]]
        assert wrong in (possible or [own])


def test_similar_wrong_captions_share_most_words_and_differ_in_class_and_caption():
    words = [{1, 2, 3}, {1, 2, 4}, {1, 2, 3, 4}, {7, 8}, {1, 2, 3}]
    classes, captions = [0, 1, 0, 2, 3], [0, 1, 2, 3, 0]
    chosen = mismatched_captions(classes, captions, words).tolist()
    # 2 is closest to 0 but of its class, and 4 has its very caption; 2 is the closest to 1, 3 and 4 share nothing
    assert chosen[0] == 1
    assert chosen[1] == 2
    assert chosen[2] in (1, 4)
    assert words[chosen[4]] == {1, 2, 3, 4}
    assert mismatched_captions([0, 0], [0, 1], words[:2]).tolist() == [0, 1]


def test_padding_is_no_word_that_similar_captions_share():
    captions = ["red bird", "red", "red bird flying"]
    tokens = WordTokenizer(Vocabulary.build(captions), 4)(captions)
    batch = Batch.of(torch.zeros(3, 3, 4, 4), captions, [0, 1, 2], tokens, similar=True)
    assert batch.mismatched[0] == 2


@pytest.mark.parametrize("similar", [False, True])
def test_captions_that_differ_in_case_and_punctuation_alone_are_one_caption(similar):
    captions = ["a blue bird", "A red bird.", "a red bird"]
    tokens = WordTokenizer(Vocabulary.build(captions), 18)(captions)
    batch = Batch.of(torch.zeros(3, 3, 4, 4), captions, [0, 1, 2], tokens, similar=similar)
    assert batch.caption_ids.tolist() == [0, 1, 1]
    assert batch.mismatched.tolist()[1:] == [0, 0]

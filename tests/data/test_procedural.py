import pytest
import torch

from icsd.data import DataConfig, Vocabulary, open_dataset, tokenize
from icsd.data.procedural import _COLORS, _GROUNDS
from icsd.errors import InputError

NAMES = ["procedural-flowers", "procedural-birds"]


def both(name, resolution=16, **options):
    config = DataConfig(name=name, **{"size": 200, **options})
    return open_dataset(config, "train", resolution), open_dataset(config, "test", resolution)


@pytest.mark.parametrize("name", NAMES)
def test_images_and_captions(name):
    train, test = both(name)
    assert len(train) + len(test) == 200
    assert train.images.shape[1:] == (3, 16, 16)
    assert train.images.float().std(dim=(1, 2, 3)).min() > 5, "something is drawn"
    assert train.attribution is None
    for dataset in (train, test):
        for index, sentences in enumerate(dataset.captions):
            assert len(set(sentences)) == 10
            assert max(len(tokenize(sentence)) for sentence in sentences) <= 18
            values = {key: dataset.attribute_names[key][values[index]] for key, values in dataset.attributes.items()}
            assert all(value in " ".join(sentences) for value in values.values())


@pytest.mark.parametrize(("name", "first", "second"), [(NAMES[0], "petal", "center"), (NAMES[1], "body", "wing")])
def test_composition_is_unseen_but_every_value_is_seen(name, first, second):
    train, test = both(name, resolution=4, size=1500)
    pairs = [set(zip(d.attributes[first].tolist(), d.attributes[second].tolist(), strict=True)) for d in (train, test)]
    assert not pairs[0] & pairs[1]
    assert {pair[0] for pair in pairs[1]} == set(range(len(train.attribute_names[first])))
    for key, values in train.attribute_names.items():
        assert set(train.attributes[key].tolist()) == set(range(len(values)))
    known = Vocabulary.build(sentence for sentences in train.captions for sentence in sentences)
    assert not any(known.unknown(sentence) for sentences in test.captions for sentence in sentences)


@pytest.mark.parametrize("name", NAMES)
def test_unseen_class(name):
    train, test = both(name, resolution=4, size=400, holdout="unseen-class")
    assert not set(train.class_ids) & set(test.class_ids)
    assert len(test) > 20


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_by_seed(name):
    once, again, other = (both(name, size=40, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(once.images, again.images)
    assert once.captions == again.captions
    assert once.captions != other.captions


def test_colors_are_where_the_captions_say():
    train, _ = both("procedural-flowers", resolution=32, size=120)
    names = train.attribute_names
    edge = train.images[:, :, 0, 0].float()
    middle = train.images[:, :, 14:18, 14:18].float().mean(dim=(2, 3))
    for place, key, table in ((edge, "background", _GROUNDS), (middle, "center", _COLORS)):
        palette = torch.tensor([table[value] for value in names[key]]).float()
        nearest = torch.cdist(place, palette).argmin(dim=1)
        assert (nearest == train.attributes[key]).float().mean() > 0.85


def test_a_set_without_test_images_is_refused():
    with pytest.raises(InputError, match=r"data\.size=1 "):
        both("procedural-birds", size=1)


@pytest.mark.parametrize("size", [10**6 + 1, 10**30])
def test_a_set_that_does_not_fit_into_memory_is_refused(size):
    with pytest.raises(InputError, match=rf"data\.size is {size}: give at most 1000000"):
        DataConfig(name="procedural-flowers", size=size)

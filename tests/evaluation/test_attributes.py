import pytest
import torch

from icsd.data import CaptionedImages
from icsd.evaluation import (
    AttributeScore,
    attribute_classifier,
    attributes,
    evaluate_attributes,
    format_scores,
    train_classifier,
)

COLORS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230)}


def flat_images(split, count):
    values = torch.arange(count) % len(COLORS)
    names = list(COLORS)
    images = torch.tensor([COLORS[names[value]] for value in values], dtype=torch.uint8)
    images = images[:, :, None, None].expand(-1, -1, 16, 16).contiguous()
    captions = [[f"a {names[value]} image"] for value in values]
    return CaptionedImages(
        "flat",
        split,
        images,
        captions,
        values.tolist(),
        attributes={"color": values},
        attribute_names={"color": names},
    )


def generate_as_captioned(captions, seed):
    colors = torch.tensor([COLORS[caption.split()[1]] for caption in captions]) / 127.5 - 1
    return colors[:, :, None, None].expand(-1, -1, 16, 16).contiguous()


@pytest.fixture(scope="module")
def classifier():
    return train_classifier(flat_images("train", 30), steps=40, batch_size=12)


@pytest.fixture
def score(classifier):
    def score(generate):
        (only,) = evaluate_attributes(generate, classifier, flat_images("test", 12))
        return only

    return score


def test_a_generator_that_follows_captions_reaches_the_ceiling(score):
    one = score(generate_as_captioned)
    assert (one.attribute, one.values) == ("color", 3)
    assert one.ceiling == one.result == 1
    assert one.floor == pytest.approx(1 / 3)


def test_a_generator_that_ignores_captions_stays_at_the_floor(score):
    one = score(lambda captions, seed: generate_as_captioned(["a red image"] * len(captions), seed))
    assert one.ceiling == 1
    assert one.result == one.floor == pytest.approx(1 / 3)


def test_the_global_random_state_is_left_alone(score):
    before = torch.get_rng_state()
    train_classifier(flat_images("train", 6), steps=1, batch_size=2)
    score(generate_as_captioned)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generators_of_gpus_are_left_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' generators are seeded"))
    train_classifier(flat_images("train", 6), steps=1, batch_size=2)


def test_a_classifier_is_trained_once_for_a_set_and_a_resolution(monkeypatch, tmp_path):
    monkeypatch.setenv("ICSD_CACHE", str(tmp_path))
    monkeypatch.setattr(attributes, "STEPS", 2)
    trained, plain = [], attributes.train_classifier
    monkeypatch.setattr(
        attributes, "train_classifier", lambda *given, **steps: trained.append(given[1]) or plain(*given, **steps)
    )
    train_set = flat_images("train", 6)
    first, again = (attribute_classifier(train_set, 8) for _ in range(2))
    assert trained == [8]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    attribute_classifier(train_set, 16)
    train_set.attributes["color"] = train_set.attributes["color"].flip(0)
    attribute_classifier(train_set, 8)
    assert trained == [8, 16, 8]
    monkeypatch.setattr(attributes, "VERSION", attributes.VERSION + 1)
    attribute_classifier(train_set, 8)
    assert trained == [8, 16, 8, 8]


def test_every_repeat_gets_another_seed(score):
    seeds = []

    def generate(captions, seed):
        seeds.append(seed)
        return generate_as_captioned(captions, seed)

    score(generate)
    assert seeds == [0, 1, 2, 3]


def test_scores_are_laid_out_one_per_line():
    table = format_scores([AttributeScore("tone", 6, 0.97, 0.8, 0.17), AttributeScore("role", 46, 0.96, 0.5, 0.02)])
    assert table.splitlines()[1].split() == ["tone", "6", "0.970", "0.800", "0.170"]
    assert len(table.splitlines()) == 3

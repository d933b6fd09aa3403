import math

import pytest
import torch

from icsd.evaluation.retrieval import r_precision


def test_own_caption_is_found():
    features = torch.eye(200)
    assert r_precision(features, features) == 1
    assert r_precision(features, features.roll(1, 0)) == 0


def test_chance():
    torch.manual_seed(0)
    images, sentences = torch.randn(2, 3000, 8)
    assert abs(r_precision(images, sentences, candidates=10) - 0.1) < 0.02


def test_mismatched_captions_are_of_other_classes():
    # Captions of one class are alike: only those of the other class can be told from the own one.
    sentences = torch.eye(2).repeat_interleave(50, 0)
    classes = [0] * 50 + [1] * 50
    assert r_precision(sentences, sentences, classes, candidates=51) == 1
    assert r_precision(sentences, sentences, candidates=51) < 0.1
    assert r_precision(sentences, sentences, classes, candidates=52) == 0  # one of its own class has to be taken


def test_an_image_may_have_any_of_the_captions():
    sentences = torch.eye(5)
    assert r_precision(sentences[[4, 1, 1]], sentences, own=[4, 1, 1]) == 1
    assert r_precision(sentences[[4, 1, 1]], sentences, own=[4, 1, 0]) == pytest.approx(2 / 3)
    assert r_precision(sentences[[4]], sentences, [0, 0, 1, 1, 1], own=[4], candidates=3) == 1


def test_only_blocks_of_the_similarities_are_in_memory(monkeypatch):
    rows = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **options: rows.append(size[0]) or rand(*size, **options))
    features = torch.randn(600, 8)
    assert r_precision(features, features) == 1
    assert max(rows) <= 256
    assert sum(rows) == 600


def test_few_images():
    one = torch.ones(1, 3)
    assert math.isnan(r_precision(one, one))
    assert math.isnan(r_precision(one[:0], one[:0]))


def test_equal_captions_are_no_wrong_captions():
    sentences = torch.eye(3)[[0, 1, 0, 2, 1]]
    captions = ["red", "blue", "Red.", "green", "blue"]
    assert r_precision(sentences, sentences) < 1
    assert r_precision(sentences, sentences, captions=captions) == 1
    images = torch.eye(3)[[0, 1, 1, 2, 1]]
    assert r_precision(images, sentences, captions=captions) == 0.8


def test_without_a_wrong_caption_there_is_no_score():
    features = torch.randn(4, 3)
    assert math.isnan(r_precision(features, features, captions=["a bird"] * 4))
    assert not math.isnan(r_precision(features, features, [0] * 4))

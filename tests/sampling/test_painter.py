import pytest
import torch

from icsd.errors import InputError
from icsd.sampling import Painter
from icsd.sampling.painter import stages_of


def test_one_seed_gives_one_picture_whatever_else_is_painted(path):
    painter = Painter.load(path)
    assert painter.attribution == "by someone"
    alone = stages_of(painter.pictures(["a red flower"], seed=7))
    assert [tuple(stage.shape) for stage in alone] == [(1, 3, 8, 8), (1, 3, 16, 16)]
    torch.rand(1)
    among = stages_of(Painter.load(path).pictures(["a woman", "a red flower"], seed=5, count=3))
    for one, several in zip(alone, among, strict=True):
        assert len(several) == 6
        assert torch.equal(one[0], several[5])
        assert not torch.equal(several[4], several[5])


def test_sampling_leaves_the_global_random_state(path):
    painter = Painter.load(path)
    before = torch.get_rng_state()
    painter.pictures(["a red flower"])
    assert torch.equal(before, torch.get_rng_state())


def test_the_sentence_matters(path):
    painter = Painter.load(path)
    woman, flower = painter.pictures(["a woman", "a red flower"])
    assert not torch.equal(woman.images[-1], flower.images[-1])


def test_unknown_words_are_named(path):
    assert Painter.load(path).unknown("A green woman with zebra skin") == ["green", "zebra"]


def test_a_run_folder_stands_for_its_newest_checkpoint(path):
    assert Painter.load(path.parent.parent).pictures(["a woman"])[0].images[-1].shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": []}, "no sentence"),
        ({"sentences": ["a woman", "  "]}, "no sentence"),
        ({"sentences": ["a woman"], "seed": -1}, "seed is -1"),
        ({"sentences": ["a woman"], "seed": 2**64}, "seed is"),
        ({"sentences": ["a woman"], "count": 0}, "count is 0"),
        ({"sentences": ["a woman"], "truncation": 0.0}, "truncation is 0"),
    ],
)
def test_what_cannot_be_painted_is_refused(path, arguments, message):
    with pytest.raises(InputError, match=message):
        Painter.load(path).pictures(**arguments)


def test_truncated_noise_stays_within_and_keeps_the_rest(path):
    painter = Painter.load(path)
    free, near = painter.noise(range(200)), painter.noise(range(200), truncation=0.5)
    for a, b in zip(free, near, strict=True):
        assert a.abs().max() > 2
        assert b.abs().max() <= 0.5
        inside = a.abs() <= 0.5
        assert torch.equal(a[inside], b[inside])

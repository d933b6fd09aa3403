import pytest
import torch
from torch.nn import functional as F

from icsd.training.augment import augment

KINDS = ["color", "translation", "cutout"]


def pyramid(batch=64):
    torch.manual_seed(0)
    coarse = torch.rand(batch, 3, 16, 16) * 2 - 1
    return [coarse, F.interpolate(coarse, scale_factor=2)]


def test_nothing_asked_for_changes_nothing():
    stages = pyramid()
    assert all(torch.equal(a, b) for a, b in zip(stages, augment(stages, []), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_samples_change_differently_and_gradients_pass(kind):
    image = (torch.rand(1, 3, 16, 16) * 2 - 1).expand(8, -1, -1, -1).contiguous().requires_grad_()
    (changed,) = augment([image], [kind])
    assert not torch.equal(changed[0], changed[1])
    (gradient,) = torch.autograd.grad(changed.sum(), image)
    assert gradient.abs().sum() > 0


def test_stages_change_color_alike():
    coarse, fine = augment(pyramid(), ["color"])
    torch.testing.assert_close(F.avg_pool2d(fine, 2), coarse)


def test_stages_have_the_same_hole_but_for_its_edge():
    coarse, fine = augment([torch.ones(64, 3, 16, 16), torch.ones(64, 3, 32, 32)], ["cutout"])
    differ = F.avg_pool2d(fine, 2) != coarse
    assert differ.float().mean((1, 2, 3)).max() <= 4 * 8 / 16**2


def test_stages_move_alike_to_within_a_pixel():
    marks = torch.full((64, 3, 16, 16), -1.0)
    marks[:, :, 8, 8] = 1.0
    coarse, fine = augment([marks, F.interpolate(marks, scale_factor=2)], ["translation"])
    for one, other in zip(coarse, fine, strict=True):
        place = (one[0] == 1).nonzero()[0]
        finer = (other[0] == 1).nonzero().float().mean(0)
        assert ((2 * place + 0.5) - finer).abs().max() <= 2
        assert place.min() >= 6
        assert place.max() <= 10
    assert len({tuple((one[0] == 1).nonzero()[0].tolist()) for one in coarse}) > 10


def test_half_of_the_side_is_cut_out_at_most():
    (cut,) = augment([torch.ones(200, 3, 16, 16)], ["cutout"])
    holes = (cut[:, 0] == 0).sum((1, 2))
    assert holes.max() == 8 * 8
    assert holes.min() >= 4 * 4

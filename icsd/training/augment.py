"""Differentiable augmentation of what the discriminators see (DiffAugment, Zhao et al. 2020).

Real and generated images are changed alike, so the generator does not learn the changes, and a small data set does not
run out. An image is changed in the same way at every stage: what its stages are compared by stays comparable.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from icsd.team import Team

SHIFT, HOLE = 1 / 8, 1 / 2
"""Largest shift, and side of the hole, as shares of the image's side."""


def augment(stages: Sequence[Tensor], kinds: Sequence[str], team: Team | None = None) -> list[Tensor]:
    """Change each sample at random, at all its stages in the same way.

    Args:
        stages: Images of the same B samples, `(B, 3, r, r)` each.
        kinds: Some of "color", "translation" and "cutout".
        team: The ranks, which draw for the samples of all of them alike, and use what is drawn for their own.

    Returns:
        The changed images; gradients pass through.
    """
    stages, team = list(stages), team or Team()
    count = len(stages[0]) * team.size
    for kind in kinds:
        chance = torch.rand(4, count, device=stages[0].device)[:, team.own(count)]
        stages = [_CHANGES[kind](images, chance) for images in stages]
    return stages


def _color(images: Tensor, chance: Tensor) -> Tensor:
    """Change brightness by up to half a unit, saturation by 0 to 2, contrast by 0.5 to 1.5."""
    brightness, saturation, contrast, _ = chance[:, :, None, None, None].to(images.dtype)
    images = images + (brightness - 0.5)
    gray = images.mean(dim=1, keepdim=True)
    images = gray + 2 * saturation * (images - gray)
    average = images.mean(dim=(1, 2, 3), keepdim=True)
    return average + (0.5 + contrast) * (images - average)


def _translation(images: Tensor, chance: Tensor) -> Tensor:
    """Move images by whole pixels, up to an eighth of the side, over black."""
    side = images.shape[-1]
    reach = int(side * SHIFT)
    down, right = (chance[:2] * (2 * reach + 1)).long() - reach
    padded = F.pad(images, (reach, reach, reach, reach), value=-1.0)
    place = torch.arange(side, device=images.device)
    rows = (place + (reach - down)[:, None])[:, :, None]
    columns = (place + (reach - right)[:, None])[:, None, :]
    sample = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[sample, rows, columns].permute(0, 3, 1, 2)


def _cutout(images: Tensor, chance: Tensor) -> Tensor:
    """Gray out a square of half the side, whose middle may be anywhere."""
    place = (torch.arange(images.shape[-1], device=images.device) + 0.5) / images.shape[-1]
    rows, columns = ((place - middle[:, None]).abs() < HOLE / 2 for middle in chance[:2])
    hole = rows[:, None, :, None] & columns[:, None, None, :]
    return images.masked_fill(hole, 0.0)


_CHANGES = {"color": _color, "translation": _translation, "cutout": _cutout}

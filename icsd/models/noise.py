"""The random inputs of the generator, drawn by seed."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icsd.models.generator import Generator


class Noise(NamedTuple):
    """The random inputs of B images, standard normal."""

    z: Tensor
    """`(B, noise_dim)`."""
    condition: Tensor
    """`(B, condition_dim)`: places each image's condition in the neighborhood of its sentence."""


def draw_noise(generator: Generator, seeds: Sequence[int], truncation: float | None = None) -> Noise:
    """Draw the noise of each seed, the same on every machine and device.

    Args:
        generator: The generator that takes the noise.
        seeds: One seed for each image.
        truncation: Values beyond this are drawn again. None keeps all values.

    Returns:
        The noise, on the CPU.
    """
    widths = (generator.noise_dim, generator.condition_dim)
    rows = [_normal(sum(widths), torch.Generator().manual_seed(seed), truncation) for seed in seeds]
    return Noise(*torch.stack(rows).split(widths, dim=1))


def _normal(width: int, generator: torch.Generator, truncation: float | None) -> Tensor:
    values = torch.randn(width, generator=generator)
    while truncation is not None and (beyond := values.abs() > truncation).any():
        values[beyond] = torch.randn(int(beyond.sum()), generator=generator)
    return values

"""The coarse-to-fine generator: one hidden map and one image per stage (AttnGAN class, Xu et al. 2018)."""

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icsd.errors import InputError
from icsd.models.attention import WordAttention
from icsd.models.conditioning import ConditioningAugmentation
from icsd.models.layers import GLU, UpsampleConv2d
from icsd.models.text import TextFeatures


@dataclass
class GeneratorConfig:
    """The generator."""

    resolutions: list[int] = field(default_factory=lambda: [16, 32])
    """Side of the square image of each stage in pixels, coarse to fine; the first is 4 times a power of two, each
    next one twice the one before."""

    width: int = 32
    """Channels of the hidden maps at the end of each stage (ngf)."""

    noise_dim: int = 64
    """Dimensions of the noise z."""

    condition_dim: int = 64
    """Dimensions of the augmented sentence."""

    residual_blocks: int = 1
    """Residual blocks in every stage after the first."""

    def __post_init__(self) -> None:
        resolutions = self.resolutions
        first_fits = bool(resolutions) and resolutions[0] >= 8 and resolutions[0] & (resolutions[0] - 1) == 0
        if not first_fits or any(fine != 2 * coarse for coarse, fine in itertools.pairwise(resolutions)):
            raise InputError(
                f"generator.resolutions is {resolutions}: give a power of two of at least 8 and double it from "
                "stage to stage, as in [16, 32] or [64, 128, 256]"
            )
        for key in ("width", "noise_dim", "condition_dim"):
            if getattr(self, key) < 1:
                raise InputError(f"generator.{key} is {getattr(self, key)}: give a positive number")
        if self.residual_blocks < 0:
            raise InputError(f"generator.residual_blocks is {self.residual_blocks}: give 0 or more")


class GeneratorOutput(NamedTuple):
    """The output of the generator; lists run from coarse to fine."""

    images: list[Tensor]
    """One `(B, 3, r, r)` in [-1, 1] per stage."""
    hidden: list[Tensor]
    """One `(B, width, r, r)` per stage."""
    attention: list[Tensor]
    """One `(B, r, r, T)` per stage after the first, `r` the side of the stage before."""
    mu: Tensor
    """Mean of the condition, `(B, condition_dim)`."""
    logvar: Tensor
    """Logarithm of its variance, `(B, condition_dim)`."""


def _conv3x3(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)


def _up_block(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(UpsampleConv2d(channels, 2 * out_channels), nn.BatchNorm2d(2 * out_channels), GLU())


class ResidualBlock(nn.Module):
    """x + BN(conv(GLU(BN(conv(x))))), the same shape in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            _conv3x3(channels, 2 * channels),
            nn.BatchNorm2d(2 * channels),
            GLU(),
            _conv3x3(channels, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, channels, H, W)` to the same shape."""
        return x + self.block(x)


class InitialStage(nn.Module):
    """Noise and condition -> the first hidden map, from 4x4 upwards.

    Args:
        input_dim: Width of noise and condition together.
        width: Channels of the result.
        resolution: Side of the result.
    """

    def __init__(self, input_dim: int, width: int, resolution: int) -> None:
        super().__init__()
        ups = (resolution // 4).bit_length() - 1
        self.channels = width * 2**ups
        self.project = nn.Sequential(
            nn.Linear(input_dim, 2 * self.channels * 4 * 4, bias=False),
            nn.BatchNorm1d(2 * self.channels * 4 * 4),
            GLU(),
        )
        self.up = nn.Sequential(*[_up_block(self.channels >> i, self.channels >> (i + 1)) for i in range(ups)])

    def forward(self, z_and_condition: Tensor) -> Tensor:
        """Map `(B, input_dim)` to `(B, width, resolution, resolution)`."""
        return self.up(self.project(z_and_condition).reshape(-1, self.channels, 4, 4))


class RefinementStage(nn.Module):
    """Hidden map and words -> a hidden map of twice the side.

    Args:
        width: Channels of the hidden maps.
        word_dim: Width of the word features.
        residual_blocks: Number of residual blocks that join map and words.
    """

    def __init__(self, width: int, word_dim: int, residual_blocks: int) -> None:
        super().__init__()
        self.attend = WordAttention(word_dim, width)
        self.join = nn.Sequential(*[ResidualBlock(2 * width) for _ in range(residual_blocks)])
        self.up = _up_block(2 * width, width)

    def forward(self, hidden: Tensor, text: TextFeatures) -> tuple[Tensor, Tensor]:
        """Map `(B, width, r, r)` to `(B, width, 2r, 2r)` and the attention `(B, r, r, T)`."""
        context, attention = self.attend(hidden, text.words, text.mask)
        return self.up(self.join(torch.cat((hidden, context), dim=1))), attention


class Generator(nn.Module):
    """Noise and text -> an image at every stage.

    Args:
        config: Stages and widths.
        text_dim: Width of the word and sentence features.
    """

    def __init__(self, config: GeneratorConfig, text_dim: int) -> None:
        super().__init__()
        self.noise_dim = config.noise_dim
        self.condition_dim = config.condition_dim
        self.resolutions = list(config.resolutions)
        self.condition = ConditioningAugmentation(text_dim, config.condition_dim)
        self.initial = InitialStage(config.noise_dim + config.condition_dim, config.width, self.resolutions[0])
        self.refine = nn.ModuleList(
            RefinementStage(config.width, text_dim, config.residual_blocks) for _ in self.resolutions[1:]
        )
        self.heads = nn.ModuleList(_conv3x3(config.width, 3) for _ in self.resolutions)

    def forward(self, z: Tensor, text: TextFeatures, condition_noise: Tensor | None = None) -> GeneratorOutput:
        """Generate one image per sample and stage.

        Args:
            z: Noise, `(B, noise_dim)`.
            text: Features of B captions.
            condition_noise: Noise of the condition, `(B, condition_dim)`; drawn by default.

        Returns:
            Images, hidden maps, attention and the statistics of the condition.
        """
        condition, mu, logvar = self.condition(text.sentence, condition_noise)
        hidden = [self.initial(torch.cat((z, condition), dim=1))]
        attention = []
        for stage in self.refine:
            deeper, weights = stage(hidden[-1], text)
            hidden.append(deeper)
            attention.append(weights)
        images = [torch.tanh(head(features)) for head, features in zip(self.heads, hidden, strict=True)]
        return GeneratorOutput(images, hidden, attention, mu, logvar)


def image_pyramid(images: Tensor, resolutions: list[int]) -> list[Tensor]:
    """Reduce real images to the resolution of every stage, by area averaging.

    Args:
        images: `(B, 3, r, r)` at the finest resolution.
        resolutions: Resolutions from coarse to fine; the last is r.

    Returns:
        One `(B, 3, r, r)` per resolution.
    """
    return [
        images if resolution == images.shape[-1] else F.adaptive_avg_pool2d(images, resolution)
        for resolution in resolutions
    ]

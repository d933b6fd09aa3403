"""One discriminator per stage, conditional and unconditional; all end in a map of the same size."""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from icsd.errors import InputError
from icsd.models.layers import JointConv2d, PatchConv2d, WholeConv2d


@dataclass
class DiscriminatorConfig:
    """The discriminators."""

    width: int = 16
    """Channels of the first layer at 64 pixels (ndf); each discriminator ends in 8 * width x 4 x 4."""

    normalization: Literal["batch", "spectral", "none"] = "batch"
    """batch normalizes the maps (AttnGAN), spectral the weights (Miyato et al. 2018), none nothing (DF-GAN, whose
    gradient penalty takes its place)."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"discriminator.width is {self.width}: give a positive number")


class _Block(nn.Module):
    """Convolution, normalization of maps or weights, and activation."""

    def __init__(self, conv: nn.Conv2d, normalization: str) -> None:
        super().__init__()
        self.conv = spectral_norm(conv) if normalization == "spectral" else conv
        self.norm = nn.BatchNorm2d(conv.out_channels) if normalization == "batch" else None

    def forward(self, *inputs: Tensor, parts: int) -> Tensor:
        """Convolve the whole batch at once, and normalize each of its equal parts by its own statistics."""
        x = self.conv(*inputs)
        if self.norm is not None:
            x = torch.cat([self.norm(part) for part in x.chunk(parts)]) if parts > 1 else self.norm(x)
        return F.leaky_relu(x, 0.2)


class Discriminator(nn.Module):
    """The discriminator of one stage.

    Channels double with every halving of the side: up to 64 pixels they end in 8 * width, above that they start at
    `width` and 3x3 convolutions bring them back to 8 * width.

    Its methods take batches of `parts` equal parts, such as real and generated images: the large weights of the last
    layers are then read, and their gradient is written, once for all parts, while each part is normalized by itself.

    Attributes:
        channels: Channels of its features, 8 * width.

    Args:
        config: Width and normalization.
        resolution: Side of the images, 4 times a power of two.
        sentence_dim: Width of the sentence features.
    """

    def __init__(self, config: DiscriminatorConfig, resolution: int, sentence_dim: int) -> None:
        super().__init__()
        downs = (resolution // 4).bit_length() - 1
        self.channels = end = 8 * config.width
        channels = max(config.width, end >> (downs - 1))
        widths = [channels << i for i in range(downs)]
        convs = [PatchConv2d(*pair, 4, stride=2) for pair in itertools.pairwise(widths)]
        convs += [PatchConv2d(wide, wide // 2, 3) for wide in reversed(widths) if wide > end]
        self.first = _Block(PatchConv2d(3, channels, 4, stride=2), _unless_batch(config.normalization))
        self.blocks = nn.ModuleList(_Block(conv, config.normalization) for conv in convs)
        self.joint = _Block(JointConv2d(end, sentence_dim, end, side=4), config.normalization)
        self.unconditional_head = WholeConv2d(end, 1, 4)
        self.conditional_head = WholeConv2d(end, 1, 4)
        if config.normalization == "spectral":
            spectral_norm(self.unconditional_head)
            spectral_norm(self.conditional_head)

    def compile_heads(self) -> None:
        """Compile its methods with torch.compile, at their first calls."""
        for name in ("features", "unconditional", "conditional"):
            setattr(self, name, torch.compile(getattr(self, name)))

    def features(self, images: Tensor, parts: int = 1) -> Tensor:
        """Return the features of images.

        Args:
            images: `(B, 3, resolution, resolution)` in [-1, 1].
            parts: Equal parts of the batch.

        Returns:
            `(B, 8 * width, 4, 4)`.
        """
        maps = self.first(images, parts=parts)
        for block in self.blocks:
            maps = block(maps, parts=parts)
        return maps

    def unconditional(self, features: Tensor) -> Tensor:
        """Return the logits of images without their captions.

        Args:
            features: `(B, 8 * width, 4, 4)`.

        Returns:
            Logits, float32 `(B,)`.
        """
        return self.unconditional_head(features).flatten().float()

    def conditional(self, features: Tensor, sentence: Tensor, parts: int = 1) -> Tensor:
        """Return the logits of images with captions. Pair p is that of image p modulo B and caption p.

        Args:
            features: `(B, 8 * width, 4, 4)`.
            sentence: `(P, sentence_dim)`, P from B to 2 B: the first images may have a second caption.
            parts: Equal parts of the pairs.

        Returns:
            Logits, float32 `(P,)`.
        """
        return self.conditional_head(self.joint(features, sentence, parts=parts)).flatten().float()


def _unless_batch(normalization: str) -> str:
    """Return the normalization of the first layer, which is not batch normalization: its statistics are informative."""
    return "none" if normalization == "batch" else normalization


def build_discriminators(config: DiscriminatorConfig, resolutions: list[int], sentence_dim: int) -> nn.ModuleList:
    """Return one discriminator per stage, coarse to fine."""
    return nn.ModuleList(Discriminator(config, resolution, sentence_dim) for resolution in resolutions)

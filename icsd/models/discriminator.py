"""One discriminator per stage, conditional and unconditional; all end in a map of the same size."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icsd.errors import InputError


@dataclass
class DiscriminatorConfig:
    """The discriminators."""

    width: int = 16
    """Channels of the first layer at 64 pixels (ndf); each discriminator ends in 8 * width x 4 x 4."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"discriminator.width is {self.width}: give a positive number")


def _activated(conv: nn.Conv2d) -> list[nn.Module]:
    return [conv, nn.BatchNorm2d(conv.out_channels), nn.LeakyReLU(0.2)]


def _down(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 4, stride=2, padding=1, bias=False)


def _conv3x3(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)


class Discriminator(nn.Module):
    """Judges pictures of one stage.

    Channels double with every halving of the side: up to 64 pixels they end in 8 * width, above that they start at
    `width` and 3x3 convolutions bring them back to 8 * width.

    Attributes:
        channels: Channels of its features, 8 * width.

    Args:
        resolution: Side of the pictures, 4 times a power of two.
        width: Channels of the first layer at 64 pixels.
        sentence_dim: Width of the sentence features.
    """

    def __init__(self, resolution: int, width: int, sentence_dim: int) -> None:
        super().__init__()
        downs = (resolution // 4).bit_length() - 1
        self.channels = end = 8 * width
        channels = max(width, end >> (downs - 1))
        layers: list[nn.Module] = [_down(3, channels), nn.LeakyReLU(0.2)]
        for _ in range(downs - 1):
            layers += _activated(_down(channels, 2 * channels))
            channels *= 2
        while channels > end:
            layers += _activated(_conv3x3(channels, channels // 2))
            channels //= 2
        self.features = nn.Sequential(*layers)
        self.unconditional_head = nn.Conv2d(end, 1, 4)
        self.joint = nn.Sequential(*_activated(_conv3x3(end + sentence_dim, end)))
        self.conditional_head = nn.Conv2d(end, 1, 4)

    def unconditional(self, features: Tensor) -> Tensor:
        """Does it look real?

        Args:
            features: `(B, 8 * width, 4, 4)`.

        Returns:
            Logits, `(B,)`.
        """
        return self.unconditional_head(features).flatten()

    def conditional(self, features: Tensor, sentence: Tensor) -> Tensor:
        """Does it look real and match its sentence?

        Args:
            features: `(B, 8 * width, 4, 4)`.
            sentence: `(B, sentence_dim)`.

        Returns:
            Logits, `(B,)`.
        """
        tiled = sentence[:, :, None, None].expand(-1, -1, 4, 4)
        return self.conditional_head(self.joint(torch.cat((features, tiled), dim=1))).flatten()


def build_discriminators(config: DiscriminatorConfig, resolutions: list[int], sentence_dim: int) -> nn.ModuleList:
    """One discriminator per stage, coarse to fine."""
    return nn.ModuleList(Discriminator(side, config.width, sentence_dim) for side in resolutions)

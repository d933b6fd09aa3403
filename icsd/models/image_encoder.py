"""Image encoders of DAMSM, which turn images into features of regions and of the whole image."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from icsd.errors import InputError
from icsd.models.inception import REGION_CHANNELS, SIDE, WHOLE_CHANNELS, InceptionV3, load_inception


@dataclass
class ImageEncoderConfig:
    """The image encoder."""

    encoder: Literal["inception", "cnn"] = "inception"
    """inception is the frozen Inception-v3 under a learned projection, as in the paper; cnn a small network that learns
    from nothing, for small images."""

    weights: Path | None = None
    """inception: torchvision's inception_v3_google-0cc3c7bd.pth. Needed once: a checkpoint holds them."""

    width: int = 32
    """cnn: channels of its first layer."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise InputError(f"image.width is {self.width}: give a positive number")


class ImageFeatures(NamedTuple):
    """Features of B images in R regions."""

    regions: Tensor
    """`(B, E, R)`."""
    whole: Tensor
    """`(B, E)`."""


class ImageEncoder(nn.Module, ABC):
    """A network from images to `ImageFeatures`."""

    @abstractmethod
    def forward(self, images: Tensor) -> ImageFeatures:
        """Return the features of images `(B, 3, r, r)` in [-1, 1]."""


class InceptionEncoder(ImageEncoder):
    """A frozen Inception-v3 under two learned projections (AttnGAN, Xu et al. 2018).

    Args:
        dim: Width E of the features.
        weights: The network's weights; None where a state is to be loaded.

    Raises:
        InputError: The file of weights cannot be used.
    """

    def __init__(self, dim: int, weights: Path | None = None) -> None:
        super().__init__()
        self.network = (InceptionV3() if weights is None else load_inception(weights)).requires_grad_(False)
        self.regions = nn.Conv2d(REGION_CHANNELS, dim, 1, bias=False)
        self.whole = nn.Linear(WHOLE_CHANNELS, dim)

    def train(self, mode: bool = True) -> "InceptionEncoder":
        """See `nn.Module`; the frozen network keeps its running statistics."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, images: Tensor) -> ImageFeatures:
        images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", align_corners=False)
        regions, whole = self.network(images)
        return ImageFeatures(self.regions(regions).flatten(2), self.whole(whole))


class CNNEncoder(ImageEncoder):
    """A small network for small images: convolutions down to a map of 8 x 8 regions, and on to the whole.

    Args:
        dim: Width E of the features.
        width: Channels of the first layer.
        resolution: Side of the images, a power of two of at least 8.

    Raises:
        InputError: Another resolution.
    """

    def __init__(self, dim: int, width: int, resolution: int) -> None:
        super().__init__()
        halvings = resolution.bit_length() - 4
        if halvings < 0 or resolution != 8 << halvings:
            raise InputError(f"image.encoder is cnn, for images of 8, 16, 32, ... pixels a side; got {resolution}")
        channels = width
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for level in range(halvings):
            out = width << min(level + 1, 3)
            layers += [nn.Conv2d(channels, out, 4, 2, 1, bias=False), nn.BatchNorm2d(out), nn.LeakyReLU(0.2)]
            channels = out
        self.network = nn.Sequential(*layers)
        self.regions = nn.Conv2d(channels, dim, 1, bias=False)
        deepest = 2 * channels
        self.whole = nn.Sequential(
            nn.Conv2d(channels, deepest, 4, 4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * deepest, dim)
        )

    def forward(self, images: Tensor) -> ImageFeatures:
        maps = self.network(images)
        return ImageFeatures(self.regions(maps).flatten(2), self.whole(maps))


def build_image_encoder(config: ImageEncoderConfig, dim: int, resolution: int) -> ImageEncoder:
    """Return a new image encoder.

    Args:
        config: Kind and width.
        dim: Width of its features, that of the text encoder.
        resolution: Side of the images in pixels.

    Raises:
        InputError: The weights or the resolution cannot be used.
    """
    if config.encoder == "cnn":
        return CNNEncoder(dim, config.width, resolution)
    if config.weights is None:
        raise InputError(
            "image.weights is missing: give Inception-v3's ImageNet weights (torchvision's "
            "inception_v3_google-0cc3c7bd.pth), or image.encoder=cnn for a small network that learns from nothing"
        )
    return InceptionEncoder(dim, config.weights)


def restore_image_encoder(config: ImageEncoderConfig, dim: int, resolution: int) -> ImageEncoder:
    """Return an image encoder of a saved configuration, ready for `load_state_dict`."""
    if config.encoder == "cnn":
        return CNNEncoder(dim, config.width, resolution)
    return InceptionEncoder(dim)

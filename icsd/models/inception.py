"""Inception-v3 as a feature extractor, with the parameter names of torchvision's published weights.

C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016. The classifiers at the end
and on the side are left out. torchvision itself is not needed.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icsd.errors import InputError
from icsd.models.weights import read_weights

SIDE = 299
"""Pixels of the images that the network was trained on."""
REGION_CHANNELS, WHOLE_CHANNELS = 768, 2048

_EXPECTED = "torchvision's inception_v3_google-0cc3c7bd.pth"


class InceptionV3(nn.Module):
    """A network from images to the maps that DAMSM reads: regions from `Mixed_6e`, the whole from the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _InceptionA(192, 32)
        self.Mixed_5c = _InceptionA(256, 64)
        self.Mixed_5d = _InceptionA(288, 64)
        self.Mixed_6a = _ReductionA(288)
        self.Mixed_6b = _InceptionB(128)
        self.Mixed_6c = _InceptionB(160)
        self.Mixed_6d = _InceptionB(160)
        self.Mixed_6e = _InceptionB(192)
        self.Mixed_7a = _ReductionB()
        self.Mixed_7b = _InceptionC(1280)
        self.Mixed_7c = _InceptionC(2048)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images `(B, 3, 299, 299)` in [-1, 1] to maps `(B, 768, 17, 17)` and vectors `(B, 2048)`."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))
        regions = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        whole = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(regions)))
        return regions, whole.mean((2, 3))


def load_inception(path: Path) -> InceptionV3:
    """Return the network with the weights of a file.

    Args:
        path: torchvision's ImageNet weights (`inception_v3_google-0cc3c7bd.pth`), a plain state dict.

    Raises:
        InputError: The file is missing, unreadable, or holds other weights.
    """
    if not path.is_file():
        raise InputError(f"no Inception-v3 weights at {path}: give {_EXPECTED}")
    try:
        state = read_weights(path)
        state = {name: value for name, value in state.items() if not name.startswith(("fc.", "AuxLogits."))}
        network = InceptionV3()
        network.load_state_dict(state)
    except (ValueError, AttributeError, RuntimeError) as error:  # names that are no strings, other names or shapes
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} does not hold Inception-v3's weights ({reason}): give {_EXPECTED}") from error
    return network


class _Conv(nn.Module):
    """A convolution, batch normalization and ReLU."""

    def __init__(self, channels: int, out: int, kernel, stride: int = 1, padding=0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _row(channels: int, out: int) -> _Conv:
    return _Conv(channels, out, (1, 7), padding=(0, 3))


def _column(channels: int, out: int) -> _Conv:
    return _Conv(channels, out, (7, 1), padding=(3, 0))


def _smooth(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1)


class _InceptionA(nn.Module):
    """A block on maps of 35 x 35."""

    def __init__(self, channels: int, pool_channels: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(channels, 64, 1)
        self.branch5x5_1 = _Conv(channels, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = _Conv(channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding=1)
        self.branch_pool = _Conv(channels, pool_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), wide, double, self.branch_pool(_smooth(x))], 1)


class _ReductionA(nn.Module):
    """A block from maps of 35 x 35 to 17 x 17."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class _InceptionB(nn.Module):
    """A block on maps of 17 x 17, with 7 x 7 convolutions in two directions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(768, 192, 1)
        self.branch7x7_1 = _Conv(768, width, 1)
        self.branch7x7_2 = _row(width, width)
        self.branch7x7_3 = _column(width, 192)
        self.branch7x7dbl_1 = _Conv(768, width, 1)
        self.branch7x7dbl_2 = _column(width, width)
        self.branch7x7dbl_3 = _row(width, width)
        self.branch7x7dbl_4 = _column(width, width)
        self.branch7x7dbl_5 = _row(width, 192)
        self.branch_pool = _Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_smooth(x))], 1)


class _ReductionB(nn.Module):
    """A block from maps of 17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(768, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(768, 192, 1)
        self.branch7x7x3_2 = _row(192, 192)
        self.branch7x7x3_3 = _column(192, 192)
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_2(self.branch3x3_1(x))
        double = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([single, double, F.max_pool2d(x, 3, 2)], 1)


class _InceptionC(nn.Module):
    """A block on maps of 8 x 8, with 3 x 3 convolutions split into both directions side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(channels, 320, 1)
        self.branch3x3_1 = _Conv(channels, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = _Conv(channels, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = _Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = _Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = _Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(_smooth(x))]
        return torch.cat(branches, 1)

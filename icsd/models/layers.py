"""Layers that compute the function of PyTorch's with fewer products or fewer passes over memory."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEWEST_TRANSPOSED = 512
"""Pixels of a batch from which `UpsampleConv2d` is a transposed convolution: below it, summing the kernel takes
longer. In evaluation mode they are those of one image, so that an image does not depend on the others beside it."""


class GLU(nn.Module):
    """`torch.nn.GLU` over channels, with a gradient that keeps the channels-last layout."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, 2C, ...)` to `(B, C, ...)`."""
        value, gate = x.chunk(2, dim=1)
        return value * gate.sigmoid()


class UpsampleConv2d(nn.Conv2d):
    """Nearest upsampling by two and a 3x3 convolution without bias, in one.

    Upsampling repeats each pixel, so a 3x3 window sees only 2x2 different ones: the pair is a transposed convolution
    of stride 2, whose 4x4 kernel is the 3x3 kernel summed over 2x2 windows. It takes 4/9 of the products, and the large
    map before the convolution is never written.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the result.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, channels, H, W)` to `(B, out_channels, 2H, 2W)`."""
        pixels = x.shape[2] * x.shape[3] * (x.shape[0] if self.training else 1)
        if pixels < FEWEST_TRANSPOSED:
            return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))
        rows = F.pad(self.weight, (0, 0, 0, 1)) + F.pad(self.weight, (0, 0, 1, 0))
        kernel = F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))
        return F.conv_transpose2d(x, kernel.transpose(0, 1).flip(2, 3), stride=2, padding=1)


class PatchConv2d(nn.Conv2d):
    """A convolution without bias, with padding 1, that is one matrix product where that is faster.

    On the CPU, a convolution spends more time on rearranging the many weights of a deep layer over a few pixels than on
    multiplying. The weight is an ordinary one in the channels-last layout, whose rows the product takes as they lie.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the result.
        kernel_size: Side of the kernel.
        stride: Step of the kernel.
    """

    def __init__(self, channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__(channels, out_channels, kernel_size, stride, padding=1, bias=False)

    def reset_parameters(self) -> None:
        """Initialize the weight as `nn.Conv2d` does, in the channels-last layout."""
        out, channels, *size = self.weight.shape
        rows = self.weight.new_empty(out, *size, channels)
        nn.init.kaiming_uniform_(rows, math.sqrt(5))
        self.weight.data = rows.permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, channels, H, W)` to `(B, out_channels, H / stride, W / stride)`."""
        return self.convolve(x, self.weight)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve with a weight of its size and stride, which may have fewer input channels."""
        size, stride = self.kernel_size[0], self.stride[0]
        patches = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
        if x.device.type != "cpu" or patches > self.out_channels:
            return F.conv2d(x, weight, stride=stride, padding=1)
        pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = pixels.unfold(1, size, stride).unfold(2, size, stride)  # (B, H', W', channels, size, size)
        rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
        columns = weight.permute(2, 3, 1, 0).flatten(0, 2)
        return (rows @ columns).unflatten(0, windows.shape[:3]).permute(0, 3, 1, 2)


class JointConv2d(PatchConv2d):
    """A 3x3 convolution of maps and of vectors that are the same at every pixel, as of images and captions.

    It is the convolution of both, concatenated as channels. A vector needs one product with each of the nine taps of
    the kernel; each pixel adds up those that do not lie in the padding. Several vectors can be paired with one map,
    which is convolved once.

    Attributes:
        taps: True where a tap of a pixel lies in the map, `(side * side, 9)`.

    Args:
        channels: Channels of the maps.
        vector_dim: Width of the vectors.
        out_channels: Channels of the result.
        side: Side of the maps.
    """

    def __init__(self, channels: int, vector_dim: int, out_channels: int, side: int) -> None:
        super().__init__(channels + vector_dim, out_channels, 3)
        self.widths = (channels, vector_dim)
        inside = torch.ones(side, 3)
        inside[0, 0] = inside[-1, -1] = 0
        self.register_buffer("taps", torch.kron(inside, inside).bool(), persistent=False)

    def forward(self, maps: Tensor, vectors: Tensor) -> Tensor:
        """Convolve pairs; pair p has map p modulo B.

        Args:
            maps: `(B, channels, side, side)`.
            vectors: `(P, vector_dim)`, P from B to 2 B.

        Returns:
            `(P, out_channels, side, side)`.

        Raises:
            ValueError: P is less than B or more than 2 B.
        """
        further = len(vectors) - len(maps)
        if not 0 <= further <= len(maps):
            raise ValueError(f"vectors must be {len(maps)} to {2 * len(maps)} for {len(maps)} maps, got {len(vectors)}")
        of_maps, of_vectors = self.weight.split(self.widths, dim=1)
        maps = self.convolve(maps, of_maps)
        rows = of_vectors.permute(2, 3, 0, 1).flatten(0, 2)  # (9 * out_channels, vector_dim)
        products = F.linear(vectors.to(maps.dtype), rows).unflatten(1, (9, -1))
        vectors = (self.taps.to(products.dtype) @ products).unflatten(1, maps.shape[2:]).permute(0, 3, 1, 2)
        return vectors + (torch.cat((maps, maps[:further])) if further else maps)


class WholeConv2d(nn.Conv2d):
    """A convolution whose kernel covers the whole map, as one matrix product.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the result.
        kernel_size: Side of the kernel and of the input.
    """

    def __init__(self, channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(channels, out_channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, channels, kernel_size, kernel_size)` to `(B, out_channels)`."""
        x, weight = (each.permute(0, 2, 3, 1).flatten(1) for each in (x, self.weight))
        return F.linear(x, weight, self.bias)

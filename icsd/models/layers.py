"""Layers that compute the function of PyTorch's with fewer products or fewer passes over memory."""

import math

from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_TRANSPOSED = 16
"""Resolution from which `UpsampleConv2d` is a transposed convolution: below it, summing the kernel takes longer."""


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
        if x.shape[-1] < SMALLEST_TRANSPOSED:
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
        size, stride = self.kernel_size[0], self.stride[0]
        patches = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
        if x.device.type != "cpu" or patches > self.out_channels:
            return super().forward(x)
        pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = pixels.unfold(1, size, stride).unfold(2, size, stride)  # (B, H', W', channels, size, size)
        rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
        columns = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        return (rows @ columns).unflatten(0, windows.shape[:3]).permute(0, 3, 1, 2)

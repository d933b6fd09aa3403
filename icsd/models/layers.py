"""Layers with a fast form: the same function as PyTorch's, computed with fewer products or fewer passes over memory."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST_TRANSPOSED = 16
"""Side from which `UpsampleConv2d` is a transposed convolution: below it, summing the kernel's taps takes longer."""


class GLU(nn.Module):
    """Half of the channels gate the other half, as `torch.nn.GLU`, whose gradient leaves the channels-last layout."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, 2C, ...)` -> `(B, C, ...)`."""
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
        """`(B, channels, H, W)` -> `(B, out_channels, 2H, 2W)`."""
        if x.shape[-1] < SMALLEST_TRANSPOSED:
            return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))
        rows = F.pad(self.weight, (0, 0, 0, 1)) + F.pad(self.weight, (0, 0, 1, 0))
        kernel = F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))
        return F.conv_transpose2d(x, kernel.transpose(0, 1).flip(2, 3), stride=2, padding=1)


class PatchConv2d(nn.Module):
    """A convolution without bias that is one matrix product where its weights outweigh its patches.

    On the CPU the many weights of a deep layer over a few pixels cost a convolution more to rearrange than to multiply.

    Attributes:
        weight: `(out_channels, kernel_size * kernel_size * channels)`, the kernel's rows, columns and channels in this
            order: a channels-last convolution takes it as it lies, and so do products and optimizers.

    Args:
        channels: Channels of the input.
        out_channels: Channels of the result.
        kernel_size: Side of the kernel.
        stride: Step of the kernel.
    """

    def __init__(self, channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.channels, self.out_channels, self.kernel_size, self.stride = channels, out_channels, kernel_size, stride
        self.weight = nn.Parameter(torch.empty(out_channels, kernel_size * kernel_size * channels))
        nn.init.kaiming_uniform_(self.weight, math.sqrt(5))  # as nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` -> `(B, out_channels, H / stride, W / stride)`."""
        weight, size, stride = self.weight, self.kernel_size, self.stride
        patches = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
        if x.device.type != "cpu" or patches > self.out_channels:
            kernel = weight.unflatten(1, (size, size, self.channels)).permute(0, 3, 1, 2)
            return F.conv2d(x, kernel, stride=stride, padding=1)
        pixels = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = pixels.unfold(1, size, stride).unfold(2, size, stride)  # (B, H', W', channels, size, size)
        rows = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
        return (rows @ weight.T).unflatten(0, windows.shape[:3]).permute(0, 3, 1, 2)

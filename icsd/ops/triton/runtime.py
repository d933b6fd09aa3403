"""Launches of kernels: on a device, in Triton's interpreter, or into a graph that torch.compile traces."""

from __future__ import annotations

import functools
import os
import struct

import torch
import triton
from torch import Tensor

from icsd.ops.library import is_traced


def launch(kernel, out: Tensor, grid, *arguments, **constants) -> None:
    """Launch a kernel that writes to `out` on the device of `out`, or add the launch to the graph being traced."""
    if not out.numel():
        return
    if is_traced(out):
        torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
        return
    with torch.cuda.device_of(out):
        kernel[grid](*arguments, **constants)


def as_groups(x: Tensor) -> Tensor:
    """Return `(*B, N, D)` as `(groups, N, D)` with the features of each sample adjacent; a copy if need be."""
    x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def bits(number: float) -> int:
    """Return the bits of a float64, which kernels turn into a number again (`products.real`).

    Triton passes a float as float32 but an integer unchanged.
    """
    return struct.unpack("q", struct.pack("d", number))[0]


def tile_size(size: int, largest: int) -> int:
    """Return the smallest power of two that covers `size`, from 16, which tensor cores need, to `largest`."""
    return max(16, min(largest, triton.next_power_of_2(size)))


def product_tile(size: int, dtype: torch.dtype) -> int:
    """Return the size of a square tile of products, small enough to leave registers for the operands."""
    return tile_size(size, 64 if dtype == torch.float64 else 128)


def row_tile(columns: int) -> tuple[int, int]:
    """Return the rows and columns of a tile for a pass over rows: 1,024 elements, so that many programs run."""
    block = tile_size(columns, 512)
    return max(1, 1024 // block), block


def split_reduction(length: int, tiles: int, tile: int, device: torch.device) -> tuple[int, int]:
    """Divide a reduction of `length` elements, computed for `tiles` tiles, into splits.

    There are enough splits to fill the device, each of them long enough that writing a tile of partial sums costs
    little compared with reading the operands.

    Returns:
        The number of splits and the elements of each.
    """
    splits = max(1, min(2 * processors(device) // max(1, tiles), length // max(256, 4 * tile)))
    split_length = max(256, triton.cdiv(triton.cdiv(length, splits), 256) * 256)
    return max(1, triton.cdiv(length, split_length)), split_length


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def precision(x: Tensor) -> str:
    """Return how products of float32 are computed on the device of `x`: see docs/triton.md."""
    chosen = os.environ.get("ICSD_TRITON_PRECISION")
    return chosen or ("ieee" if x.dtype == torch.float64 else fastest_precision(x.device))


@functools.cache
def fastest_precision(device: torch.device) -> str:
    """Return the fastest precision of a device that is as accurate as float32 itself."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "tf32x3" if nvidia and torch.cuda.get_device_capability(device) >= (8, 0) else "ieee"

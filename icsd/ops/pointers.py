"""Tensors as the native module takes them: addresses, sizes and strides."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/core/dtype.h
NO_FEATURES = (0, 0, 0, 0, 0)  # where no result is wanted


def sample_dense(x: Tensor) -> Tensor:
    """`x` itself if each sample's features are adjacent and one stride leads from group to group; a copy otherwise."""
    if x.dim() > 3:
        x = x.flatten(0, -3).unflatten(0, x.shape[:-2]) if x.numel() else x
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def features_of(x: Tensor) -> tuple[int, int, int, int, int]:
    """The native module's (address, dtype, features, group stride, sample stride)."""
    strides = x.stride()
    return x.data_ptr(), _DTYPES[x.dtype], x.shape[-1], strides[-3] if len(strides) > 2 else 0, strides[-2]


def groups_of(x: Tensor) -> int:
    """The product of all leading dimensions."""
    return x.shape[:-2].numel()

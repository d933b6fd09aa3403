"""Batch normalization by the statistics of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from icsd.ops.distributed.collectives import leave, sum_over_ranks
from icsd.ops.distributed.ranks import Ranks


class GlobalBatchNorm(_BatchNorm):
    """Batch normalization whose mean and variance in training are those of the samples of all ranks.

    Unlike `torch.nn.SyncBatchNorm`, it runs on the CPU, too, and can be differentiated twice, which penalties on
    gradients need. All ranks have samples of one size, and the same number of them.

    Args:
        norm: The layer whose weights and buffers it takes.
        ranks: The ranks.
    """

    def __init__(self, norm: _BatchNorm, ranks: Ranks) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.training = norm.training
        self.ranks = ranks

    def _check_input_dim(self, x: Tensor) -> None:
        """Take any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(B, C, ...)`."""
        if not self.training:
            return super().forward(x)
        dims = [dim for dim in range(x.dim()) if dim != 1]
        wide = x.double() if x.dtype is torch.float64 else x.float()
        count = self.ranks.size * x.numel() // x.shape[1]
        mean = leave(self.ranks, sum_over_ranks(self.ranks, wide.sum(dims))) / count
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = wide - mean.view(shape)
        variance = leave(self.ranks, sum_over_ranks(self.ranks, wide.square().sum(dims))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(1, count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (wide * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def normalize_over_ranks(module: nn.Module, ranks: Ranks) -> None:
    """Replace the batch normalization within a module by that of all ranks, with the same weights and buffers."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, GlobalBatchNorm(child, ranks))
        else:
            normalize_over_ranks(child, ranks)

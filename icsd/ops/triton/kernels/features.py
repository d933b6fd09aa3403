"""Features and their inverse norms, as one argument of a kernel."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """The features X of one stage with the inverse norms of their samples, which a kernel reads by the same names.

    Kernels that `torch.compile` traces take tensors one by one instead: it cannot look into tuples.

    Attributes:
        x: X, `(groups, samples, dim)`.
        inverse_norms: 1 / |x_i|, `(groups, samples)`; the samples of a group are adjacent.
        dim: D.
        group_stride: From a group of `x` to the next.
        sample_stride: From a sample of `x` to the next.
        norms_group_stride: From a group of `inverse_norms` to the next.
    """

    x: Tensor
    inverse_norms: Tensor
    dim: int
    group_stride: int
    sample_stride: int
    norms_group_stride: int

    @classmethod
    def of(cls, x: Tensor, inverse_norms: Tensor) -> Features:
        """Return the features `x` with a tensor for their inverse norms."""
        return cls(x, inverse_norms, x.shape[2], *x.stride()[:2], inverse_norms.stride(0))

"""The norms of samples, correctly rounded because every similarity is a multiple of two of them."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from icsd.ops.triton import runtime
from icsd.ops.triton.kernels.features import Features
from icsd.ops.triton.kernels.products import real


@triton.jit
def reciprocal(x):
    """Return 1 / x, correctly rounded."""
    return 1.0 / x if x.dtype == tl.float64 else tl.div_rn(1.0, x)


@triton.jit
def inverse_norm(square, eps):
    """Return 1 / max(sqrt(K_ii), eps); 0 for a zero row, NaN where the squared norm is not finite."""
    positive = tl.where(square > 0, square, 1.0)
    norm = tl.sqrt(positive) if square.dtype == tl.float64 else tl.sqrt_rn(positive)
    inverse = tl.where(square == 0, 0.0, reciprocal(tl.maximum(norm, eps)))
    return tl.where(square < float("inf"), inverse, float("nan"))


@triton.jit
def similarity(k, inverse_i, inverse_j):
    """Return S of a tile of K; where the norms are in float64, the result is rounded only once."""
    return (k.to(inverse_i.dtype) * (inverse_i[:, None] * inverse_j[None, :])).to(k.dtype)


@triton.jit
def is_clamped(inverse, eps):
    """Return True where eps replaces the norm: the gradient has no projection there."""
    return inverse >= reciprocal(eps)


@triton.jit(do_not_specialize=["eps"])
def inverse_norms_kernel(stages, only, eps, samples, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the inverse norms of all stages, a tuple of `Features`.

    The grid is `(groups * ceil(samples / ROWS), stages)`. Groups for which `only` is 0 are left out; it may be None.
    """
    if only is not None and tl.load(only + tl.program_id(0) // tl.cdiv(samples, ROWS)) == 0:
        return
    for k in tl.static_range(len(stages)):
        if tl.program_id(1) == k:
            _store_inverse_norms(stages[k], eps, samples, ROWS, BLOCK)


@triton.jit
def _store_inverse_norms(features, eps, samples, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Write the inverse norms of a row block of one stage."""
    blocks = tl.cdiv(samples, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = features.inverse_norms.dtype.element_ty
    x = features.x + group * features.group_stride + i[:, None].to(tl.int64) * features.sample_stride
    square = tl.zeros((ROWS,), dtype)
    for start in range(0, features.dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = (i[:, None] < samples) & (d[None, :] < features.dim)
        part = tl.load(x + d[None, :], mask=mask, other=0.0).to(dtype)
        square += tl.sum(part * part, axis=1)
    inverse = features.inverse_norms + group * features.norms_group_stride + i
    tl.store(inverse, inverse_norm(square, real(eps, dtype)), mask=i < samples)


def compute_inverse_norms(stages: Sequence[Features], eps: float, only: Tensor | None = None) -> None:
    """Write the inverse norms of all stages by one launch. Groups for which `only` `(groups,)` is 0 are left out."""
    groups, samples, _ = stages[0].x.shape
    rows, block = runtime.row_tile(max(features.dim for features in stages))
    grid = groups * triton.cdiv(samples, rows), len(stages)
    arguments = tuple(stages), only, runtime.bits(eps), samples
    runtime.launch(inverse_norms_kernel, stages[0].inverse_norms, grid, *arguments, ROWS=rows, BLOCK=block)


@triton.jit(do_not_specialize=["eps"])
def normalize_backward_kernel(
    product, features, group_scale, out, only, eps, samples, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Write dL/dX = scale r (v - <v, x̂> x̂), where v is the `product` dL/dX̂ and scale the group's, 1 if it is None.

    `product` and `out` are contiguous. The grid is `(groups * ceil(samples / ROWS),)`. Groups for which `only` is 0 are
    left out; it may be None.
    """
    dim = features.dim
    blocks = tl.cdiv(samples, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    if only is not None and tl.load(only + group) == 0:
        return
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = product.dtype.element_ty
    row = (group * samples + i[:, None]) * dim
    product += row
    out += row
    x = features.x + group * features.group_stride + i[:, None].to(tl.int64) * features.sample_stride
    r = tl.load(features.inverse_norms + group * features.norms_group_stride + i, mask=i < samples, other=0.0)
    along = tl.zeros((ROWS,), dtype)
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = (i[:, None] < samples) & (d[None, :] < dim)
        v = tl.load(product + d[None, :], mask=mask, other=0.0)
        along += tl.sum(v * (tl.load(x + d[None, :], mask=mask, other=0.0).to(dtype) * r[:, None]), axis=1)
    along = tl.where(is_clamped(r, real(eps, dtype)), 0.0, along)
    scale = r
    if group_scale is not None:
        scale *= tl.load(group_scale + group).to(dtype)
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = (i[:, None] < samples) & (d[None, :] < dim)
        v = tl.load(product + d[None, :], mask=mask, other=0.0)
        unit = tl.load(x + d[None, :], mask=mask, other=0.0).to(dtype) * r[:, None]
        gradient = scale[:, None] * (v - along[:, None] * unit)
        tl.store(out + d[None, :], gradient.to(out.dtype.element_ty), mask=mask)


def normalize_backward(
    product: Tensor,
    features: Features,
    group_scale: Tensor | None,
    out: Tensor,
    eps: float,
    only: Tensor | None = None,
) -> None:
    """Write dL/dX, times `group_scale` `(groups,)`, from `product`, which is dL/dX̂ and may be `out` itself.

    Groups for which `only` `(groups,)` is 0 are left out.
    """
    groups, samples, dim = product.shape
    rows, block = runtime.row_tile(dim)
    grid = (groups * triton.cdiv(samples, rows),)
    arguments = product, features, group_scale, out, only, runtime.bits(eps), samples
    runtime.launch(normalize_backward_kernel, out, grid, *arguments, ROWS=rows, BLOCK=block)

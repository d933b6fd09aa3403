"""Uncentered covariances X̂ᵀŶ of normalized samples, for `mse` in feature space: tiles over splits of the samples."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from icsd.ops.triton import runtime
from icsd.ops.triton.kernels.features import Features
from icsd.ops.triton.kernels.products import multiply_add
from icsd.ops.triton.kernels.tuning import tuned, tuning_class


@triton.jit
def _normalized(features, group, i, d, samples, dtype):
    """Return a tile of X̂."""
    r = tl.load(features.inverse_norms + group * features.norms_group_stride + i, mask=i < samples, other=0.0)
    x = features.x + group * features.group_stride + i[:, None].to(tl.int64) * features.sample_stride + d[None, :]
    mask = (i[:, None] < samples) & (d[None, :] < features.dim)
    return tl.load(x, mask=mask, other=0.0).to(dtype) * r[:, None]


def _needs(arguments, block: int) -> tuple[int, int]:
    tile, element = arguments["TILE"], arguments["partials"].element_size()
    return 2 * tile * block * element, tile * tile * element + 5 * tile * block * element


@tuned(("TILE",), _needs)
@triton.jit
def covariance_kernel(
    x,
    y,
    partials,
    only,
    samples,
    split_samples,
    SYMMETRIC: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    TUNED_FOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one split's part of X̂ᵀŶ from `Features` x and y; only the lower triangle if both are the same.

    The grid is `(groups * ceil(x.dim / TILE) * ceil(y.dim / TILE), splits)`; `partials` is
    `(splits, groups, x.dim, y.dim)`. Groups for which `only` is 0 are left out; it may be None.
    """
    columns = tl.cdiv(y.dim, TILE)
    tiles = tl.cdiv(x.dim, TILE) * columns
    group = (tl.program_id(0) // tiles).to(tl.int64)
    if only is not None and tl.load(only + group) == 0:
        return
    row = tl.program_id(0) % tiles // columns
    column = tl.program_id(0) % columns
    if SYMMETRIC and column > row:
        return
    dtype: tl.constexpr = partials.dtype.element_ty
    p = row * TILE + tl.arange(0, TILE)
    q = column * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), dtype)
    begin = tl.program_id(1) * split_samples
    for start in range(begin, tl.minimum(begin + split_samples, samples), BLOCK):
        i = start + tl.arange(0, BLOCK)
        a = _normalized(x, group, i, p, samples, dtype)
        b = _normalized(y, group, i, q, samples, dtype)
        sums = multiply_add(tl.trans(a), b, sums, PRECISION)
    groups = tl.num_programs(0) // tiles
    partials += (tl.program_id(1).to(tl.int64) * groups + group) * x.dim * y.dim
    mask = (p[:, None] < x.dim) & (q[None, :] < y.dim)
    tl.store(partials + p[:, None].to(tl.int64) * y.dim + q[None, :], sums, mask=mask)


@triton.jit
def sum_covariances_kernel(
    partials,
    out,
    only,
    splits,
    groups,
    x_dim,
    y_dim,
    out_group_stride,
    SYMMETRIC: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write X̂ᵀŶ, in float64, from the parts of all splits. The grid is `(groups * x_dim, ceil(y_dim / BLOCK))`."""
    group = (tl.program_id(0) // x_dim).to(tl.int64)
    if only is not None and tl.load(only + group) == 0:
        return
    p = tl.program_id(0) % x_dim
    q = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # A tile above the diagonal mirrors the one below.
    mirrored = (q // TILE > p // TILE) & SYMMETRIC
    at = tl.where(mirrored, q.to(tl.int64) * y_dim + p, p.to(tl.int64) * y_dim + q)
    partials += group * x_dim * y_dim + at
    sums = tl.zeros((BLOCK,), tl.float64)
    for _ in range(splits):
        sums += tl.load(partials, mask=q < y_dim, other=0.0).to(tl.float64)
        partials += tl.cast(groups, tl.int64) * x_dim * y_dim
    tl.store(out + group * out_group_stride + p.to(tl.int64) * y_dim + q, sums, mask=q < y_dim)


def covariance(x: Features, y: Features, out: Tensor, only: Tensor | None = None) -> None:
    """Write X̂ᵀŶ, `(groups, x.dim, y.dim)`, in float64, from products in the dtype of the norms.

    Groups for which `only` `(groups,)` is 0 are left out.
    """
    groups, samples, _ = x.x.shape
    symmetric = x is y
    tile = runtime.tile_size(max(x.dim, y.dim), 64)
    tiles = groups * triton.cdiv(x.dim, tile) * triton.cdiv(y.dim, tile)
    splits, split_samples = runtime.split_reduction(samples, tiles, tile, out.device)
    partials = out.new_empty((splits, groups, x.dim, y.dim), dtype=x.inverse_norms.dtype)
    runtime.launch(
        covariance_kernel,
        partials,
        (tiles, splits),
        x,
        y,
        partials,
        only,
        samples,
        split_samples,
        SYMMETRIC=symmetric,
        TILE=tile,
        PRECISION=runtime.precision(x.inverse_norms),
        TUNED_FOR=tuning_class(x.x, y.x),
    )
    grid = (groups * x.dim, triton.cdiv(y.dim, 256))
    arguments = partials, out, only, splits, groups, x.dim, y.dim, out.stride(0)
    constants = {"SYMMETRIC": symmetric, "TILE": tile, "BLOCK": 256}
    runtime.launch(sum_covariances_kernel, out, grid, *arguments, **constants)

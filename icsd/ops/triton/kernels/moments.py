"""Moments X̂ᵀŶ of normalized samples, `mse` in feature space: tiles over slices of the samples, then their sums."""

from __future__ import annotations

import triton
import triton.language as tl

from icsd.ops.triton.kernels.norms import is_clamped
from icsd.ops.triton.kernels.products import multiply_add, real
from icsd.ops.triton.kernels.tuning import tuned


@triton.jit
def _normalized(x, norms, i, d, samples, features, sample_stride, dtype):
    """A tile of X̂."""
    r = tl.load(norms + i, mask=i < samples, other=0.0)
    x += i[:, None].to(tl.int64) * sample_stride + d[None, :]
    return tl.load(x, mask=(i[:, None] < samples) & (d[None, :] < features), other=0.0).to(dtype) * r[:, None]


def _needs(arguments, block: int) -> tuple[int, int]:
    side, element = arguments["SIDE"], arguments["partials"].element_size()
    return 2 * side * block * element, side * side * element + 5 * side * block * element


@tuned(("SIDE", "x_features", "y_features"), _needs)
@triton.jit
def moments(
    x,
    y,
    x_norms,
    y_norms,
    partials,
    samples,
    slice_length,
    x_features,
    y_features,
    x_group_stride,
    x_sample_stride,
    y_group_stride,
    y_sample_stride,
    SYMMETRIC: tl.constexpr,
    SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A slice's part of X̂ᵀŶ; of its lower triangle if X is Y.

    Grid `(groups * ceil(x_features / SIDE) * ceil(y_features / SIDE), slices)`; inverse norms are `(groups, samples)`,
    `partials` `(slices, groups, x_features, y_features)`.
    """
    columns = tl.cdiv(y_features, SIDE)
    tiles = tl.cdiv(x_features, SIDE) * columns
    group = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles // columns
    column = tl.program_id(0) % columns
    if SYMMETRIC and column > row:
        return
    dtype: tl.constexpr = partials.dtype.element_ty
    p = row * SIDE + tl.arange(0, SIDE)
    q = column * SIDE + tl.arange(0, SIDE)
    x += group * x_group_stride
    y += group * y_group_stride
    x_norms += group * samples
    y_norms += group * samples
    sums = tl.zeros((SIDE, SIDE), dtype)
    begin = tl.program_id(1) * slice_length
    for start in range(begin, tl.minimum(begin + slice_length, samples), BLOCK):
        i = start + tl.arange(0, BLOCK)
        a = _normalized(x, x_norms, i, p, samples, x_features, x_sample_stride, dtype)
        b = _normalized(y, y_norms, i, q, samples, y_features, y_sample_stride, dtype)
        sums = multiply_add(tl.trans(a), b, sums, PRECISION)
    groups = tl.num_programs(0) // tiles
    partials += (tl.program_id(1).to(tl.int64) * groups + group) * x_features * y_features
    mask = (p[:, None] < x_features) & (q[None, :] < y_features)
    tl.store(partials + p[:, None].to(tl.int64) * y_features + q[None, :], sums, mask=mask)


@triton.jit
def moment_sums(
    partials,
    out,
    slices,
    groups,
    x_features,
    y_features,
    out_group_stride,
    SYMMETRIC: tl.constexpr,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """X̂ᵀŶ, in float64, from the slices' parts. Grid `(groups * x_features, ceil(y_features / BLOCK))`."""
    group = (tl.program_id(0) // x_features).to(tl.int64)
    p = tl.program_id(0) % x_features
    q = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Tiles above the diagonal are those below it, mirrored.
    mirrored = (q // SIDE > p // SIDE) & SYMMETRIC
    at = tl.where(mirrored, q.to(tl.int64) * y_features + p, p.to(tl.int64) * y_features + q)
    partials += group * x_features * y_features + at
    sums = tl.zeros((BLOCK,), tl.float64)
    for _ in range(slices):
        sums += tl.load(partials, mask=q < y_features, other=0.0).to(tl.float64)
        partials += tl.cast(groups, tl.int64) * x_features * y_features
    tl.store(out + group * out_group_stride + p.to(tl.int64) * y_features + q, sums, mask=q < y_features)


@triton.jit(do_not_specialize=["eps"])
def project(
    product,
    x,
    norms,
    group_scale,
    out,
    eps,
    samples,
    features,
    x_group_stride,
    x_sample_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dL/dX = scale r (v - <v, x̂> x̂), v the `product` dL/dX̂. Grid `(groups * ceil(samples / ROWS),)`."""
    blocks = tl.cdiv(samples, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = product.dtype.element_ty
    row = (group * samples + i[:, None]) * features
    product += row
    out += row
    x += group * x_group_stride + i[:, None].to(tl.int64) * x_sample_stride
    r = tl.load(norms + group * samples + i, mask=i < samples, other=0.0)
    along = tl.zeros((ROWS,), dtype)
    for start in range(0, features, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = (i[:, None] < samples) & (d[None, :] < features)
        v = tl.load(product + d[None, :], mask=mask, other=0.0)
        along += tl.sum(v * (tl.load(x + d[None, :], mask=mask, other=0.0).to(dtype) * r[:, None]), axis=1)
    along = tl.where(is_clamped(r, real(eps, dtype)), 0.0, along)
    scale = r * tl.load(group_scale + group).to(dtype)
    for start in range(0, features, BLOCK):
        d = start + tl.arange(0, BLOCK)
        mask = (i[:, None] < samples) & (d[None, :] < features)
        v = tl.load(product + d[None, :], mask=mask, other=0.0)
        unit = tl.load(x + d[None, :], mask=mask, other=0.0).to(dtype) * r[:, None]
        gradient = scale[:, None] * (v - along[:, None] * unit)
        tl.store(out + d[None, :], gradient.to(out.dtype.element_ty), mask=mask)

"""Gram matrices K = X Xᵀ: tiles of the lower triangle over slices of the features, then their sums in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl

from icsd.ops.triton.kernels.norms import inverse_norm
from icsd.ops.triton.kernels.products import products, real
from icsd.ops.triton.kernels.tuning import tuned


@triton.jit
def _store(tile, i, j, on_diagonal, out, norms, eps, samples, row_stride):
    """Writes the rows `i` and columns `j` of K and their mirror image and, on the diagonal, the inverse norms."""
    mask = (i[:, None] < samples) & (j[None, :] < samples)
    tile = tile.to(out.dtype.element_ty)
    tl.store(out + i[:, None].to(tl.int64) * row_stride + j[None, :], tile, mask=mask)
    if not on_diagonal:
        tl.store(out + j[:, None].to(tl.int64) * row_stride + i[None, :], tl.trans(tile), mask=tl.trans(mask))
    elif norms is not None:
        square = tl.sum(tl.where(i[:, None] == j[None, :], tile, 0), axis=1).to(norms.dtype.element_ty)
        tl.store(norms + i, inverse_norm(square, real(eps, square.dtype)), mask=i < samples)


def _needs(arguments, block: int) -> tuple[int, int]:
    side, element = arguments["SIDE"], arguments["x"].element_size()
    tiles = min(2, arguments["TILES"])
    return tiles * side * block * element, side * side * max(4, element) + 5 * side * block * element


@tuned(("SIDE", "TILES", "features"), _needs)
@triton.jit(do_not_specialize=["eps"])
def gram(
    x,
    out,
    partials,
    norms,
    eps,
    samples,
    features,
    slice_length,
    x_group_stride,
    x_sample_stride,
    out_group_stride,
    out_row_stride,
    SIDE: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """K and the inverse norms or, where `partials` is given, a slice's part of K.

    Grid `(groups * TILES², slices)`; `partials` is `(slices, groups, TILES * (TILES + 1) / 2, SIDE, SIDE)`.
    """
    group = (tl.program_id(0) // (TILES * TILES)).to(tl.int64)
    row = tl.program_id(0) // TILES % TILES
    column = tl.program_id(0) % TILES
    if column > row:
        return
    i = row * SIDE + tl.arange(0, SIDE)
    j = column * SIDE + tl.arange(0, SIDE)
    x += group * x_group_stride
    begin = tl.program_id(1) * slice_length
    end = tl.minimum(begin + slice_length, features)
    sums = products(x, i, j, begin, end, samples, features, x_sample_stride, TILES == 1, BLOCK, PRECISION)
    if partials is None:
        out += group * out_group_stride
        if norms is not None:
            norms += group * samples
        _store(sums, i, j, row == column, out, norms, eps, samples, out_row_stride)
    else:
        groups = tl.num_programs(0) // (TILES * TILES)
        matrix = tl.program_id(1).to(tl.int64) * groups + group
        tile = matrix * (TILES * (TILES + 1) // 2) + row * (row + 1) // 2 + column
        square = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
        tl.store(partials + tile * (SIDE * SIDE) + square, sums)


@triton.jit(do_not_specialize=["eps"])
def gram_sums(
    out,
    partials,
    norms,
    eps,
    samples,
    slices,
    out_group_stride,
    out_row_stride,
    SIDE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """K and the inverse norms from the slices' parts. Grid `(groups * TILES², SIDE / ROWS)`."""
    group = (tl.program_id(0) // (TILES * TILES)).to(tl.int64)
    row = tl.program_id(0) // TILES % TILES
    column = tl.program_id(0) % TILES
    if column > row:
        return
    inside = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    groups = tl.num_programs(0) // (TILES * TILES)
    slice_elements = groups.to(tl.int64) * (TILES * (TILES + 1) // 2 * SIDE * SIDE)
    tile = group * (TILES * (TILES + 1) // 2) + row * (row + 1) // 2 + column
    partials += tile * (SIDE * SIDE) + inside[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    sums = tl.zeros((ROWS, SIDE), partials.dtype.element_ty)
    for _ in range(slices):
        sums += tl.load(partials)
        partials += slice_elements
    out += group * out_group_stride
    if norms is not None:
        norms += group * samples
    j = column * SIDE + tl.arange(0, SIDE)
    _store(sums, row * SIDE + inside, j, row == column, out, norms, eps, samples, out_row_stride)

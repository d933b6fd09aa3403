"""Gram matrices K = X Xᵀ: tiles of the lower triangle over splits of the features, then sums in a fixed order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.triton import runtime
from icsd.ops.triton.kernels.norms import inverse_norm
from icsd.ops.triton.kernels.products import products, real
from icsd.ops.triton.kernels.tuning import tuned, tuning_class


@triton.jit
def _store(tile, i, j, on_diagonal, out, inverse_norms, eps, samples, row_stride):
    """Write the rows `i` and columns `j` of K, their mirror image and, on the diagonal, the inverse norms."""
    mask = (i[:, None] < samples) & (j[None, :] < samples)
    tile = tile.to(out.dtype.element_ty)
    tl.store(out + i[:, None].to(tl.int64) * row_stride + j[None, :], tile, mask=mask)
    if not on_diagonal:
        tl.store(out + j[:, None].to(tl.int64) * row_stride + i[None, :], tl.trans(tile), mask=tl.trans(mask))
    elif inverse_norms is not None:
        square = tl.sum(tl.where(i[:, None] == j[None, :], tile, 0), axis=1).to(inverse_norms.dtype.element_ty)
        tl.store(inverse_norms + i, inverse_norm(square, real(eps, square.dtype)), mask=i < samples)


def _needs(arguments, block: int) -> tuple[int, int]:
    tile, element = arguments["TILE"], arguments["x"].element_size()
    operands = min(2, arguments["TILES"])
    return operands * tile * block * element, tile * tile * max(4, element) + 5 * tile * block * element


@tuned(("TILE", "TILES"), _needs)
@triton.jit(do_not_specialize=["eps"])
def gram_kernel(
    x,
    out,
    partials,
    inverse_norms,
    eps,
    samples,
    dim,
    split_dim,
    group_stride,
    sample_stride,
    out_row_stride,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PRECISION: tl.constexpr,
    TUNED_FOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write K and the inverse norms or, where `partials` is given, one split's part of K.

    The grid is `(groups * TILES², splits)`; `partials` is `(splits, groups, TILES * (TILES + 1) / 2, TILE, TILE)`.
    """
    group = (tl.program_id(0) // (TILES * TILES)).to(tl.int64)
    row = tl.program_id(0) // TILES % TILES
    column = tl.program_id(0) % TILES
    if column > row:
        return
    i = row * TILE + tl.arange(0, TILE)
    j = column * TILE + tl.arange(0, TILE)
    x += group * group_stride
    begin = tl.program_id(1) * split_dim
    end = tl.minimum(begin + split_dim, dim)
    sums = products(x, sample_stride, i, j, begin, end, samples, dim, TILES == 1, BLOCK, PRECISION)
    if partials is None:
        out += group * samples * out_row_stride
        if inverse_norms is not None:
            inverse_norms += group * samples
        _store(sums, i, j, row == column, out, inverse_norms, eps, samples, out_row_stride)
    else:
        groups = tl.num_programs(0) // (TILES * TILES)
        matrix = tl.program_id(1).to(tl.int64) * groups + group
        tile = matrix * (TILES * (TILES + 1) // 2) + row * (row + 1) // 2 + column
        square = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(partials + tile * (TILE * TILE) + square, sums)


@triton.jit(do_not_specialize=["eps"])
def sum_gram_kernel(
    out,
    partials,
    inverse_norms,
    eps,
    samples,
    splits,
    out_row_stride,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write K and the inverse norms from the parts of all splits. The grid is `(groups * TILES², TILE / ROWS)`."""
    group = (tl.program_id(0) // (TILES * TILES)).to(tl.int64)
    row = tl.program_id(0) // TILES % TILES
    column = tl.program_id(0) % TILES
    if column > row:
        return
    inside = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    groups = tl.num_programs(0) // (TILES * TILES)
    split_elements = groups.to(tl.int64) * (TILES * (TILES + 1) // 2 * TILE * TILE)
    tile = group * (TILES * (TILES + 1) // 2) + row * (row + 1) // 2 + column
    partials += tile * (TILE * TILE) + inside[:, None] * TILE + tl.arange(0, TILE)[None, :]
    sums = tl.zeros((ROWS, TILE), partials.dtype.element_ty)
    for _ in range(splits):
        sums += tl.load(partials)
        partials += split_elements
    out += group * samples * out_row_stride
    if inverse_norms is not None:
        inverse_norms += group * samples
    j = column * TILE + tl.arange(0, TILE)
    _store(sums, row * TILE + inside, j, row == column, out, inverse_norms, eps, samples, out_row_stride)


def gram(x: Tensor, out: Tensor, inverse_norms: Tensor | None = None, eps: float = 0.0) -> None:
    """Write K and, if wanted, the inverse norms.

    Args:
        x: X, `(groups, samples, dim)`.
        out: K, `(groups, samples, samples)`; its rows may be farther apart than `samples`.
        inverse_norms: `(groups, samples)`, contiguous.
        eps: The smallest norm.
    """
    groups, samples, dim = x.shape
    tile = runtime.product_tile(samples, x.dtype)
    tiles = triton.cdiv(samples, tile)
    triangles = groups * tiles * (tiles + 1) // 2
    splits, split_dim = runtime.split_reduction(dim, triangles, tile, x.device)
    partials = x.new_empty((splits, triangles, tile, tile), dtype=compute_dtype(x)) if splits > 1 else None
    results = out, partials, inverse_norms, runtime.bits(eps), samples
    runtime.launch(
        gram_kernel,
        out,
        (groups * tiles**2, splits),
        x,
        *results,
        dim,
        split_dim,
        *x.stride()[:2],
        out.stride(1),
        TILE=tile,
        TILES=tiles,
        PRECISION=runtime.precision(x),
        TUNED_FOR=tuning_class(x),
    )
    if partials is not None:
        rows = min(tile, max(1, 512 // tile))
        grid = groups * tiles**2, tile // rows
        constants = {"TILE": tile, "TILES": tiles, "ROWS": rows}
        runtime.launch(sum_gram_kernel, out, grid, *results, splits, out.stride(1), **constants)

"""Gram matrices K = X Xᵀ: tiles of the lower triangle over splits of the features, then sums in a fixed order."""

from __future__ import annotations

from collections.abc import Sequence

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
@triton.jit(do_not_specialize=["eps", "stage", "matrix"])
def gram_kernel(
    x,
    out,
    partials,
    inverse_norms,
    eps,
    stage,
    matrix,
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

    The grid is `(groups * TILES², splits)`; `partials` is `(stages, splits, groups, TILES * (TILES + 1) / 2, TILE,
    TILE)`, `inverse_norms` `(stages, groups, samples)` and `out` `(matrices, groups, samples, samples)`. Whole tensors
    are given, with the numbers of the `stage` and of its `matrix`: `torch.compile` would copy what a view belongs to.
    """
    groups = tl.num_programs(0) // (TILES * TILES)
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
        out += (matrix * groups + group) * samples * out_row_stride
        if inverse_norms is not None:
            inverse_norms += (stage * groups + group) * samples
        _store(sums, i, j, row == column, out, inverse_norms, eps, samples, out_row_stride)
    else:
        split = (stage * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
        tile = (split * groups + group) * (TILES * (TILES + 1) // 2) + row * (row + 1) // 2 + column
        square = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(partials + tile * (TILE * TILE) + square, sums)


@triton.jit(do_not_specialize=["eps"])
def sum_grams_kernel(
    students,
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
    """Write K and the inverse norms of all stages from the parts of all splits.

    The grid is `(groups * TILES², TILE / ROWS, stages)`. K of the last stage goes to `out`, the others to `students`
    `(stages - 1, groups, samples, samples)`, which is None if there are none. `inverse_norms` is
    `(stages, groups, samples)`.
    """
    group = (tl.program_id(0) // (TILES * TILES)).to(tl.int64)
    row = tl.program_id(0) // TILES % TILES
    column = tl.program_id(0) % TILES
    if column > row:
        return
    inside = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    groups = tl.num_programs(0) // (TILES * TILES)
    stage = tl.program_id(2)
    split_elements = groups.to(tl.int64) * (TILES * (TILES + 1) // 2 * TILE * TILE)
    tile = group * (TILES * (TILES + 1) // 2) + row * (row + 1) // 2 + column
    partials += stage * splits * split_elements
    partials += tile * (TILE * TILE) + inside[:, None] * TILE + tl.arange(0, TILE)[None, :]
    sums = tl.zeros((ROWS, TILE), partials.dtype.element_ty)
    for _ in range(splits):
        sums += tl.load(partials)
        partials += split_elements
    i = row * TILE + inside
    j = column * TILE + tl.arange(0, TILE)
    matrix = stage * groups + group
    if inverse_norms is not None:
        inverse_norms += matrix * samples
    if stage == tl.num_programs(2) - 1:
        out += group * samples * out_row_stride
        _store(sums, i, j, row == column, out, inverse_norms, eps, samples, out_row_stride)
    elif students is not None:
        students += matrix * samples * samples
        _store(sums, i, j, row == column, students, inverse_norms, eps, samples, samples)


def gram(x: Tensor, out: Tensor) -> None:
    """Write K, `(groups, samples, samples)`, of X, `(groups, samples, dim)`."""
    grams([x], None, out, None, 0.0)


def grams(
    stages: Sequence[Tensor], students: Tensor | None, out: Tensor, inverse_norms: Tensor | None, eps: float
) -> None:
    """Write K of all stages and, if wanted, the inverse norms. One launch adds up the parts of all stages.

    Args:
        stages: X of each stage, `(groups, samples, dim)`.
        students: K of all stages but the last one, `(stages - 1, groups, samples, samples)`; None if there are none.
        out: K of the last stage, `(groups, samples, samples)`; its rows may be farther apart than `samples`.
        inverse_norms: `(stages, groups, samples)`, contiguous.
        eps: The smallest norm.
    """
    groups, samples, _ = out.shape
    last = len(stages) - 1
    tile = min(runtime.product_tile(samples, x.dtype) for x in stages)
    tiles = triton.cdiv(samples, tile)
    triangles = groups * tiles * (tiles + 1) // 2
    splits, _ = runtime.split_reduction(max(x.shape[2] for x in stages), triangles, tile, out.device)
    partials = None
    if splits > 1:
        partials = out.new_empty((len(stages), splits, triangles, tile, tile), dtype=compute_dtype(*stages))
    for k, x in enumerate(stages):
        result = out if k == last else students
        runtime.launch(
            gram_kernel,
            result,
            (groups * tiles**2, splits),
            x,
            result,
            partials,
            inverse_norms,
            runtime.bits(eps),
            k,
            0 if k == last else k,
            samples,
            x.shape[2],
            triton.cdiv(triton.cdiv(x.shape[2], splits), 256) * 256,
            *x.stride()[:2],
            result.stride(-2),
            TILE=tile,
            TILES=tiles,
            PRECISION=runtime.precision(x),
            TUNED_FOR=tuning_class(x),
        )
    if partials is not None:
        rows = min(tile, max(1, 512 // tile))
        grid = groups * tiles**2, tile // rows, len(stages)
        arguments = students, out, partials, inverse_norms, runtime.bits(eps), samples, splits, out.stride(1)
        runtime.launch(sum_grams_kernel, out, grid, *arguments, TILE=tile, TILES=tiles, ROWS=rows)

"""The loss on tiles of S and T that are computed, used and discarded, for N x N matrices too large to keep."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from icsd.ops.contract import Spec
from icsd.ops.triton import runtime
from icsd.ops.triton.kernels.features import Features
from icsd.ops.triton.kernels.losses import (
    as_columns,
    as_rows,
    empty_rows,
    gradients,
    in_loss,
    load_statistics,
    loss_constants,
    loss_parameters,
    merge_rows,
    store_rows,
    store_summary,
    update_rows,
)
from icsd.ops.triton.kernels.norms import is_clamped, similarity
from icsd.ops.triton.kernels.products import products, real
from icsd.ops.triton.kernels.tuning import tuned, tuning_class

FEWEST_TILES = 16  # in a split: fewer would be too little work beside what a program writes and another one merges


def _tile(samples: int, dtype: torch.dtype) -> int:
    """Return the size of a tile, of which S and T are in registers together."""
    return runtime.tile_size(samples, 32 if dtype == torch.float64 else 64)


def _needs(arguments, block: int) -> tuple[int, int]:
    tile, element = arguments["TILE"], arguments["student"].x.element_size()
    return 2 * tile * block * element, 4 * tile * tile * max(4, element) + 5 * tile * block * element


@triton.jit
def _similarities(features, group, i, j, samples, dtype, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Return a tile of S or T."""
    dim = features.dim
    x = features.x + group * features.group_stride
    k = products(x, features.sample_stride, i, j, 0, dim, samples, dim, False, BLOCK, PRECISION).to(dtype)
    inverse_norms = features.inverse_norms + group * features.norms_group_stride
    r_i = tl.load(inverse_norms + i, mask=i < samples, other=0.0)
    r_j = tl.load(inverse_norms + j, mask=j < samples, other=0.0)
    return similarity(k, r_i, r_j)


@tuned(("TILE",), _needs)
@triton.jit(do_not_specialize=["weight", "first", "second"])
def streamed_forward_kernel(
    student,
    teacher,
    values,
    statistics,
    summaries,
    weight,
    first,
    second,
    samples,
    split_samples,
    values_group_stride,
    statistics_group_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    TUNED_FOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write what every row adds to the loss, `(groups, samples)`, and its statistics, from `Features`.

    Or, where `summaries` `(splits, groups, 5, samples)` is given, write the summary of every row over the columns of
    one split. The grid is `(groups * ceil(samples / TILE), splits)`.
    """
    blocks = tl.cdiv(samples, TILE)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * TILE + tl.arange(0, TILE)
    dtype: tl.constexpr = values.dtype.element_ty
    first, second = real(first, dtype), real(second, dtype)
    rows = empty_rows(TILE, dtype)
    begin = 0
    end = samples
    if summaries is not None:
        begin = tl.program_id(1) * split_samples
        end = tl.minimum(begin + split_samples, samples)
    for start in range(begin, end, TILE):
        j = start + tl.arange(0, TILE)
        s = _similarities(student, group, i, j, samples, dtype, BLOCK, PRECISION)
        t = _similarities(teacher, group, i, j, samples, dtype, BLOCK, PRECISION)
        rows = update_rows(rows, s, t, in_loss(i, j, samples, DIAGONAL), first, second, LOSS)
    if summaries is not None:
        groups = tl.num_programs(0) // blocks
        summaries += (tl.program_id(1).to(tl.int64) * groups + group) * 5 * samples
        store_summary(rows, i, summaries, samples)
    else:
        if statistics is not None:
            statistics += group * statistics_group_stride
        values += group * values_group_stride
        store_rows(rows, i, values, statistics, real(weight, dtype), samples, LOSS, DIAGONAL)


@triton.jit(do_not_specialize=["weight", "first", "second"])
def merge_splits_kernel(
    summaries,
    values,
    statistics,
    weight,
    first,
    second,
    samples,
    splits,
    values_group_stride,
    statistics_group_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write what every row adds to the loss, and its statistics, from the summaries of all splits, in their order.

    The grid is `(groups * ceil(samples / ROWS),)`.
    """
    blocks = tl.cdiv(samples, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    groups = tl.num_programs(0) // blocks
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = values.dtype.element_ty
    first, second = real(first, dtype), real(second, dtype)
    rows = empty_rows(ROWS, dtype)
    summaries += group * 5 * samples
    for _ in range(splits):
        rows = merge_rows(rows, load_statistics(summaries, i, samples, dtype), first, second, LOSS)
        summaries += groups.to(tl.int64) * 5 * samples
    if statistics is not None:
        statistics += group * statistics_group_stride
    values += group * values_group_stride
    store_rows(rows, i, values, statistics, real(weight, dtype), samples, LOSS, DIAGONAL)


def streamed_forward(
    student: Features, teacher: Features, values: Tensor, statistics: Tensor | None, weight: float, spec: Spec
) -> None:
    """Write what every row adds to the loss, `(groups, samples)`, and its statistics, `(groups, 5, samples)`."""
    if not values.numel():
        return
    groups, samples, _ = student.x.shape
    tile = _tile(samples, values.dtype)
    row_blocks, column_tiles = groups * triton.cdiv(samples, tile), triton.cdiv(samples, tile)
    splits = max(1, min(2 * runtime.processors(values.device) // row_blocks, column_tiles // FEWEST_TILES))
    split_samples = triton.cdiv(column_tiles, splits) * tile
    splits = triton.cdiv(samples, split_samples)
    summaries = values.new_empty((splits, groups, 5, samples)) if splits > 1 else None
    parameters = runtime.bits(weight), *loss_parameters(spec), samples
    strides = values.stride(0), 0 if statistics is None else statistics.stride(0)
    runtime.launch(
        streamed_forward_kernel,
        values,
        (row_blocks, splits),
        student,
        teacher,
        values,
        statistics,
        summaries,
        *parameters,
        split_samples,
        *strides,
        **loss_constants(spec),
        TILE=tile,
        PRECISION=runtime.precision(student.x),
        TUNED_FOR=tuning_class(student.x, teacher.x),
    )
    if summaries is not None:
        grid = (groups * triton.cdiv(samples, 128),)
        arguments = summaries, values, statistics, *parameters, splits, *strides
        runtime.launch(merge_splits_kernel, values, grid, *arguments, **loss_constants(spec), ROWS=128)


@tuned(("ADD", "TILE"), _needs)
@triton.jit(do_not_specialize=["weight", "first", "second", "eps"])
def streamed_backward_kernel(
    student,
    teacher,
    statistics,
    row_block,
    projections,
    weight,
    first,
    second,
    eps,
    samples,
    begin,
    rows,
    statistics_group_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TEACHER: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    TUNED_FOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the rows of A from `begin` on, of the student or the `TEACHER`, except for the projections on the diagonal.

    The grid is `(groups * ceil(rows / TILE) * ceil(samples / TILE),)`. `row_block` is `(groups, rows, samples + 1)`,
    written or added to; `projections` is `(groups, ceil(samples / TILE), rows)`, each tile's part of them.
    """
    columns = tl.cdiv(samples, TILE)
    blocks = tl.cdiv(rows, TILE) * columns
    group = (tl.program_id(0) // blocks).to(tl.int64)
    inside = tl.program_id(0) % blocks // columns * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) % columns
    i = begin + inside
    j = column * TILE + tl.arange(0, TILE)
    dtype: tl.constexpr = row_block.dtype.element_ty
    first, second, weight, eps = real(first, dtype), real(second, dtype), real(weight, dtype), real(eps, dtype)
    s = _similarities(student, group, i, j, samples, dtype, BLOCK, PRECISION)
    t = _similarities(teacher, group, i, j, samples, dtype, BLOCK, PRECISION)
    if statistics is not None:
        statistics += group * statistics_group_stride
    own = as_columns(load_statistics(statistics, i, samples, dtype))
    other = as_rows(load_statistics(statistics, j, samples, dtype))
    g_s, g_t = gradients(s, t, own, other, samples, first, second, LOSS, DIAGONAL, TEACHER)
    if TEACHER:
        g, similarity = g_t, t
        inverse_norms = teacher.inverse_norms + group * teacher.norms_group_stride
    else:
        g, similarity = g_s, s
        inverse_norms = student.inverse_norms + group * student.norms_group_stride
    r_i = tl.load(inverse_norms + i, mask=i < samples, other=0.0)
    r_j = tl.load(inverse_norms + j, mask=j < samples, other=0.0)
    g = tl.where(in_loss(i, j, samples, DIAGONAL), g * weight, 0.0)
    diagonal = i[:, None] == j[None, :]
    a = tl.where(diagonal & ~is_clamped(r_i, eps)[:, None], 0.0, g * r_j[None, :])
    mask = (inside[:, None] < rows) & (j[None, :] < samples)
    row_block += (group * rows + inside[:, None]) * (samples + 1) + j[None, :]
    projections += (group * columns + column) * rows + inside
    projection = tl.sum(tl.where(diagonal, 0.0, g * similarity), axis=1)
    if ADD:
        a += tl.load(row_block, mask=mask, other=0.0)
        projection += tl.load(projections, mask=inside < rows, other=0.0)
    tl.store(row_block, a, mask=mask)
    tl.store(projections, projection, mask=inside < rows)


def streamed_backward(
    student: Features,
    teacher: Features,
    statistics: Tensor | None,
    row_block: Tensor,
    projections: Tensor,
    begin: int,
    weight: float,
    spec: Spec,
    *,
    of_teacher: bool,
    add: bool,
) -> None:
    """Write rows of A, of a student or of its teacher, or add them to what another student gave the teacher.

    Args:
        student: The student.
        teacher: The teacher.
        statistics: Those of the student's rows, `(groups, 5, samples)`; None for a loss without.
        row_block: The rows from `begin` on, `(groups, rows, samples + 1)`.
        projections: Tensors that `finish_row_block` completes them with, of the shape of `new_projections`.
        begin: The first row.
        weight: Weight of the student.
        spec: The distillation.
        of_teacher: Write the teacher's A.
        add: Add to what the row block holds.
    """
    groups, rows, _ = row_block.shape
    samples = student.x.shape[1]
    tile = _tile(samples, row_block.dtype)
    runtime.launch(
        streamed_backward_kernel,
        row_block,
        (groups * triton.cdiv(rows, tile) * triton.cdiv(samples, tile),),
        student,
        teacher,
        statistics,
        row_block,
        projections,
        runtime.bits(weight),
        *loss_parameters(spec),
        runtime.bits(spec.eps),
        samples,
        begin,
        rows,
        0 if statistics is None else statistics.stride(0),
        **loss_constants(spec),
        TEACHER=of_teacher,
        ADD=add,
        TILE=tile,
        PRECISION=runtime.precision(student.x),
        TUNED_FOR=tuning_class(student.x, teacher.x),
    )


@triton.jit(do_not_specialize=["eps"])
def finish_row_block_kernel(row_block, projections, features, eps, samples, begin, rows, columns, ROWS: tl.constexpr):
    """Write the projections and, in the last column, the inverse norms. The grid is `(groups * ceil(rows / ROWS),)`."""
    blocks = tl.cdiv(rows, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    inside = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    mask = inside < rows
    dtype: tl.constexpr = row_block.dtype.element_ty
    projections += group * columns * rows + inside
    projection = tl.zeros((ROWS,), dtype)
    for _ in range(columns):
        projection += tl.load(projections, mask=mask, other=0.0)
        projections += rows
    inverse_norms = features.inverse_norms + group * features.norms_group_stride + begin + inside
    r = tl.load(inverse_norms, mask=mask, other=0.0)
    row_block += (group * rows + inside) * (samples + 1)
    tl.store(row_block + begin + inside, -projection * r, mask=mask & ~is_clamped(r, real(eps, dtype)))
    tl.store(row_block + samples, r, mask=mask)


def finish_row_block(row_block: Tensor, projections: Tensor, features: Features, begin: int, eps: float) -> None:
    """Complete the rows of `streamed_backward` for the stage of these `features`."""
    groups, rows, _ = row_block.shape
    samples, columns = features.x.shape[1], projections.shape[1]
    grid = (groups * triton.cdiv(rows, 128),)
    arguments = row_block, projections, features, runtime.bits(eps), samples, begin, rows, columns
    runtime.launch(finish_row_block_kernel, row_block, grid, *arguments, ROWS=128)


def new_projections(row_block: Tensor) -> Tensor:
    """Return memory for the projections of a row block."""
    groups, rows, columns = row_block.shape
    samples = columns - 1
    return row_block.new_empty((groups, triton.cdiv(samples, _tile(samples, row_block.dtype)), rows))

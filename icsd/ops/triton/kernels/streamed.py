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
    summarize,
    update_rows,
)
from icsd.ops.triton.kernels.norms import is_clamped, similarity
from icsd.ops.triton.kernels.products import products, real
from icsd.ops.triton.kernels.tuning import tuned, tuning_class

FEWEST_TILES = 16  # in a split: fewer would be too little work beside what a program writes and another one merges
SUMMARY_BYTES = 1 << 26  # of the columns of tiles, which are kept until they are merged


def _tile(samples: int, dtype: torch.dtype) -> int:
    """Return the size of a tile, of which S and T are in registers together."""
    return runtime.tile_size(samples, 32 if dtype == torch.float64 else 64)


def _needs(arguments, block: int) -> tuple[int, int]:
    tile, element = arguments["TILE"], arguments["student"].x.element_size()
    number = max(4, element)
    columns, summaries = tile, 0
    if "COLUMNS" in arguments:  # the forward pass, with ten numbers of each row and column, which several threads hold
        columns = arguments["COLUMNS"]
        summaries = 40 * (tile + columns) * number
    held = 4 * tile * columns * number + 5 * tile * block * element
    return (tile + columns) * block * element, held + summaries


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
@triton.jit(do_not_specialize=["first", "second", "begin", "blocks"])
def streamed_forward_kernel(
    student,
    teacher,
    own,
    mirrored,
    first,
    second,
    samples,
    begin,
    blocks,
    split_samples,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TUNED_FOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Summarize tiles of the lower triangle of S and T, from `Features`, by their rows and by their columns.

    A program goes through the tiles of one row block in one split of the columns. The summaries of its rows go to
    `own`, `(splits, groups, 5, samples)`; those of the columns of each tile beside the diagonal, which are rows of the
    mirror image, to `mirrored`, `(blocks, groups, 5, samples)`. The row blocks are the `blocks` from `begin` on, the
    longest one first. The grid is `(groups * blocks, splits)`.
    """
    groups = tl.num_programs(0) // blocks
    group = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks
    row_start = (begin + block) * TILE
    split = tl.program_id(1)
    if split * split_samples > row_start:
        return
    i = row_start + tl.arange(0, TILE)
    dtype: tl.constexpr = own.dtype.element_ty
    first, second = real(first, dtype), real(second, dtype)
    mirrored += (block.to(tl.int64) * groups + group) * 5 * samples
    rows = empty_rows(TILE, dtype)
    for start in range(split * split_samples, tl.minimum((split + 1) * split_samples, row_start + TILE), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        s = _similarities(student, group, i, j, samples, dtype, BLOCK, PRECISION)
        t = _similarities(teacher, group, i, j, samples, dtype, BLOCK, PRECISION)
        mask = in_loss(i, j, samples, DIAGONAL)
        rows = update_rows(rows, s, t, mask, first, second, LOSS)
        if start < row_start:
            store_summary(summarize(s, t, mask, first, second, LOSS, 0), j, mirrored, samples)
    store_summary(rows, i, own + (split.to(tl.int64) * groups + group) * 5 * samples, samples)


@triton.jit(do_not_specialize=["weight", "first", "second", "begin", "end"])
def merge_triangle_kernel(
    own,
    mirrored,
    merged,
    values,
    statistics,
    weight,
    first,
    second,
    samples,
    begin,
    end,
    split_samples,
    values_group_stride,
    statistics_group_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Merge the summaries that `streamed_forward_kernel` made of row blocks from `begin` to `end`, in a fixed order.

    Rows before `begin` go on from their summary in `merged`, `(groups, 5, samples)`. After the last row block, the
    kernel writes the part of every row in the loss, `(groups, samples)`, and the statistics of the rows; before it, the
    kernel writes `merged`. The grid is `(groups * end,)`.
    """
    groups = tl.num_programs(0) // end
    group = (tl.program_id(0) // end).to(tl.int64)
    block = tl.program_id(0) % end
    i = block * TILE + tl.arange(0, TILE)
    dtype: tl.constexpr = values.dtype.element_ty
    first, second = real(first, dtype), real(second, dtype)
    step = groups.to(tl.int64) * 5 * samples
    rows = empty_rows(TILE, dtype)
    if block < begin:
        rows = load_statistics(merged + group * 5 * samples, i, samples, dtype)
    else:
        own += group * 5 * samples
        for _ in range(block * TILE // split_samples + 1):
            rows = merge_rows(rows, load_statistics(own, i, samples, dtype), first, second, LOSS)
            own += step
    below = tl.maximum(block + 1, begin)
    mirrored += (below - begin) * step + group * 5 * samples
    for _ in range(below, end):
        rows = merge_rows(rows, load_statistics(mirrored, i, samples, dtype), first, second, LOSS)
        mirrored += step
    if end * TILE < samples:
        store_summary(rows, i, merged + group * 5 * samples, samples)
    else:
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
    columns = max(16, tile // 2)  # with as many as rows, the summaries of both sides would spill
    blocks = triton.cdiv(samples, tile)
    splits = max(1, min(2 * runtime.processors(values.device) // (groups * blocks), blocks // FEWEST_TILES))
    split_samples = triton.cdiv(blocks, splits) * tile
    merged = values.new_empty((groups, 5, samples))
    most = min(blocks, max(1, SUMMARY_BYTES // (merged.numel() * merged.itemsize)))
    own, mirrored = (merged.new_empty((number, *merged.shape)) for number in (splits, most))
    parameters, constants = loss_parameters(spec), loss_constants(spec)
    strides = values.stride(0), 0 if statistics is None else statistics.stride(0)
    for begin in range(0, blocks, most):
        end = min(begin + most, blocks)
        runtime.launch(
            streamed_forward_kernel,
            values,
            (groups * (end - begin), splits),
            student,
            teacher,
            own,
            mirrored,
            *parameters,
            samples,
            begin,
            end - begin,
            split_samples,
            **constants,
            TILE=tile,
            COLUMNS=columns,
            PRECISION=runtime.precision(student.x),
            TUNED_FOR=tuning_class(student.x, teacher.x),
        )
        runtime.launch(
            merge_triangle_kernel,
            values,
            (groups * end,),
            own,
            mirrored,
            merged,
            values,
            statistics,
            runtime.bits(weight),
            *parameters,
            samples,
            begin,
            end,
            split_samples,
            *strides,
            **constants,
            TILE=tile,
        )


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
    written or added to; `projections` is `(groups, ceil(samples / TILE), rows)`, each tile's part of them. `begin` is a
    multiple of `TILE`. A tile whose mirror image is among these rows, too, is computed once, below the diagonal.
    """
    columns = tl.cdiv(samples, TILE)
    blocks = tl.cdiv(rows, TILE) * columns
    group = (tl.program_id(0) // blocks).to(tl.int64)
    first_tile = begin // TILE
    row = first_tile + tl.program_id(0) % blocks // columns
    column = tl.program_id(0) % columns
    if (column > row) & (column < first_tile + tl.cdiv(rows, TILE)):
        return
    i = row * TILE + tl.arange(0, TILE)
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
    projection = tl.where(diagonal, 0.0, g * similarity)
    row_block += group * rows * (samples + 1)
    projections += group * columns * rows
    inside = i - begin
    at = row_block + inside[:, None].to(tl.int64) * (samples + 1) + j[None, :]
    _put(at, a, (inside[:, None] < rows) & (j[None, :] < samples), ADD)
    _put(projections + column.to(tl.int64) * rows + inside, tl.sum(projection, axis=1), inside < rows, ADD)
    if (column >= first_tile) & (column < row):
        inside = j - begin
        at = row_block + inside[None, :].to(tl.int64) * (samples + 1) + i[:, None]
        _put(at, g * r_i[:, None], i[:, None] < samples, ADD)
        _put(projections + row.to(tl.int64) * rows + inside, tl.sum(projection, axis=0), inside < rows, ADD)


@triton.jit
def _put(pointers, values, mask, ADD: tl.constexpr):
    """Write values, or add them to what is there."""
    if ADD:
        values += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, values, mask=mask)


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

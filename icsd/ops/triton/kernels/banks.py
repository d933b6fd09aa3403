"""The loss and the gradients of similarities to banks, on tiles that are computed, used and discarded.

The similarities of N queries to the M samples of a bank are a rectangle without symmetry. Its long side is divided
into splits, so that few queries fill a device, too; what the splits give is added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

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
    gradients_to_banks,
    load_statistics,
    loss_parameters,
    merge_rows,
    store_rows,
    store_summary,
    update_rows,
)
from icsd.ops.triton.kernels.norms import similarity
from icsd.ops.triton.kernels.products import multiply_add, real, sum_dtype
from icsd.ops.triton.kernels.tuning import tuned, tuning_class

COLUMNS = 32  # of a tile of S and T
FEWEST_TILES = 8  # in a split: fewer would be too little work beside what a program writes
# The largest dimension of features whose gradient is wanted: a program keeps it for all samples of its tile.
LARGEST_DIM = {torch.float32: 512, torch.float64: 256}


class Operands(NamedTuple):
    """The features of student and teacher on one side of the similarities: the queries or the banks."""

    student: Features
    teacher: Features

    @property
    def groups(self) -> int:
        return self.student.x.shape[0]

    @property
    def samples(self) -> int:
        return self.student.x.shape[1]


@triton.jit
def _similarities(own, other, group, i, j, rows, columns, dtype, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """Return the similarities of the samples i of one tensor to the samples j of another one."""
    dim = own.dim
    x = own.x + group * own.group_stride + i[:, None].to(tl.int64) * own.sample_stride
    y = other.x + group * other.group_stride + j[None, :].to(tl.int64) * other.sample_stride
    alike: tl.constexpr = own.x.dtype.element_ty == other.x.dtype.element_ty
    sums = tl.zeros((i.shape[0], j.shape[0]), sum_dtype(own.x.dtype.element_ty) if alike else dtype)
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        a = tl.load(x + d[None, :], mask=(i[:, None] < rows) & (d[None, :] < dim), other=0.0)
        b = tl.load(y + d[:, None], mask=(j[None, :] < columns) & (d[:, None] < dim), other=0.0)
        sums = multiply_add(a, b, sums, PRECISION)
    r_i = tl.load(own.inverse_norms + group * own.norms_group_stride + i, mask=i < rows, other=0.0)
    r_j = tl.load(other.inverse_norms + group * other.norms_group_stride + j, mask=j < columns, other=0.0)
    return similarity(sums.to(dtype), r_i, r_j)


def _needs_of_summaries(arguments, block: int) -> tuple[int, int]:
    return _operands(arguments, arguments["queries"], block)


def _needs_of_gradients(arguments, block: int) -> tuple[int, int]:
    buffer, held = _operands(arguments, arguments["own"], block)
    element = arguments["partials"].element_size()
    return buffer, held + arguments["ROWS"] * arguments["DIM"] * element


def _operands(arguments, own: tuple[Features, Features], block: int) -> tuple[int, int]:
    """Return the bytes of a buffer in shared memory and of sums and operands in registers, for tiles of S and T."""
    rows, columns, element = arguments["ROWS"], arguments["COLUMNS"], own[0].x.element_size()
    operands = (rows + columns) * block * element
    return operands, 2 * rows * columns * max(4, element) + 4 * operands


@tuned(("ROWS",), _needs_of_summaries)
@triton.jit(do_not_specialize=["first", "second"])
def bank_summaries_kernel(
    queries,
    banks,
    summaries,
    first,
    second,
    samples,
    bank_samples,
    split_samples,
    LOSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TUNED_FOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the summary of every row of S and T over one split of the banks, `(splits, groups, 5, samples)`.

    The grid is `(groups * ceil(samples / ROWS), splits)`.
    """
    blocks = tl.cdiv(samples, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = summaries.dtype.element_ty
    first, second = real(first, dtype), real(second, dtype)
    rows = empty_rows(ROWS, dtype)
    begin = tl.program_id(1) * split_samples
    for start in range(begin, tl.minimum(begin + split_samples, bank_samples), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        s = _similarities(queries[0], banks[0], group, i, j, samples, bank_samples, dtype, BLOCK, PRECISION)
        t = _similarities(queries[1], banks[1], group, i, j, samples, bank_samples, dtype, BLOCK, PRECISION)
        mask = (i[:, None] < samples) & (j[None, :] < bank_samples)
        rows = update_rows(rows, s, t, mask, first, second, LOSS)
    groups = tl.num_programs(0) // blocks
    store_summary(rows, i, summaries + (tl.program_id(1).to(tl.int64) * groups + group) * 5 * samples, samples)


@tuned(("OF_BANK", "ROWS", "DIM"), _needs_of_gradients)
@triton.jit(do_not_specialize=["first", "second", "scale"])
def bank_gradients_kernel(
    own,
    other,
    statistics,
    summaries,
    partials,
    first,
    second,
    scale,
    samples,
    other_samples,
    split_samples,
    LOSS: tl.constexpr,
    OF_BANK: tl.constexpr,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    TUNED_FOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient with respect to the samples of one side at norm 1, over one split of the other side.

    The grid is `(groups * ceil(samples / ROWS), splits)`. `own` and `other` are queries and banks or, if `OF_BANK`, the
    other way round. The gradient is that of the student's features or of the `TEACHER`'s. `partials` is
    `(splits, groups, samples, dim)`, `statistics` those of the queries `(groups, 5, queries)` or None. `summaries`,
    where it is given, gets the summary of every row, as in `bank_summaries_kernel`.
    """
    blocks = tl.cdiv(samples, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    dtype: tl.constexpr = partials.dtype.element_ty
    first, second, scale = real(first, dtype), real(second, dtype), real(scale, dtype)
    side: tl.constexpr = 1 if TEACHER else 0
    compared = other[side]
    dim = compared.dim
    y = compared.x + group * compared.group_stride + d[None, :]
    inverse_norms = compared.inverse_norms + group * compared.norms_group_stride
    if statistics is not None:
        statistics += group * 5 * (other_samples if OF_BANK else samples)
    of_row = as_columns(load_statistics(None if OF_BANK else statistics, i, samples, dtype))
    rows = empty_rows(ROWS, dtype)
    gradient = tl.zeros((ROWS, DIM), dtype)
    begin = tl.program_id(1) * split_samples
    for start in range(begin, tl.minimum(begin + split_samples, other_samples), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        s = _similarities(own[0], other[0], group, i, j, samples, other_samples, dtype, BLOCK, PRECISION)
        t = _similarities(own[1], other[1], group, i, j, samples, other_samples, dtype, BLOCK, PRECISION)
        mask = (i[:, None] < samples) & (j[None, :] < other_samples)
        if summaries is not None:
            rows = update_rows(rows, s, t, mask, first, second, LOSS)
        if OF_BANK:
            of_query = as_rows(load_statistics(statistics, j, other_samples, dtype))
            g = gradients_to_banks(s, t, of_query, scale, first, second, LOSS, TEACHER)[side]
        else:
            g = gradients_to_banks(s, t, of_row, scale, first, second, LOSS, TEACHER)[side]
        r = tl.load(inverse_norms + j, mask=j < other_samples, other=0.0)
        g = tl.where(mask, g, 0.0) * r[None, :]
        inside = (j[:, None] < other_samples) & (d[None, :] < dim)
        b = tl.load(y + j[:, None].to(tl.int64) * compared.sample_stride, mask=inside, other=0.0)
        gradient = multiply_add(g, b, gradient, PRECISION)
    split = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // blocks) + group
    partials += (split * samples + i[:, None]) * dim + d[None, :]
    tl.store(partials, gradient, mask=(i[:, None] < samples) & (d[None, :] < dim))
    if summaries is not None:
        store_summary(rows, i, summaries + split * 5 * samples, samples)


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


def _splits(own: Operands, other: Operands, rows: int, columns: int) -> tuple[int, int]:
    """Return the splits of the other side, and the samples of each."""
    device = own.student.x.device
    programs, tiles = own.groups * triton.cdiv(own.samples, rows), triton.cdiv(other.samples, columns)
    splits = max(1, min(2 * runtime.processors(device) // programs, tiles // FEWEST_TILES))
    split_samples = triton.cdiv(tiles, splits) * columns
    return triton.cdiv(other.samples, split_samples), split_samples


def bank_summaries(queries: Operands, banks: Operands, spec: Spec, dtype: torch.dtype) -> Tensor:
    """Return the summaries of every row of S and T, `(splits, groups, 5, samples)`."""
    precision = runtime.precision(queries.student.inverse_norms)
    rows = runtime.tile_size(queries.samples, 32 if precision == "ieee" else 64)  # of a chip without tensor cores, too
    splits, split_samples = _splits(queries, banks, rows, COLUMNS)
    summaries = queries.student.x.new_empty((splits, queries.groups, 5, queries.samples), dtype=dtype)
    runtime.launch(
        bank_summaries_kernel,
        summaries,
        (queries.groups * triton.cdiv(queries.samples, rows), splits),
        tuple(queries),
        tuple(banks),
        summaries,
        *loss_parameters(spec),
        queries.samples,
        banks.samples,
        split_samples,
        LOSS=spec.loss,
        ROWS=rows,
        COLUMNS=COLUMNS,
        PRECISION=precision,
        TUNED_FOR=tuning_class(*(features.x for features in queries)),
    )
    return summaries


def merge_summaries(summaries: Tensor, bank_samples: int, spec: Spec) -> tuple[Tensor, Tensor | None]:
    """Return what every row adds to the loss, `(groups, samples)`, and the statistics of `kl`, `(groups, 5, samples)`.

    They come from the summaries of all splits, in their order.
    """
    splits, groups, _, samples = summaries.shape
    values = summaries.new_empty((groups, samples))
    statistics = summaries.new_empty((groups, 5, samples)) if spec.loss == "kl" else None
    # The kernel divides sums over rows by the number of rows, and sums over elements by its square.
    weight = 1.0 if spec.loss == "kl" else samples / bank_samples
    runtime.launch(
        merge_splits_kernel,
        values,
        (groups * triton.cdiv(samples, 128),),
        summaries,
        values,
        statistics,
        runtime.bits(weight),
        *loss_parameters(spec),
        samples,
        splits,
        values.stride(0),
        5 * samples,
        LOSS=spec.loss,
        DIAGONAL=True,
        ROWS=128,
    )
    return values, statistics


def bank_gradients(
    own: Operands,
    other: Operands,
    statistics: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
    *,
    of_bank: bool,
    of_teacher: bool,
    with_summaries: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradient with respect to samples at norm 1, `(groups, samples, dim)`, and summaries if asked for.

    Args:
        own: The samples.
        other: Those that they are compared with.
        statistics: Those of the queries, for a loss that has some.
        spec: The loss.
        dtype: The dtype of the gradient.
        of_bank: True if the samples are those of the banks.
        of_teacher: True for the gradient of the teacher's features.
        with_summaries: True if the summaries of every row are wanted, too, see `bank_summaries`.
        out: Memory for the gradient. It is used if there is one split alone.
    """
    queries, bank_samples = (other.samples, own.samples) if of_bank else (own.samples, other.samples)
    dim = own[of_teacher].dim
    precision = runtime.precision(own.student.inverse_norms)
    rows, columns = _gradient_tile(dim, dtype, precision)
    rows = runtime.tile_size(own.samples, rows)
    splits, split_samples = _splits(own, other, rows, columns)
    if splits == 1 and out is not None and out.dtype == dtype:
        partials = out.unsqueeze(0)
    else:
        partials = own.student.x.new_empty((splits, own.groups, own.samples, dim), dtype=dtype)
    summaries = partials.new_empty((splits, own.groups, 5, own.samples)) if with_summaries else None
    terms = queries if spec.loss == "kl" else queries * bank_samples
    runtime.launch(
        bank_gradients_kernel,
        partials,
        (own.groups * triton.cdiv(own.samples, rows), splits),
        tuple(own),
        tuple(other),
        statistics,
        summaries,
        partials,
        *loss_parameters(spec),
        runtime.bits(1 / terms),
        own.samples,
        other.samples,
        split_samples,
        LOSS=spec.loss,
        OF_BANK=of_bank,
        TEACHER=of_teacher,
        ROWS=rows,
        COLUMNS=columns,
        DIM=max(64, runtime.tile_size(dim, LARGEST_DIM[dtype])),
        PRECISION=precision,
        TUNED_FOR=tuning_class(*(features.x for features in own)),
    )
    return partials[0] if splits == 1 else partials.sum(0), summaries


def _gradient_tile(dim: int, dtype: torch.dtype, precision: str) -> tuple[int, int]:
    """Return the rows and columns of a tile of S and T for which registers suffice.

    A program keeps the gradient of its rows and, in a product, the features of its columns.
    """
    if dtype == torch.float64:
        return 16, 16
    rows, columns = (64, COLUMNS) if 64 < dim <= 128 else (64, 16) if dim <= 256 else (32, 16)
    return (rows // 2 if precision == "ieee" else rows), columns

"""Tiles of S and T that are made, used and forgotten, for N x N matrices too large to keep."""

from __future__ import annotations

import triton
import triton.language as tl

from icsd.ops.triton.kernels.epilogue import above, beside, load_statistics, store_rows, takes_part
from icsd.ops.triton.kernels.losses import empty_rows, gradients, update_rows
from icsd.ops.triton.kernels.norms import is_clamped, similarity
from icsd.ops.triton.kernels.products import products, real
from icsd.ops.triton.kernels.tuning import tuned


def _needs(arguments, block: int) -> tuple[int, int]:
    side, element = arguments["SIDE"], arguments["student"].element_size()
    return 2 * side * block * element, 4 * side * side * max(4, element) + 5 * side * block * element


@triton.jit
def _similarities(
    x, norms, i, j, samples, features, sample_stride, dtype, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of S or T."""
    k = products(x, i, j, 0, features, samples, features, sample_stride, False, BLOCK, PRECISION).to(dtype)
    r_i = tl.load(norms + i, mask=i < samples, other=0.0)
    r_j = tl.load(norms + j, mask=j < samples, other=0.0)
    return similarity(k, r_i, r_j)


@tuned(("SIDE", "student_features", "teacher_features"), _needs)
@triton.jit(do_not_specialize=["weight", "first", "second"])
def measure_streamed(
    student,
    teacher,
    student_norms,
    teacher_norms,
    values,
    statistics,
    weight,
    first,
    second,
    samples,
    student_features,
    teacher_features,
    student_group_stride,
    student_sample_stride,
    teacher_group_stride,
    teacher_sample_stride,
    norms_group_stride,
    values_group_stride,
    statistics_group_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What every row adds to the loss, and its statistics, from features. Grid `(groups * ceil(samples / SIDE),)`."""
    blocks = tl.cdiv(samples, SIDE)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * SIDE + tl.arange(0, SIDE)
    dtype: tl.constexpr = values.dtype.element_ty
    first, second = real(first, dtype), real(second, dtype)
    student += group * student_group_stride
    teacher += group * teacher_group_stride
    student_norms += group * norms_group_stride
    teacher_norms += group * norms_group_stride
    rows = empty_rows(SIDE, dtype)
    for start in range(0, samples, SIDE):
        j = start + tl.arange(0, SIDE)
        s = _similarities(
            student, student_norms, i, j, samples, student_features, student_sample_stride, dtype, BLOCK, PRECISION
        )
        t = _similarities(
            teacher, teacher_norms, i, j, samples, teacher_features, teacher_sample_stride, dtype, BLOCK, PRECISION
        )
        rows = update_rows(rows, s, t, takes_part(i, j, samples, DIAGONAL), first, second, LOSS)
    if statistics is not None:
        statistics += group * statistics_group_stride
    values += group * values_group_stride
    store_rows(rows, i, values, statistics, real(weight, dtype), samples, LOSS)


@tuned(("ADD", "SIDE", "student_features", "teacher_features"), _needs)
@triton.jit(do_not_specialize=["weight", "first", "second", "eps"])
def differentiate_streamed(
    student,
    teacher,
    student_norms,
    teacher_norms,
    statistics,
    panel,
    projections,
    weight,
    first,
    second,
    eps,
    samples,
    student_features,
    teacher_features,
    begin,
    rows,
    student_group_stride,
    student_sample_stride,
    teacher_group_stride,
    teacher_sample_stride,
    norms_group_stride,
    statistics_group_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TEACHER: tl.constexpr,
    ADD: tl.constexpr,
    SIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A panel of rows of A, for the student or the `TEACHER`, but for the projections on its diagonal.

    Grid `(groups * ceil(rows / SIDE) * ceil(samples / SIDE),)`. `panel` is `(groups, rows, samples + 1)`, written or
    added to; `projections` `(groups, ceil(samples / SIDE), rows)` is what each tile knows of them.
    """
    columns = tl.cdiv(samples, SIDE)
    blocks = tl.cdiv(rows, SIDE) * columns
    group = (tl.program_id(0) // blocks).to(tl.int64)
    inside = tl.program_id(0) % blocks // columns * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(0) % columns
    i = begin + inside
    j = column * SIDE + tl.arange(0, SIDE)
    dtype: tl.constexpr = panel.dtype.element_ty
    first, second, weight, eps = real(first, dtype), real(second, dtype), real(weight, dtype), real(eps, dtype)
    student += group * student_group_stride
    teacher += group * teacher_group_stride
    student_norms += group * norms_group_stride
    teacher_norms += group * norms_group_stride
    s = _similarities(
        student, student_norms, i, j, samples, student_features, student_sample_stride, dtype, BLOCK, PRECISION
    )
    t = _similarities(
        teacher, teacher_norms, i, j, samples, teacher_features, teacher_sample_stride, dtype, BLOCK, PRECISION
    )
    if statistics is not None:
        statistics += group * statistics_group_stride
    own = beside(load_statistics(statistics, i, samples, dtype))
    other = above(load_statistics(statistics, j, samples, dtype))
    g_s, g_t = gradients(s, t, own, other, samples, first, second, LOSS, TEACHER)
    if TEACHER:
        g, similarity, norms = g_t, t, teacher_norms
    else:
        g, similarity, norms = g_s, s, student_norms
    r_i = tl.load(norms + i, mask=i < samples, other=0.0)
    r_j = tl.load(norms + j, mask=j < samples, other=0.0)
    g = tl.where(takes_part(i, j, samples, DIAGONAL), g * weight, 0.0)
    diagonal = i[:, None] == j[None, :]
    a = tl.where(diagonal & ~is_clamped(r_i, eps)[:, None], 0.0, g * r_j[None, :])
    mask = (inside[:, None] < rows) & (j[None, :] < samples)
    panel += (group * rows + inside[:, None]) * (samples + 1) + j[None, :]
    projections += (group * columns + column) * rows + inside
    projection = tl.sum(tl.where(diagonal, 0.0, g * similarity), axis=1)
    if ADD:
        a += tl.load(panel, mask=mask, other=0.0)
        projection += tl.load(projections, mask=inside < rows, other=0.0)
    tl.store(panel, a, mask=mask)
    tl.store(projections, projection, mask=inside < rows)


@triton.jit(do_not_specialize=["eps"])
def project_panel(
    panel,
    projections,
    norms,
    eps,
    samples,
    begin,
    rows,
    norms_group_stride,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The projections of a panel and, in its last column, the inverse norms. Grid `(groups * ceil(rows / ROWS),)`."""
    blocks = tl.cdiv(rows, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    inside = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    mask = inside < rows
    dtype: tl.constexpr = panel.dtype.element_ty
    columns = tl.cdiv(samples, SIDE)
    projections += group * columns * rows + inside
    projection = tl.zeros((ROWS,), dtype)
    for _ in range(columns):
        projection += tl.load(projections, mask=mask, other=0.0)
        projections += rows
    r = tl.load(norms + group * norms_group_stride + begin + inside, mask=mask, other=0.0)
    panel += (group * rows + inside) * (samples + 1)
    tl.store(panel + begin + inside, -projection * r, mask=mask & ~is_clamped(r, real(eps, dtype)))
    tl.store(panel + samples, r, mask=mask)

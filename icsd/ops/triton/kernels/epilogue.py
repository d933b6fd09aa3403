"""From the Gram matrices of a student and a teacher to the loss, and to the matrices of the gradients.

Every program takes whole rows; none writes what another reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from icsd.ops.triton.kernels.losses import empty_rows, gradients, row_statistics, row_values, update_rows
from icsd.ops.triton.kernels.norms import is_clamped, similarity
from icsd.ops.triton.kernels.products import real


@triton.jit
def takes_part(i, j, samples, DIAGONAL: tl.constexpr):
    """Which elements (i, j) of S and T the loss takes."""
    mask = (i[:, None] < samples) & (j[None, :] < samples)
    if not DIAGONAL:
        mask = mask & (i[:, None] != j[None, :])
    return mask


@triton.jit
def store_rows(rows, i, values, statistics, weight, samples, LOSS: tl.constexpr):
    """Writes what the rows `i` add to the loss and, if wanted, their statistics `(5, samples)`."""
    tl.store(values + i, row_values(rows, samples, LOSS) * weight, mask=i < samples)
    if statistics is not None:
        numbers = row_statistics(rows)
        for k in tl.static_range(5):
            tl.store(statistics + k * samples + i, numbers[k], mask=i < samples)


@triton.jit
def load_statistics(statistics, i, samples, dtype: tl.constexpr):
    """The statistics of the rows `i`."""
    if statistics is None:
        zeros = tl.zeros(i.shape, dtype)
        numbers = zeros, zeros, zeros, zeros, zeros
    else:  # the compiler goes on after a return
        mask = i < samples
        numbers = (
            tl.load(statistics + i, mask=mask, other=0.0),
            tl.load(statistics + samples + i, mask=mask, other=0.0),
            tl.load(statistics + 2 * samples + i, mask=mask, other=0.0),
            tl.load(statistics + 3 * samples + i, mask=mask, other=0.0),
            tl.load(statistics + 4 * samples + i, mask=mask, other=0.0),
        )
    return numbers


@triton.jit
def beside(numbers):
    """A tuple of numbers of rows, to go with tiles of those rows."""
    a, b, c, d, e = numbers
    return a[:, None], b[:, None], c[:, None], d[:, None], e[:, None]


@triton.jit
def above(numbers):
    """A tuple of numbers of columns, to go with tiles of those columns."""
    a, b, c, d, e = numbers
    return a[None, :], b[None, :], c[None, :], d[None, :], e[None, :]


@triton.jit(do_not_specialize=["weight", "first", "second"])
def measure(
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
    teacher_group_stride,
    teacher_row_stride,
    values_group_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What every row adds to the loss, and its statistics. Grid `(groups * ceil(samples / ROWS),)`.

    Gram matrices are `(groups, samples, samples)`, inverse norms `(groups, samples)`, statistics
    `(groups, 5, samples)`.
    """
    blocks = tl.cdiv(samples, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = student.dtype.element_ty
    first, second = real(first, dtype), real(second, dtype)
    student_norms += group * samples
    teacher_norms += group * samples
    r_s = tl.load(student_norms + i, mask=i < samples, other=0.0)
    r_t = tl.load(teacher_norms + i, mask=i < samples, other=0.0)
    student += group * samples * samples + i[:, None].to(tl.int64) * samples
    teacher += group * teacher_group_stride + i[:, None].to(tl.int64) * teacher_row_stride
    rows = empty_rows(ROWS, dtype)
    for start in range(0, samples, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        r_js = tl.load(student_norms + j, mask=j < samples, other=0.0)
        r_jt = tl.load(teacher_norms + j, mask=j < samples, other=0.0)
        mask = takes_part(i, j, samples, DIAGONAL)
        s = similarity(tl.load(student + j[None, :], mask=mask, other=0.0), r_s, r_js)
        t = similarity(tl.load(teacher + j[None, :], mask=mask, other=0.0), r_t, r_jt)
        rows = update_rows(rows, s, t, mask, first, second, LOSS)
    if statistics is not None:
        statistics += group * 5 * samples
    values += group * values_group_stride
    store_rows(rows, i, values, statistics, real(weight, dtype), samples, LOSS)


@triton.jit(do_not_specialize=["weight", "first", "second", "eps"])
def differentiate(
    student,
    teacher,
    student_norms,
    teacher_norms,
    statistics,
    student_slot,
    teacher_slot,
    weight,
    first,
    second,
    eps,
    samples,
    teacher_group_stride,
    teacher_row_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The slots [A | r] of csrc/cpu/operator.h, dL/dX = diag(r) A X. Grid `(groups * ceil(samples / ROWS),)`.

    The teacher is "constant": its slot, which holds its Gram matrix, gets r; or "first": its slot gets [A | r]; or
    "next": what it gets from this student is added to its A.
    """
    blocks = tl.cdiv(samples, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = student.dtype.element_ty
    first, second, weight = real(first, dtype), real(second, dtype), real(weight, dtype)
    eps = real(eps, student_norms.dtype.element_ty)
    student_norms += group * samples
    teacher_norms += group * samples
    r_s = tl.load(student_norms + i, mask=i < samples, other=0.0)
    r_t = tl.load(teacher_norms + i, mask=i < samples, other=0.0)
    student += group * samples * samples + i.to(tl.int64) * samples
    teacher += group * teacher_group_stride + i.to(tl.int64) * teacher_row_stride
    student_slot += (group * samples + i) * (samples + 1)
    teacher_slot += (group * samples + i) * (samples + 1)
    if statistics is not None:
        statistics += group * 5 * samples
    own = beside(load_statistics(statistics, i, samples, dtype))
    projection_s = tl.zeros((ROWS,), dtype)
    projection_t = tl.zeros((ROWS,), dtype)
    on_s = tl.zeros((ROWS,), dtype)
    on_t = tl.zeros((ROWS,), dtype)
    for start in range(0, samples, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        r_js = tl.load(student_norms + j, mask=j < samples, other=0.0)
        r_jt = tl.load(teacher_norms + j, mask=j < samples, other=0.0)
        inside = (i[:, None] < samples) & (j[None, :] < samples)
        mask = takes_part(i, j, samples, DIAGONAL)
        s = similarity(tl.load(student[:, None] + j[None, :], mask=inside, other=0.0), r_s, r_js)
        t = similarity(tl.load(teacher[:, None] + j[None, :], mask=inside, other=0.0), r_t, r_jt)
        other = above(load_statistics(statistics, j, samples, dtype))
        g_s, g_t = gradients(s, t, own, other, samples, first, second, LOSS, TEACHER != "constant")
        elsewhere = inside & (i[:, None] != j[None, :])
        g_s = tl.where(mask, g_s * weight, 0.0)
        projection_s += tl.sum(tl.where(elsewhere, g_s * s, 0.0), axis=1)
        on_s += tl.sum(tl.where(elsewhere, 0.0, g_s), axis=1)
        tl.store(student_slot[:, None] + j[None, :], g_s * r_js.to(dtype)[None, :], mask=elsewhere)
        if TEACHER != "constant":
            g_t = tl.where(mask, g_t * weight, 0.0)
            projection_t += tl.sum(tl.where(elsewhere, g_t * t, 0.0), axis=1)
            on_t += tl.sum(tl.where(elsewhere, 0.0, g_t), axis=1)
            a = g_t * r_jt.to(dtype)[None, :]
            if TEACHER == "next":
                a += tl.load(teacher_slot[:, None] + j[None, :], mask=elsewhere, other=0.0)
            tl.store(teacher_slot[:, None] + j[None, :], a, mask=elsewhere)
    a = diagonal_element(r_s, projection_s, on_s, eps)
    tl.store(student_slot + i, a, mask=i < samples)
    tl.store(student_slot + samples, r_s, mask=i < samples)
    if TEACHER != "constant":
        a = diagonal_element(r_t, projection_t, on_t, eps)
        if TEACHER == "next":
            a += tl.load(teacher_slot + i, mask=i < samples, other=0.0)
        tl.store(teacher_slot + i, a, mask=i < samples)
    tl.store(teacher_slot + samples, r_t, mask=i < samples)


@triton.jit
def diagonal_element(r, projection, g, eps):
    """A_ii: the projection on x_i, whose norm does not matter, or only its own part where eps stood in for the norm."""
    return r.to(g.dtype) * tl.where(is_clamped(r, eps), g, -projection)

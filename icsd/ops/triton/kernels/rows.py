"""The loss on rows of the N x N matrices: from the Gram matrices to the loss and to the matrices of the gradients.

Every program takes whole rows, and none writes what another one reads.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from icsd.ops.contract import Spec
from icsd.ops.triton import runtime
from icsd.ops.triton.kernels.losses import (
    as_columns,
    as_rows,
    empty_rows,
    gradients,
    in_loss,
    load_statistics,
    loss_constants,
    loss_parameters,
    store_rows,
    update_rows,
)
from icsd.ops.triton.kernels.norms import is_clamped, similarity
from icsd.ops.triton.kernels.products import real


class Gram(NamedTuple):
    """The Gram matrix of one stage with the inverse norms on its diagonal.

    Attributes:
        matrix: K, `(groups, samples, samples)`; the teacher's rows may be farther apart than `samples`.
        inverse_norms: `(groups, samples)`, in float64: rounding one would shift its whole row.
    """

    matrix: Tensor
    inverse_norms: Tensor


@triton.jit(do_not_specialize=["weight", "first", "second"])
def rows_forward_kernel(
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
    teacher_row_stride,
    values_group_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write what every row adds to the loss, and its statistics. The grid is `(groups * ceil(samples / ROWS),)`.

    Gram matrices are `(groups, samples, samples)`, inverse norms and values `(groups, samples)`, statistics
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
    teacher += group * samples * teacher_row_stride + i[:, None].to(tl.int64) * teacher_row_stride
    rows = empty_rows(ROWS, dtype)
    for start in range(0, samples, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        r_js = tl.load(student_norms + j, mask=j < samples, other=0.0)
        r_jt = tl.load(teacher_norms + j, mask=j < samples, other=0.0)
        mask = in_loss(i, j, samples, DIAGONAL)
        s = similarity(tl.load(student + j[None, :], mask=mask, other=0.0), r_s, r_js)
        t = similarity(tl.load(teacher + j[None, :], mask=mask, other=0.0), r_t, r_jt)
        rows = update_rows(rows, s, t, mask, first, second, LOSS)
    if statistics is not None:
        statistics += group * 5 * samples
    values += group * values_group_stride
    store_rows(rows, i, values, statistics, real(weight, dtype), samples, LOSS, DIAGONAL)


def rows_forward(
    student: Gram, teacher: Gram, values: Tensor, statistics: Tensor | None, weight: float, spec: Spec
) -> None:
    """Write what every row adds to the loss, `(groups, samples)`, and its statistics, `(groups, 5, samples)`."""
    groups, samples, _ = student.matrix.shape
    rows, columns = runtime.row_tile(samples)
    runtime.launch(
        rows_forward_kernel,
        values,
        (groups * triton.cdiv(samples, rows),),
        student.matrix,
        teacher.matrix,
        student.inverse_norms,
        teacher.inverse_norms,
        values,
        statistics,
        runtime.bits(weight),
        *loss_parameters(spec),
        samples,
        teacher.matrix.stride(1),
        values.stride(0),
        **loss_constants(spec),
        ROWS=rows,
        COLUMNS=columns,
    )


@triton.jit(do_not_specialize=["weight", "first", "second", "eps"])
def rows_backward_kernel(
    student,
    teacher,
    student_norms,
    teacher_norms,
    values,
    statistics,
    student_saved,
    teacher_saved,
    weight,
    first,
    second,
    eps,
    samples,
    teacher_row_stride,
    values_group_stride,
    LOSS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TEACHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the saved matrices [A | r] with dL/dX = diag(r) A X. The grid is `(groups * ceil(samples / ROWS),)`.

    Where `values` is given, what every row adds to the loss is written, too, by one pass over the matrices.

    `TEACHER` is "constant": what is saved for it holds its Gram matrix and gets r; or "first": it gets [A | r]; or
    "next": what this student adds to the teacher's A is added.
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
    teacher += group * samples * teacher_row_stride + i.to(tl.int64) * teacher_row_stride
    student_saved += (group * samples + i) * (samples + 1)
    teacher_saved += (group * samples + i) * (samples + 1)
    if statistics is not None:
        statistics += group * 5 * samples
    own = as_columns(load_statistics(statistics, i, samples, dtype))
    projection_s = tl.zeros((ROWS,), dtype)
    projection_t = tl.zeros((ROWS,), dtype)
    on_s = tl.zeros((ROWS,), dtype)
    on_t = tl.zeros((ROWS,), dtype)
    rows = empty_rows(ROWS, dtype)
    for start in range(0, samples, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        r_js = tl.load(student_norms + j, mask=j < samples, other=0.0)
        r_jt = tl.load(teacher_norms + j, mask=j < samples, other=0.0)
        inside = (i[:, None] < samples) & (j[None, :] < samples)
        mask = in_loss(i, j, samples, DIAGONAL)
        s = similarity(tl.load(student[:, None] + j[None, :], mask=inside, other=0.0), r_s, r_js)
        t = similarity(tl.load(teacher[:, None] + j[None, :], mask=inside, other=0.0), r_t, r_jt)
        if values is not None:
            rows = update_rows(rows, s, t, mask, first, second, LOSS)
        other = as_rows(load_statistics(statistics, j, samples, dtype))
        g_s, g_t = gradients(s, t, own, other, samples, first, second, LOSS, DIAGONAL, TEACHER != "constant")
        elsewhere = inside & (i[:, None] != j[None, :])
        g_s = tl.where(mask, g_s * weight, 0.0)
        projection_s += tl.sum(tl.where(elsewhere, g_s * s, 0.0), axis=1)
        on_s += tl.sum(tl.where(elsewhere, 0.0, g_s), axis=1)
        tl.store(student_saved[:, None] + j[None, :], g_s * r_js.to(dtype)[None, :], mask=elsewhere)
        if TEACHER != "constant":
            g_t = tl.where(mask, g_t * weight, 0.0)
            projection_t += tl.sum(tl.where(elsewhere, g_t * t, 0.0), axis=1)
            on_t += tl.sum(tl.where(elsewhere, 0.0, g_t), axis=1)
            a = g_t * r_jt.to(dtype)[None, :]
            if TEACHER == "next":
                a += tl.load(teacher_saved[:, None] + j[None, :], mask=elsewhere, other=0.0)
            tl.store(teacher_saved[:, None] + j[None, :], a, mask=elsewhere)
    if values is not None:
        values += group * values_group_stride
        store_rows(rows, i, values, None, weight, samples, LOSS, DIAGONAL)
    a = _diagonal_element(r_s, projection_s, on_s, eps)
    tl.store(student_saved + i, a, mask=i < samples)
    tl.store(student_saved + samples, r_s, mask=i < samples)
    if TEACHER != "constant":
        a = _diagonal_element(r_t, projection_t, on_t, eps)
        if TEACHER == "next":
            a += tl.load(teacher_saved + i, mask=i < samples, other=0.0)
        tl.store(teacher_saved + i, a, mask=i < samples)
    tl.store(teacher_saved + samples, r_t, mask=i < samples)


@triton.jit
def _diagonal_element(r, projection, g, eps):
    """Return A_ii, the projection on x_i; or, where eps replaces the norm, the gradient of S_ii itself."""
    return r.to(g.dtype) * tl.where(is_clamped(r, eps), g, -projection)


def rows_backward(
    student: Gram,
    teacher: Gram,
    values: Tensor | None,
    statistics: Tensor | None,
    student_saved: Tensor,
    teacher_saved: Tensor,
    weight: float,
    spec: Spec,
    first: bool,
) -> None:
    """Write what is saved of a student and its teacher, `(groups, samples, samples + 1)` each.

    A loss without statistics needs no `rows_forward` before: what every row adds to it is written to `values`.

    All students add to what is saved of the teacher if it gets a gradient; `first` says that this is the first one.
    """
    groups, samples, _ = student.matrix.shape
    rows, columns = runtime.row_tile(samples)
    runtime.launch(
        rows_backward_kernel,
        student_saved,
        (groups * triton.cdiv(samples, rows),),
        student.matrix,
        teacher.matrix,
        student.inverse_norms,
        teacher.inverse_norms,
        values,
        statistics,
        student_saved,
        teacher_saved,
        runtime.bits(weight),
        *loss_parameters(spec),
        runtime.bits(spec.eps),
        samples,
        teacher.matrix.stride(1),
        0 if values is None else values.stride(0),
        **loss_constants(spec),
        TEACHER=("first" if first else "next") if spec.teacher_gradient else "constant",
        ROWS=rows,
        COLUMNS=columns,
    )

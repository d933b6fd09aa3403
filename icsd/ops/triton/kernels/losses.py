"""The losses on tiles of S and T, by the formulas of csrc/core/losses.h.

A row is summarized by five numbers: the maxima of the student's and of the teacher's similarities, the sums of the
exponentials relative to these maxima, and Σ e^{t'} (t' - s') where s' and t' are the exponents. A loss that is a plain
sum uses the last number alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from icsd.ops.contract import Spec
from icsd.ops.triton import runtime


def loss_constants(spec: Spec) -> dict[str, str | bool]:
    """Return what kernels are compiled for: the loss, and whether it includes the diagonal."""
    return {"LOSS": spec.loss, "DIAGONAL": spec.parameters[-1] != 0}


def loss_parameters(spec: Spec) -> tuple[int, int]:
    """Return the bits of the first two parameters of the loss."""
    first, second, *_ = [*spec.parameters, 0.0, 0.0]
    return runtime.bits(first), runtime.bits(second)


@triton.jit
def in_loss(i, j, samples, DIAGONAL: tl.constexpr):
    """Return which elements (i, j) of S and T the loss includes."""
    mask = (i[:, None] < samples) & (j[None, :] < samples)
    if not DIAGONAL:
        mask = mask & (i[:, None] != j[None, :])
    return mask


@triton.jit
def empty_rows(ROWS: tl.constexpr, dtype: tl.constexpr):
    """Return the summary of rows without columns."""
    zeros = tl.zeros((ROWS,), dtype)
    return zeros - 2, zeros, zeros - 2, zeros, zeros  # maxima below any cosine


@triton.jit
def update_rows(rows, s, t, mask, first, second, LOSS: tl.constexpr):
    """Return the summary with more columns of the rows; `first` and `second` are the parameters of the loss."""
    return merge_rows(rows, summarize(s, t, mask, first, second, LOSS), first, second, LOSS)


@triton.jit
def summarize(s, t, mask, first, second, LOSS: tl.constexpr, AXIS: tl.constexpr = 1):
    """Return the summary of the rows of a tile or, with `AXIS` 0, of its columns."""
    max_s, sum_s, max_t, sum_t, total = empty_rows(s.shape[1 - AXIS], s.dtype)
    if LOSS == "mse":
        x, _, _ = _clamped_difference(s, t, first)
        total = tl.sum(tl.where(mask, x * x, 0.0), axis=AXIS)
    elif LOSS == "smooth_l1":
        x = tl.abs(s - t) - second
        x = tl.where(x < 0, 0.0, tl.where(x < first, x * x * (0.5 / _divisor(first)), x - 0.5 * first))
        total = tl.sum(tl.where(mask, x, 0.0), axis=AXIS)
    else:
        max_s, max_t = tl.max(tl.where(mask, s, -2.0), axis=AXIS), tl.max(tl.where(mask, t, -2.0), axis=AXIS)
        below_s = (s - tl.expand_dims(max_s, AXIS)) / first
        below_t = (t - tl.expand_dims(max_t, AXIS)) / second
        e = tl.where(mask, tl.exp(below_t), 0.0)
        sum_s = tl.sum(tl.where(mask, tl.exp(below_s), 0.0), axis=AXIS)
        sum_t = tl.sum(e, axis=AXIS)
        total = tl.sum(tl.where(mask, e * (below_t - below_s), 0.0), axis=AXIS)
    return max_s, sum_s, max_t, sum_t, total


@triton.jit
def _relative_to(rows, raised_s, raised_t, first, second):
    """Return the sums of `kl` relative to larger maxima."""
    max_s, sum_s, max_t, sum_t, total = rows
    rise_s, rise_t = (raised_s - max_s) / first, (raised_t - max_t) / second
    total = tl.exp(-rise_t) * (total + sum_t * (rise_s - rise_t))
    return sum_s * tl.exp(-rise_s), sum_t * tl.exp(-rise_t), total


@triton.jit
def merge_rows(rows, others, first, second, LOSS: tl.constexpr):
    """Return the summary of the same rows over the columns of both."""
    max_s, sum_s, max_t, sum_t, total = rows
    if LOSS != "kl":
        return max_s, sum_s, max_t, sum_t, total + others[4]
    raised_s, raised_t = tl.maximum(max_s, others[0]), tl.maximum(max_t, others[2])
    sum_s, sum_t, total = _relative_to(rows, raised_s, raised_t, first, second)
    other_s, other_t, other_total = _relative_to(others, raised_s, raised_t, first, second)
    return raised_s, sum_s + other_s, raised_t, sum_t + other_t, total + other_total


@triton.jit
def count_elements(samples, dtype: tl.constexpr, DIAGONAL: tl.constexpr):
    """Return the number of elements of the matrices, with or without their diagonals; 1 for a single sample."""
    count = tl.cast(samples, dtype)  # of a constant if there is one sample
    columns = count
    if not DIAGONAL:
        columns = tl.maximum(count - 1, 1.0)
    return count * columns


@triton.jit
def row_values(rows, samples, LOSS: tl.constexpr, DIAGONAL: tl.constexpr):
    """Return what complete rows add to the loss."""
    _, sum_s, _, sum_t, total = rows
    if LOSS == "kl":
        # The two terms nearly cancel. A single sample without its diagonal has no columns.
        wide_t = sum_t.to(tl.float64)
        value = total.to(tl.float64) / wide_t + tl.log(sum_s.to(tl.float64) / wide_t)
        return (tl.where(sum_t == 0, 0.0, value) / tl.cast(samples, total.dtype)).to(total.dtype)
    return total / count_elements(samples, total.dtype, DIAGONAL)


@triton.jit
def row_statistics(rows):
    """Return the five numbers of a row that the gradient of `kl` needs."""
    max_s, sum_s, max_t, sum_t, total = rows
    return max_s, 1 / sum_s, max_t, 1 / sum_t, total / sum_t


@triton.jit
def store_rows(rows, i, values, statistics, weight, samples, LOSS: tl.constexpr, DIAGONAL: tl.constexpr):
    """Write what the rows `i` add to the loss and, if wanted, their statistics `(5, samples)`."""
    tl.store(values + i, row_values(rows, samples, LOSS, DIAGONAL) * weight, mask=i < samples)
    if statistics is not None:
        store_summary(row_statistics(rows), i, statistics, samples)


@triton.jit
def store_summary(rows, i, summaries, samples):
    """Write the summary of the rows `i` to `(5, samples)`."""
    for k in tl.static_range(5):
        tl.store(summaries + k * samples + i, rows[k], mask=i < samples)


@triton.jit
def load_statistics(statistics, i, samples, dtype: tl.constexpr):
    """Return the statistics of the rows `i`, or zeros if there are none."""
    if statistics is None:
        zeros = tl.zeros(i.shape, dtype)
        numbers = zeros, zeros, zeros, zeros, zeros
    else:  # a return in the branch above would not end the function: the compiler goes on
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
def as_columns(statistics):
    """Return the statistics of rows as columns, to combine with tiles of these rows."""
    a, b, c, d, e = statistics
    return a[:, None], b[:, None], c[:, None], d[:, None], e[:, None]


@triton.jit
def as_rows(statistics):
    """Return the statistics of the rows j as rows, to combine with tiles whose columns are j."""
    a, b, c, d, e = statistics
    return a[None, :], b[None, :], c[None, :], d[None, :], e[None, :]


@triton.jit
def gradients(
    s, t, own, other, samples, first, second, LOSS: tl.constexpr, DIAGONAL: tl.constexpr, TEACHER: tl.constexpr
):
    """Return dL/dS_ij + dL/dS_ji and, if `TEACHER`, dL/dT_ij + dL/dT_ji.

    `own` and `other` are the statistics of the rows i and j. The second result is meaningless without `TEACHER`.
    """
    if LOSS != "kl":
        slope = 2 / count_elements(samples, s.dtype, DIAGONAL)
        student, teacher = _element_gradients(s, t, first, second, LOSS)
        return student * slope, teacher * slope
    count = tl.cast(samples, s.dtype)
    student_i, teacher_i = _kl_row(s, t, own, first, second, TEACHER)
    student_j, teacher_j = _kl_row(s, t, other, first, second, TEACHER)
    return (student_i + student_j) / (first * count), (teacher_i + teacher_j) / (second * count)


@triton.jit
def gradients_to_banks(s, t, row, scale, first, second, LOSS: tl.constexpr, TEACHER: tl.constexpr):
    """Return dL/dS_ij and, if `TEACHER`, dL/dT_ij of similarities to banks.

    `row` are the statistics of the rows of S and T, and `scale` is 1 / N for `kl`, 1 / (N M) for other losses. The
    second result is meaningless without `TEACHER`.
    """
    if LOSS == "kl":
        student, teacher = _kl_row(s, t, row, first, second, TEACHER)
        return student * (scale / first), teacher * (scale / second)
    student, teacher = _element_gradients(s, t, first, second, LOSS)
    return student * scale, teacher * scale


@triton.jit
def _element_gradients(s, t, first, second, LOSS: tl.constexpr):
    """Return the derivatives by s and by t of a loss that compares elements."""
    if LOSS == "mse":
        x, no_s, no_t = _clamped_difference(s, t, first)
        return x * tl.where(no_s, 0.0, 2.0), x * tl.where(no_t, 0.0, -2.0)
    x = tl.abs(s - t) - second
    slope = tl.where(x <= 0, 0.0, tl.where(x >= first, 1.0, x / _divisor(first)))
    student = tl.where(s < t, -slope, slope)
    return student, -student


@triton.jit
def _divisor(beta):
    """Return beta, or 1 in place of 0, where no quotient is used."""
    return tl.where(beta == 0, 1.0, beta)


@triton.jit
def _clamped_difference(s, t, clamp):
    """Return s' - t', and where s' and t' are 0 in place of negative s and t, by a number that names the clamp."""
    least_s, least_t = tl.where(clamp == 1, 0.0, -4.0), tl.where(clamp == 0, -4.0, 0.0)  # -4 is below any cosine
    no_s, no_t = s < least_s, t < least_t
    return tl.where(no_s, 0.0, s) - tl.where(no_t, 0.0, t), no_s, no_t


@triton.jit
def _kl_row(s, t, row, student_temperature, teacher_temperature, TEACHER: tl.constexpr):
    """Return p - q of the softmax distributions of a row and, if `TEACHER`, q (log q - log p - KL)."""
    max_s, inverse_s, max_t, inverse_t, mean = row
    below_s, below_t = (s - max_s) / student_temperature, (t - max_t) / teacher_temperature
    q = tl.exp(below_t) * inverse_t
    student = tl.exp(below_s) * inverse_s - q
    if TEACHER:
        return student, q * (below_t - below_s - mean)
    return student, student

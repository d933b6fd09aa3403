"""The losses of csrc/core/losses.h, on tiles of S and T.

A row is five numbers: the maxima of its student's and teacher's similarities, the sums of exponentials below them, and
Σ e^{t'} (t' - s') of what the exponents are; a loss that only adds up uses the last one alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def empty_rows(ROWS: tl.constexpr, dtype: tl.constexpr):
    """Rows of which nothing is known yet."""
    zeros = tl.zeros((ROWS,), dtype)
    return zeros - 2, zeros, zeros - 2, zeros, zeros  # maxima below any cosine


@triton.jit
def update_rows(rows, s, t, mask, first, second, LOSS: tl.constexpr):
    """Takes columns of the rows; `first` and `second` are the loss's parameters."""
    max_s, sum_s, max_t, sum_t, total = rows
    if LOSS == "mse":
        return max_s, sum_s, max_t, sum_t, total + tl.sum(tl.where(mask, (s - t) * (s - t), 0.0), axis=1)
    if LOSS == "smooth_l1":
        x = tl.abs(s - t)
        x = tl.where(x < first, x * x * (0.5 / first), x - 0.5 * first)
        return max_s, sum_s, max_t, sum_t, total + tl.sum(tl.where(mask, x, 0.0), axis=1)
    raised_s = tl.maximum(max_s, tl.max(tl.where(mask, s, -2.0), axis=1))
    raised_t = tl.maximum(max_t, tl.max(tl.where(mask, t, -2.0), axis=1))
    rise_s, rise_t = (raised_s - max_s) / first, (raised_t - max_t) / second
    total = tl.exp(-rise_t) * (total + sum_t * (rise_s - rise_t))
    sum_s *= tl.exp(-rise_s)
    sum_t *= tl.exp(-rise_t)
    below_s, below_t = (s - raised_s[:, None]) / first, (t - raised_t[:, None]) / second
    e = tl.where(mask, tl.exp(below_t), 0.0)
    sum_s += tl.sum(tl.where(mask, tl.exp(below_s), 0.0), axis=1)
    total += tl.sum(tl.where(mask, e * (below_t - below_s), 0.0), axis=1)
    return raised_s, sum_s, raised_t, sum_t + tl.sum(e, axis=1), total


@triton.jit
def row_values(rows, samples, LOSS: tl.constexpr):
    """What whole rows add to the mean."""
    _, sum_s, _, sum_t, total = rows
    count = tl.cast(samples, total.dtype)  # a count of 1 is compiled in
    if LOSS == "kl":
        # The two terms nearly cancel. A single sample without its diagonal: nothing took part.
        wide_t = sum_t.to(tl.float64)
        value = total.to(tl.float64) / wide_t + tl.log(sum_s.to(tl.float64) / wide_t)
        return (tl.where(sum_t == 0, 0.0, value) / count).to(total.dtype)
    return total / (count * count)


@triton.jit
def row_statistics(rows):
    """The numbers of a row that gradients of `kl` need."""
    max_s, sum_s, max_t, sum_t, total = rows
    return max_s, 1 / sum_s, max_t, 1 / sum_t, total / sum_t


@triton.jit
def gradients(s, t, own, other, samples, first, second, LOSS: tl.constexpr, TEACHER: tl.constexpr):
    """dL/dS_ij + dL/dS_ji and, for a teacher, dL/dT_ij + dL/dT_ji, from the statistics of the rows i and j."""
    count = tl.cast(samples, s.dtype)
    if LOSS == "mse":
        student = (s - t) * (4 / (count * count))
        return student, -student
    if LOSS == "smooth_l1":
        x = s - t
        student = tl.where(x >= first, 1.0, tl.where(x <= -first, -1.0, x / first)) * (2 / (count * count))
        return student, -student
    student_i, teacher_i = _kl_row(s, t, own, first, second, TEACHER)
    student_j, teacher_j = _kl_row(s, t, other, first, second, TEACHER)
    return (student_i + student_j) / (first * count), (teacher_i + teacher_j) / (second * count)


@triton.jit
def _kl_row(s, t, row, student_temperature, teacher_temperature, TEACHER: tl.constexpr):
    """Of one row: p - q of its softmax distributions and, for a teacher, q (log q - log p - KL)."""
    max_s, inverse_s, max_t, inverse_t, mean = row
    below_s, below_t = (s - max_s) / student_temperature, (t - max_t) / teacher_temperature
    q = tl.exp(below_t) * inverse_t
    student = tl.exp(below_s) * inverse_s - q
    if TEACHER:
        return student, q * (below_t - below_s - mean)
    return student, student

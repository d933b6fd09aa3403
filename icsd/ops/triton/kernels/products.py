"""Products of tiles, and the numbers they are summed in."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies bfloat16 as the integers of its bits; there, operands are widened first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def sum_dtype(dtype):
    """What products of elements of this dtype are summed in."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def multiply_add(a, b, sums, PRECISION: tl.constexpr):
    """The sums and a b, in the dtype of `sums`; operands of different dtypes meet in that dtype."""
    if a.dtype != b.dtype or INTERPRETED:
        a = a.to(sums.dtype)
        b = b.to(sums.dtype)
    return tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def products(
    x,
    i,
    j,
    begin,
    end,
    samples,
    features,
    sample_stride,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<x_i, x_j> over the features from `begin` to `end`, a tile of K; `SAME` says that i and j are the same."""
    sums = tl.zeros((i.shape[0], j.shape[0]), sum_dtype(x.dtype.element_ty))
    rows = x + i[:, None].to(tl.int64) * sample_stride
    columns = x + j[None, :].to(tl.int64) * sample_stride
    for start in range(begin, end, BLOCK):
        d = start + tl.arange(0, BLOCK)
        a = tl.load(rows + d[None, :], mask=(i[:, None] < samples) & (d[None, :] < features), other=0.0)
        if SAME:
            b = tl.trans(a)  # every feature is read once
        else:
            b = tl.load(columns + d[:, None], mask=(j[None, :] < samples) & (d[:, None] < features), other=0.0)
        sums = multiply_add(a, b, sums, PRECISION)
    return sums


@triton.jit
def real(bits, dtype: tl.constexpr):
    """The number whose float64 has these bits: kernels get floats rounded to float32, but integers as they are."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)

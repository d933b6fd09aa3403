"""Products of tiles, and the types in which they are summed."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bfloat16 as integers, so operands are converted to float32 first.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def sum_dtype(dtype):
    """Return the type in which products of elements of type `dtype` are summed."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def multiply_add(a, b, sums, PRECISION: tl.constexpr):
    """Return sums + a b in the type of `sums`, to which operands of different types are converted."""
    if a.dtype != b.dtype or INTERPRETED:
        a = a.to(sums.dtype)
        b = b.to(sums.dtype)
    return tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def products(
    x,
    sample_stride,
    i,
    j,
    begin,
    end,
    samples,
    dim,
    SAME: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return a tile of K, <x_i, x_j> over the features from `begin` to `end`; `SAME` says that i and j are equal."""
    sums = tl.zeros((i.shape[0], j.shape[0]), sum_dtype(x.dtype.element_ty))
    rows = x + i[:, None].to(tl.int64) * sample_stride
    columns = x + j[None, :].to(tl.int64) * sample_stride
    for start in range(begin, end, BLOCK):
        d = start + tl.arange(0, BLOCK)
        a = tl.load(rows + d[None, :], mask=(i[:, None] < samples) & (d[None, :] < dim), other=0.0)
        if SAME:
            b = tl.trans(a)  # every feature is read once
        else:
            b = tl.load(columns + d[:, None], mask=(j[None, :] < samples) & (d[:, None] < dim), other=0.0)
        sums = multiply_add(a, b, sums, PRECISION)
    return sums


@triton.jit
def real(bits, dtype: tl.constexpr):
    """Return the number with these bits of a float64 (`runtime.bits`)."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)

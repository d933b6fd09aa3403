"""Norms of samples, correctly rounded: every similarity is a multiple of two of them."""

from __future__ import annotations

import triton
import triton.language as tl

from icsd.ops.triton.kernels.products import real


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded."""
    return 1.0 / x if x.dtype == tl.float64 else tl.div_rn(1.0, x)


@triton.jit
def inverse_norm(square, eps):
    """1 / max(sqrt(K_ii), eps); 0 for a zero row; NaN where the squared norm is not finite."""
    square_ = tl.where(square > 0, square, 1.0)
    norm = tl.sqrt(square_) if square.dtype == tl.float64 else tl.sqrt_rn(square_)
    inverse = tl.where(square == 0, 0.0, reciprocal(tl.maximum(norm, eps)))
    return tl.where(square < float("inf"), inverse, float("nan"))


@triton.jit
def similarity(k, inverse_i, inverse_j):
    """S from K: rounded once where norms are in float64."""
    return (k.to(inverse_i.dtype) * (inverse_i[:, None] * inverse_j[None, :])).to(k.dtype)


@triton.jit
def is_clamped(inverse, eps):
    """Whether eps stands in for the norm: there is no projection then."""
    return inverse >= reciprocal(eps)


@triton.jit(do_not_specialize=["eps"])
def inverse_norms(
    x,
    norms,
    eps,
    samples,
    features,
    x_group_stride,
    x_sample_stride,
    norms_group_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where no Gram matrix tells them. Grid `(groups * ceil(samples / ROWS),)`."""
    blocks = tl.cdiv(samples, ROWS)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    dtype: tl.constexpr = norms.dtype.element_ty
    x += group * x_group_stride + i[:, None].to(tl.int64) * x_sample_stride
    square = tl.zeros((ROWS,), dtype)
    for start in range(0, features, BLOCK):
        d = start + tl.arange(0, BLOCK)
        part = tl.load(x + d[None, :], mask=(i[:, None] < samples) & (d[None, :] < features), other=0.0).to(dtype)
        square += tl.sum(part * part, axis=1)
    tl.store(norms + group * norms_group_stride + i, inverse_norm(square, real(eps, dtype)), mask=i < samples)

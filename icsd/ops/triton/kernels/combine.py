"""Products of a small matrix with the features: all that a backward pass in sample space reads and writes of them."""

from __future__ import annotations

import triton
import triton.language as tl

from icsd.ops.triton.kernels.products import multiply_add, sum_dtype
from icsd.ops.triton.kernels.tuning import tuned


def _needs(arguments, block: int) -> tuple[int, int]:
    side, samples, element = arguments["SIDE"], arguments["SAMPLES"], arguments["x"].element_size()
    matrix = side * samples * arguments["matrix"].element_size()
    return samples * block * element + matrix, side * block * max(4, element) + 5 * matrix


@tuned(("ADD", "SIDE", "SAMPLES", "features"), _needs)
@triton.jit
def combine(
    matrix,
    row_scale,
    group_scale,
    x,
    out,
    outputs,
    samples,
    features,
    matrix_group_stride,
    matrix_row_stride,
    scale_group_stride,
    scale_row_stride,
    out_group_stride,
    x_group_stride,
    x_sample_stride,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes diag(scale) matrix x, or adds it. Grid `(groups * ceil(features / BLOCK) * ceil(outputs / SIDE),)`.

    `matrix` is `(groups, outputs, samples)`, `out` `(groups, outputs, features)`. A row's scale is its `row_scale`
    times its group's `group_scale`; each may be absent.
    """
    rows = tl.cdiv(outputs, SIDE)  # neighbors share features
    columns = tl.cdiv(features, BLOCK)
    group = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    i = tl.program_id(0) % rows * SIDE + tl.arange(0, SIDE)
    d = tl.program_id(0) // rows % columns * BLOCK + tl.arange(0, BLOCK)
    matrix += group * matrix_group_stride + i[:, None].to(tl.int64) * matrix_row_stride
    x += group * x_group_stride + d[None, :]
    dtype: tl.constexpr = sum_dtype(x.dtype.element_ty)
    sums = tl.zeros((SIDE, BLOCK), dtype)
    for start in range(0, samples, SAMPLES):
        j = start + tl.arange(0, SAMPLES)
        a = tl.load(matrix + j[None, :], mask=(i[:, None] < outputs) & (j[None, :] < samples), other=0.0)
        b = tl.load(
            x + j[:, None].to(tl.int64) * x_sample_stride,
            mask=(j[:, None] < samples) & (d[None, :] < features),
            other=0.0,
        )
        sums = multiply_add(a.to(dtype), b, sums, PRECISION)
    if row_scale is not None:
        row_scale += group * scale_group_stride + i.to(tl.int64) * scale_row_stride
        sums *= tl.load(row_scale, mask=i < outputs, other=0.0).to(dtype)[:, None]
    if group_scale is not None:
        sums *= tl.load(group_scale + group).to(dtype)
    out += group * out_group_stride + i[:, None].to(tl.int64) * features + d[None, :]
    mask = (i[:, None] < outputs) & (d[None, :] < features)
    if ADD:
        sums += tl.load(out, mask=mask, other=0.0)
    tl.store(out, sums.to(out.dtype.element_ty), mask=mask)

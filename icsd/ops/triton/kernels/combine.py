"""Products of a matrix with the features, which are the whole backward pass in sample space."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from icsd.ops.triton import runtime
from icsd.ops.triton.kernels.products import multiply_add, sum_dtype
from icsd.ops.triton.kernels.tuning import tuned, tuning_class


def _needs(arguments, block: int) -> tuple[int, int]:
    tile, samples, element = arguments["TILE"], arguments["SAMPLES"], arguments["x"].element_size()
    matrix = tile * samples * arguments["matrix"].element_size()
    return samples * block * element + matrix, tile * block * max(4, element) + 5 * matrix


@tuned(("ADD", "TILE", "SAMPLES"), _needs)
@triton.jit
def combine_kernel(
    matrix,
    row_scale,
    group_scale,
    x,
    out,
    only,
    outputs,
    samples,
    dim,
    matrix_group_stride,
    matrix_row_stride,
    scale_row_stride,
    x_group_stride,
    x_sample_stride,
    out_group_stride,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    SAMPLES: tl.constexpr,
    TUNED_FOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write diag(scale) matrix x, or add it to `out`.

    The grid is `(groups * ceil(outputs / TILE) * ceil(dim / BLOCK),)`. `matrix` is `(groups, outputs, samples)`, `out`
    `(groups, outputs, dim)`. The scale of a row is its `row_scale` times the `group_scale` of its group; each may be
    None. Groups for which `only` is 0 are left out; it may be None.
    """
    rows = tl.cdiv(outputs, TILE)  # neighboring programs share features
    columns = tl.cdiv(dim, BLOCK)
    group = (tl.program_id(0) // (rows * columns)).to(tl.int64)
    if only is not None and tl.load(only + group) == 0:
        return
    i = tl.program_id(0) % rows * TILE + tl.arange(0, TILE)
    d = tl.program_id(0) // rows % columns * BLOCK + tl.arange(0, BLOCK)
    matrix += group * matrix_group_stride + i[:, None].to(tl.int64) * matrix_row_stride
    x += group * x_group_stride + d[None, :]
    dtype: tl.constexpr = sum_dtype(x.dtype.element_ty)
    sums = tl.zeros((TILE, BLOCK), dtype)
    for start in range(0, samples, SAMPLES):
        j = start + tl.arange(0, SAMPLES)
        a = tl.load(matrix + j[None, :], mask=(i[:, None] < outputs) & (j[None, :] < samples), other=0.0)
        b = tl.load(
            x + j[:, None].to(tl.int64) * x_sample_stride,
            mask=(j[:, None] < samples) & (d[None, :] < dim),
            other=0.0,
        )
        sums = multiply_add(a.to(dtype), b, sums, PRECISION)
    if row_scale is not None:
        row_scale += group * outputs * scale_row_stride + i.to(tl.int64) * scale_row_stride
        sums *= tl.load(row_scale, mask=i < outputs, other=0.0).to(dtype)[:, None]
    if group_scale is not None:
        sums *= tl.load(group_scale + group).to(dtype)
    out += group * out_group_stride + i[:, None].to(tl.int64) * dim + d[None, :]
    mask = (i[:, None] < outputs) & (d[None, :] < dim)
    if ADD:
        sums += tl.load(out, mask=mask, other=0.0)
    tl.store(out, sums.to(out.dtype.element_ty), mask=mask)


def combine(
    matrix: Tensor,
    x: Tensor,
    out: Tensor,
    row_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    add: bool = False,
    only: Tensor | None = None,
) -> None:
    """Write diag(row_scale * group_scale) matrix x, or add it to `out`.

    Args:
        matrix: `(groups, outputs, samples)`.
        x: `(groups, samples, dim)`.
        out: `(groups, outputs, dim)`.
        row_scale: `(groups, outputs)`, one stride apart throughout.
        group_scale: `(groups,)`.
        add: Add to what `out` holds.
        only: `(groups,)`; groups for which it is 0 are left out.
    """
    groups, samples, dim = x.shape
    outputs = out.shape[1]
    tile = runtime.product_tile(outputs, x.dtype)
    runtime.launch(
        combine_kernel,
        out,
        lambda meta: (groups * triton.cdiv(outputs, tile) * triton.cdiv(dim, meta["BLOCK"]),),
        matrix,
        row_scale,
        group_scale,
        x,
        out,
        only,
        outputs,
        samples,
        dim,
        *matrix.stride()[:2],
        0 if row_scale is None else row_scale.stride(1),
        *x.stride()[:2],
        out.stride(0),
        ADD=add,
        PRECISION=runtime.precision(x),
        TILE=tile,
        SAMPLES=runtime.tile_size(samples, 32),
        TUNED_FOR=tuning_class(matrix, x),
    )

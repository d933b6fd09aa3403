"""From tensors to kernels: grids, tiles and slices.

Tensors are three-dimensional here, `(groups, samples, ...)`, and their last dimension is dense.
"""

from __future__ import annotations

import functools
import os
import struct
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor

from icsd.losses.gram import compute_dtype
from icsd.ops.fused import Distillation
from icsd.ops.triton import kernels


def as_groups(x: Tensor) -> Tensor:
    """`(*B, N, D)` as `(groups, N, D)`, each sample's features adjacent; copied if it cannot be seen so."""
    x = x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3)
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def gram(x: Tensor, out: Tensor, norms: Tensor | None = None, eps: float = 0.0) -> None:
    """Writes X Xᵀ `(groups, samples, samples)` and, if wanted, the inverse norms `(groups, samples)`."""
    groups, samples, features = x.shape
    side = _side(samples, _widest(x.dtype))
    tiles = triton.cdiv(samples, side)
    triangles = groups * tiles * (tiles + 1) // 2
    # Enough slices to fill the chip, each long enough for its part of K to be little beside what it reads.
    slices = max(1, min(2 * _processors(x.device) // max(1, triangles), features // max(256, 4 * side)))
    length = max(256, triton.cdiv(triton.cdiv(features, slices), 256) * 256)
    slices = max(1, triton.cdiv(features, length))
    partials = x.new_empty((slices, triangles, side, side), dtype=compute_dtype(x)) if slices > 1 else None
    finish = (out, partials, norms, _bits(eps), samples)
    _launch(
        kernels.gram,
        out,
        (groups * tiles**2, slices),
        x,
        *finish,
        features,
        length,
        *x.stride()[:2],
        *out.stride()[:2],
        SIDE=side,
        TILES=tiles,
        PRECISION=_precision(x),
    )
    if partials is not None:
        rows = min(side, max(1, 512 // side))
        grid = (groups * tiles**2, side // rows)
        _launch(kernels.gram_sums, out, grid, *finish, slices, *out.stride()[:2], SIDE=side, TILES=tiles, ROWS=rows)


def combine(
    matrix: Tensor,
    x: Tensor,
    out: Tensor,
    row_scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    add: bool = False,
) -> None:
    """Writes diag(row_scale * group_scale) matrix x, or adds it; scales are `(groups, outputs)` and `(groups,)`."""
    groups, samples, features = x.shape
    outputs = out.shape[1]
    side = _side(outputs, _widest(x.dtype))
    _launch(
        kernels.combine,
        out,
        lambda meta: (groups * triton.cdiv(outputs, side) * triton.cdiv(features, meta["BLOCK"]),),
        matrix,
        row_scale,
        group_scale,
        x,
        out,
        outputs,
        samples,
        features,
        *matrix.stride()[:2],
        *((0, 0) if row_scale is None else row_scale.stride()),
        out.stride(0),
        *x.stride()[:2],
        ADD=add,
        PRECISION=_precision(x),
        SIDE=side,
        SAMPLES=_side(samples, 32),
    )


class Matrices(NamedTuple):
    """What the epilogue needs of a stage.

    Attributes:
        gram: K, `(groups, samples, samples)`.
        norms: Inverse norms, `(groups, samples)`, in float64: their rounding would be that of whole rows.
    """

    gram: Tensor
    norms: Tensor


def measure(
    student: Matrices, teacher: Matrices, values: Tensor, statistics: Tensor | None, weight: float, how: Distillation
) -> None:
    """What every row adds to the loss, `(groups, samples)`, and its statistics, `(groups, 5, samples)`."""
    groups, samples, _ = student.gram.shape
    rows, columns = _rows(samples)
    _launch(
        kernels.measure,
        values,
        (groups * triton.cdiv(samples, rows),),
        student.gram,
        teacher.gram,
        student.norms,
        teacher.norms,
        values,
        statistics,
        _bits(weight),
        *_parameters(how),
        samples,
        *teacher.gram.stride()[:2],
        values.stride(0),
        **_kl(how),
        ROWS=rows,
        COLUMNS=columns,
    )


def differentiate(
    student: Matrices,
    teacher: Matrices,
    statistics: Tensor | None,
    student_slot: Tensor,
    teacher_slot: Tensor,
    weight: float,
    how: Distillation,
    first: bool,
) -> None:
    """The slots `(groups, samples, samples + 1)` of a student and its teacher; to the latter all students add."""
    groups, samples, _ = student.gram.shape
    rows, columns = _rows(samples)
    _launch(
        kernels.differentiate,
        student_slot,
        (groups * triton.cdiv(samples, rows),),
        student.gram,
        teacher.gram,
        student.norms,
        teacher.norms,
        statistics,
        student_slot,
        teacher_slot,
        _bits(weight),
        *_parameters(how),
        _bits(how.eps),
        samples,
        *teacher.gram.stride()[:2],
        **_kl(how),
        TEACHER=("first" if first else "next") if how.teacher_gradient else "constant",
        ROWS=rows,
        COLUMNS=columns,
    )


def inverse_norms(x: Tensor, norms: Tensor, eps: float) -> None:
    """Writes the inverse norms `(groups, samples)`."""
    groups, samples, features = x.shape
    rows, columns = _rows(features)
    grid = (groups * triton.cdiv(samples, rows),)
    strides = *x.stride()[:2], norms.stride(0)
    _launch(
        kernels.inverse_norms, norms, grid, x, norms, _bits(eps), samples, features, *strides, ROWS=rows, BLOCK=columns
    )


class Stage(NamedTuple):
    """What streaming needs of a stage.

    Attributes:
        features: X, `(groups, samples, features)`.
        norms: Inverse norms, `(groups, samples)`.
    """

    features: Tensor
    norms: Tensor


def measure_streamed(
    student: Stage, teacher: Stage, values: Tensor, statistics: Tensor | None, weight: float, how: Distillation
) -> None:
    """As `measure`, from features."""
    groups, samples, _ = student.features.shape
    side = _side(samples, _streamed_side(values.dtype))
    _launch(
        kernels.measure_streamed,
        values,
        (groups * triton.cdiv(samples, side),),
        student.features,
        teacher.features,
        student.norms,
        teacher.norms,
        values,
        statistics,
        _bits(weight),
        *_parameters(how),
        samples,
        student.features.shape[2],
        teacher.features.shape[2],
        *student.features.stride()[:2],
        *teacher.features.stride()[:2],
        student.norms.stride(0),
        values.stride(0),
        0 if statistics is None else statistics.stride(0),
        **_kl(how),
        SIDE=side,
        PRECISION=_precision(student.features),
    )


def differentiate_streamed(
    student: Stage,
    teacher: Stage,
    statistics: Tensor | None,
    panel: Tensor,
    projections: Tensor,
    begin: int,
    weight: float,
    how: Distillation,
    *,
    of_teacher: bool,
    add: bool,
) -> None:
    """Rows of the slot of a student or of the teacher: `panel` `(groups, rows, samples + 1)`, from row `begin` on.

    `projections` `(groups, columns, rows)` holds what `project_panel` completes them with.
    """
    groups, rows, _ = panel.shape
    samples = student.features.shape[1]
    side = _side(samples, _streamed_side(panel.dtype))
    _launch(
        kernels.differentiate_streamed,
        panel,
        (groups * triton.cdiv(rows, side) * triton.cdiv(samples, side),),
        student.features,
        teacher.features,
        student.norms,
        teacher.norms,
        statistics,
        panel,
        projections,
        _bits(weight),
        *_parameters(how),
        _bits(how.eps),
        samples,
        student.features.shape[2],
        teacher.features.shape[2],
        begin,
        rows,
        *student.features.stride()[:2],
        *teacher.features.stride()[:2],
        student.norms.stride(0),
        0 if statistics is None else statistics.stride(0),
        **_kl(how),
        TEACHER=of_teacher,
        ADD=add,
        SIDE=side,
        PRECISION=_precision(student.features),
    )


def project_panel(panel: Tensor, projections: Tensor, norms: Tensor, begin: int, eps: float) -> None:
    """Completes the rows of `differentiate_streamed`."""
    groups, rows, _ = panel.shape
    samples = norms.shape[1]
    grid = (groups * triton.cdiv(rows, 128),)
    side = _side(samples, _streamed_side(panel.dtype))
    constants = {"SIDE": side, "ROWS": 128}
    numbers = samples, begin, rows, norms.stride(0)
    _launch(kernels.project_panel, panel, grid, panel, projections, norms, _bits(eps), *numbers, **constants)


def streamed_columns(samples: int, dtype: torch.dtype) -> int:
    """How many tiles a row of the matrices has."""
    return triton.cdiv(samples, _side(samples, _streamed_side(dtype)))


def moments(x: Stage, y: Stage, out: Tensor) -> None:
    """X̂ᵀŶ `(groups, x features, y features)`, in float64."""
    groups, samples, x_features = x.features.shape
    y_features = y.features.shape[2]
    symmetric = x is y
    side = _side(max(x_features, y_features), 64)
    tiles = groups * triton.cdiv(x_features, side) * triton.cdiv(y_features, side)
    slices = max(1, min(2 * _processors(out.device) // max(1, tiles), samples // max(256, 4 * side)))
    length = max(256, triton.cdiv(triton.cdiv(samples, slices), 256) * 256)
    slices = max(1, triton.cdiv(samples, length))
    partials = out.new_empty((slices, groups, x_features, y_features), dtype=x.norms.dtype)
    _launch(
        kernels.moments,
        partials,
        (tiles, slices),
        x.features,
        y.features,
        x.norms,
        y.norms,
        partials,
        samples,
        length,
        x_features,
        y_features,
        *x.features.stride()[:2],
        *y.features.stride()[:2],
        SYMMETRIC=symmetric,
        SIDE=side,
        PRECISION=_precision(x.norms),
    )
    grid = (groups * x_features, triton.cdiv(y_features, 256))
    numbers = slices, groups, x_features, y_features, out.stride(0)
    constants = {"SYMMETRIC": symmetric, "SIDE": side, "BLOCK": 256}
    _launch(kernels.moment_sums, out, grid, partials, out, *numbers, **constants)


def project(product: Tensor, stage: Stage, scale: Tensor, out: Tensor, eps: float) -> None:
    """dL/dX of a stage, times `scale` `(groups,)`, from `product`, dL/dX̂."""
    groups, samples, features = product.shape
    rows, columns = _rows(features)
    grid = (groups * triton.cdiv(samples, rows),)
    tensors = product, stage.features, stage.norms, scale, out
    numbers = _bits(eps), samples, features, *stage.features.stride()[:2]
    _launch(kernels.project, out, grid, *tensors, *numbers, ROWS=rows, BLOCK=columns)


def _launch(kernel, out: Tensor, grid, *arguments, **constants) -> None:
    """Runs a kernel that writes to `out`, on its device; or puts it into the graph that is being traced."""
    if not out.numel():
        return
    if isinstance(out, FunctionalTensor):
        torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
        return
    with torch.cuda.device_of(out):
        kernel[grid](*arguments, **constants)


def _bits(number: float) -> int:
    """What `products.real` reads."""
    return struct.unpack("q", struct.pack("d", number))[0]


def _parameters(how: Distillation) -> tuple[int, int]:
    """The first two parameters of the loss."""
    first, second, *_ = [*how.parameters, 0.0, 0.0]
    return _bits(first), _bits(second)


def _kl(how: Distillation) -> dict[str, str | bool]:
    """What kernels are compiled for: the loss, and whether the diagonal takes part."""
    return {"LOSS": how.loss, "DIAGONAL": how.loss != "kl" or how.parameters[2] != 0}


def _side(count: int, most: int) -> int:
    """Side of a tile: 16, which tensor cores take, or more."""
    return max(16, min(most, triton.next_power_of_2(count)))


def _widest(dtype: torch.dtype) -> int:
    """Side of a tile of sums that leaves registers for what is summed."""
    return 64 if dtype == torch.float64 else 128


def _streamed_side(dtype: torch.dtype) -> int:
    """The most side of a tile where S and T are in registers together."""
    return 32 if dtype == torch.float64 else 64


def _rows(samples: int) -> tuple[int, int]:
    """Rows and columns of a tile of the epilogue: as few rows as a warp's worth of work in flight allows."""
    columns = _side(samples, 512)
    return max(1, 1024 // columns), columns


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _precision(x: Tensor) -> str:
    """How float32 is multiplied: see docs/triton.md."""
    return os.environ.get("ICSD_TRITON_PRECISION") or ("ieee" if x.dtype == torch.float64 else _accurate(x.device))


@functools.cache
def _accurate(device: torch.device) -> str:
    """The fastest precision of this device that is as good as float32's own."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "tf32x3" if nvidia and torch.cuda.get_device_capability(device) >= (8, 0) else "ieee"

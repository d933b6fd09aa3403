"""Distillation without N x N matrices: a few numbers of each row are saved; the backward pass holds blocks of rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.contract import MAX_STATISTICS, Spec
from icsd.ops.triton.kernels.combine import combine
from icsd.ops.triton.kernels.features import Features
from icsd.ops.triton.kernels.norms import compute_inverse_norms
from icsd.ops.triton.kernels.streamed import (
    finish_row_block,
    new_projections,
    streamed_backward,
    streamed_forward,
)

ROW_BLOCK_BYTES = 1 << 26


def distill(stages: Sequence[Tensor], spec: Spec, saved: Tensor | None) -> Tensor:
    """Return the loss `(groups,)` of stages `(groups, samples, dim)`, and fill `saved` (`saved_shape`) if given."""
    groups, samples, _ = stages[-1].shape
    dtype = compute_dtype(*stages)
    if saved is None:
        inverse_norms = stages[-1].new_empty((groups, len(stages), samples), dtype=dtype)
        statistics = None
    else:
        inverse_norms, statistics = _parts(saved, groups, len(stages), samples)
    *students, teacher = _features(stages, inverse_norms)
    compute_inverse_norms([*students, teacher], spec.eps)
    values = stages[-1].new_empty((groups, len(students), samples), dtype=dtype)
    for k, (student, weight) in enumerate(zip(students, spec.weights, strict=True)):
        of_student = None if statistics is None or spec.loss != "kl" else statistics[:, k]
        streamed_forward(student, teacher, values[:, k], of_student, weight, spec)
    return values.sum((-2, -1))


def distill_backward(
    grad: Tensor, saved: Tensor, stages: Sequence[Tensor], outs: Sequence[Tensor | None], spec: Spec
) -> None:
    """Write the gradients of the stages whose `outs` are not None."""
    groups, samples, _ = stages[-1].shape
    inverse_norms, statistics = _parts(saved, groups, len(stages), samples)
    *students, teacher = _features(stages, inverse_norms)
    most = max(128, ROW_BLOCK_BYTES // max(1, groups * (samples + 1) * saved.dtype.itemsize) // 128 * 128)
    for begin in range(0, samples, most):
        rows = min(most, samples - begin)
        row_block = saved.new_empty((groups, rows, samples + 1))
        projections = new_projections(row_block)
        for k, out in enumerate(outs):
            if out is None:
                continue
            of_teacher = k == len(students)
            for number in range(len(students)) if of_teacher else [k]:
                streamed_backward(
                    students[number],
                    teacher,
                    statistics[:, number] if spec.loss == "kl" else None,
                    row_block,
                    projections,
                    begin,
                    spec.weights[number],
                    spec,
                    of_teacher=of_teacher,
                    add=of_teacher and number > 0,
                )
            finish_row_block(row_block, projections, teacher if of_teacher else students[k], begin, spec.eps)
            combine(row_block, stages[k], out[:, begin : begin + rows], row_block[:, :, samples], grad)


def _features(stages: Sequence[Tensor], inverse_norms: Tensor) -> list[Features]:
    return [Features.of(stage, inverse_norms[:, k]) for k, stage in enumerate(stages)]


def _parts(saved: Tensor, groups: int, stages: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return inverse norms `(groups, stages, samples)` and statistics `(groups, students, MAX_STATISTICS, samples)`."""
    norms, statistics = saved.view(groups, -1).split([stages * samples, (stages - 1) * MAX_STATISTICS * samples], dim=1)
    return norms.unflatten(1, (stages, samples)), statistics.unflatten(1, (stages - 1, MAX_STATISTICS, samples))

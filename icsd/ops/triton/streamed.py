"""Distillation without N x N matrices: rows keep a few numbers, the backward pass makes a panel of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.fused import MAX_STATISTICS, Distillation
from icsd.ops.triton import launch
from icsd.ops.triton.launch import Stage

PANEL_BYTES = 1 << 26


def distill(stages: Sequence[Tensor], how: Distillation, saved: Tensor | None) -> Tensor:
    """The loss `(groups,)` of stages `(groups, samples, features)`; fills `saved` of `saved_shape`, if any."""
    groups, samples, _ = stages[-1].shape
    students = len(stages) - 1
    dtype = compute_dtype(*stages)
    if saved is None:
        norms, statistics = stages[-1].new_empty((groups, len(stages), samples), dtype=dtype), None
    else:
        norms, statistics = _parts(saved, groups, len(stages), samples)
    for k, stage in enumerate(stages):
        launch.inverse_norms(stage, norms[:, k], how.eps)
    *sides, teacher = [Stage(stage, norms[:, k]) for k, stage in enumerate(stages)]
    values = stages[-1].new_empty((groups, students, samples), dtype=dtype)
    for k, (student, weight) in enumerate(zip(sides, how.weights, strict=True)):
        numbers = None if statistics is None or how.loss != "kl" else statistics[:, k]
        launch.measure_streamed(student, teacher, values[:, k], numbers, weight, how)
    return values.sum((-2, -1))


def distill_backward(
    grad: Tensor, saved: Tensor, stages: Sequence[Tensor], outs: Sequence[Tensor | None], how: Distillation
) -> None:
    """Writes the gradients of the stages whose `outs` are not None."""
    groups, samples, _ = stages[-1].shape
    norms, statistics = _parts(saved, groups, len(stages), samples)
    *students, teacher = [Stage(stage, norms[:, k]) for k, stage in enumerate(stages)]
    tile = launch.streamed_columns(samples, saved.dtype)
    most = max(128, PANEL_BYTES // max(1, groups * (samples + 1) * saved.dtype.itemsize) // 128 * 128)
    for begin in range(0, samples, most):
        rows = min(most, samples - begin)
        panel = saved.new_empty((groups, rows, samples + 1))
        projections = saved.new_empty((groups, tile, rows))
        for k, out in enumerate(outs):
            if out is None:
                continue
            of_teacher = k == len(students)
            for number in range(len(students)) if of_teacher else [k]:
                launch.differentiate_streamed(
                    students[number],
                    teacher,
                    statistics[:, number] if how.loss == "kl" else None,
                    panel,
                    projections,
                    begin,
                    how.weights[number],
                    how,
                    of_teacher=of_teacher,
                    add=of_teacher and number > 0,
                )
            launch.project_panel(panel, projections, norms[:, k], begin, how.eps)
            launch.combine(panel, stages[k], out[:, begin : begin + rows], panel[:, :, samples], grad)


def _parts(saved: Tensor, groups: int, stages: int, samples: int) -> tuple[Tensor, Tensor]:
    """Inverse norms `(groups, stages, samples)` and statistics `(groups, students, MAX_STATISTICS, samples)`."""
    norms, statistics = saved.view(groups, -1).split([stages * samples, (stages - 1) * MAX_STATISTICS * samples], dim=1)
    return norms.unflatten(1, (stages, samples)), statistics.unflatten(1, (stages - 1, MAX_STATISTICS, samples))

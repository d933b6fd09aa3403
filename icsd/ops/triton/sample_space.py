"""Distillation by the N x N matrices: they are made, turned into the loss and into the matrices of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.fused import Distillation
from icsd.ops.triton import launch
from icsd.ops.triton.launch import Matrices


def distill(stages: Sequence[Tensor], how: Distillation, slots: Tensor | None) -> Tensor:
    """The loss `(groups,)` of stages `(groups, samples, features)`; fills the slots, if any, of `saved_shape`."""
    *students, teacher = stages
    groups, samples, _ = teacher.shape
    dtype = compute_dtype(*stages)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return teacher.new_empty((groups, *shape), dtype=dtype)

    values = empty(len(students), samples)
    student_matrices = Matrices(empty(samples, samples), empty(samples, dtype=torch.float64))
    statistics = None
    target = empty(samples, samples)
    if slots is not None:
        slots = slots.view(len(stages), groups, samples, samples + 1)
        statistics = empty(5, samples) if how.loss == "kl" else None
        if not how.teacher_gradient:
            target = slots[-1, :, :, :samples]
    teacher_matrices = Matrices(target, empty(samples, dtype=torch.float64))
    launch.gram(teacher, *teacher_matrices, how.eps)
    for k, (student, weight) in enumerate(zip(students, how.weights, strict=True)):
        launch.gram(student, *student_matrices, how.eps)
        launch.measure(student_matrices, teacher_matrices, values[:, k], statistics, weight, how)
        if slots is not None:
            launch.differentiate(
                student_matrices, teacher_matrices, statistics, slots[k], slots[-1], weight, how, first=k == 0
            )
    return values.sum((-2, -1))


def distill_backward(
    grad: Tensor, slots: Tensor, stages: Sequence[Tensor], outs: Sequence[Tensor | None], how: Distillation
) -> None:
    """Writes the gradients of the stages whose `outs` are not None."""
    for slot, stage, out in zip(slots, stages, outs, strict=False):
        if out is not None:
            groups, samples, _ = stage.shape
            matrix = slot.view(groups, samples, samples + 1)
            launch.combine(matrix, stage, out, matrix[:, :, samples], grad)

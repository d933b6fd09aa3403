"""Distillation in sample space: the N x N matrices are computed, then the loss and the matrices of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from icsd.losses.gram import centered, compute_dtype
from icsd.ops.contract import Spec
from icsd.ops.triton.kernels.combine import combine
from icsd.ops.triton.kernels.gram import grams
from icsd.ops.triton.kernels.rows import Gram, rows_backward, rows_forward


def distill(stages: Sequence[Tensor], spec: Spec, saved: Tensor | None) -> Tensor:
    """Return the loss `(groups,)` of stages `(groups, samples, dim)`, and fill `saved` (`saved_shape`) if given."""
    *students, teacher = [centered(stage) for stage in stages] if spec.center else stages
    groups, samples, _ = teacher.shape
    dtype = compute_dtype(*stages)

    def empty(*shape: int) -> Tensor:
        return teacher.new_empty((groups, *shape), dtype=dtype)

    values = empty(len(students), samples)
    matrices = teacher.new_empty((len(students), groups, samples, samples), dtype=dtype)
    inverse_norms = teacher.new_empty((len(stages), groups, samples), dtype=torch.float64)
    target = empty(samples, samples)
    statistics = empty(5, samples) if saved is not None and spec.loss == "kl" else None
    in_one_pass = saved is not None and statistics is None
    if saved is not None:
        saved = saved.view(len(stages), groups, samples, samples + 1)
        if not spec.teacher_gradient:
            target = saved[-1, :, :, :samples]
    grams([*students, teacher], matrices, target, inverse_norms, spec.eps)
    teacher_gram = Gram(target, inverse_norms[-1])
    for k, weight in enumerate(spec.weights):
        student_gram = Gram(matrices[k], inverse_norms[k])
        of_student = values[:, k]
        if not in_one_pass:
            rows_forward(student_gram, teacher_gram, of_student, statistics, weight, spec)
        if saved is not None:
            written = of_student if in_one_pass else None, statistics, saved[k], saved[-1]
            rows_backward(student_gram, teacher_gram, *written, weight, spec, first=k == 0)
    if saved is not None and spec.center:
        _center_matrices(saved if spec.teacher_gradient else saved[:-1])
    return values.sum((-2, -1))


def _center_matrices(saved: Tensor) -> None:
    """Replace [A | r] by [H M H | 1], where M = diag(r) A is symmetric and H = I - 1/N.

    The diagonal is made so that rows sum to 0 after rounding, too: the product with the features would multiply what is
    left by the mean sample.
    """
    matrix = saved[..., :-1] * saved[..., -1:]
    means = matrix.mean(-1, keepdim=True)
    matrix = (matrix - means.mT) - (means - means.mean(-2, keepdim=True))
    saved[..., :-1] = matrix - torch.diag_embed(matrix.sum(-1))
    saved[..., -1] = 1


def distill_backward(
    grad: Tensor, saved: Tensor, stages: Sequence[Tensor], outs: Sequence[Tensor | None], spec: Spec
) -> None:
    """Write the gradients of the stages whose `outs` are not None."""
    for matrix, stage, out in zip(saved, stages, outs, strict=False):
        if out is not None:
            groups, samples, _ = stage.shape
            matrix = matrix.view(groups, samples, samples + 1)
            combine(matrix, stage, out, matrix[:, :, samples], grad)

"""The operator's public functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from icsd.losses import Loss, LossLike, SimilarityLoss, as_loss
from icsd.losses.gram import similarity_from_gram
from icsd.ops import registry

Reduction = Literal["mean", "sum", "none"]

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cross_sample_similarity(
    x: Tensor, other: Tensor | None = None, *, eps: float = 1e-8, backend: str | None = None
) -> Tensor:
    """Cosine similarities S_ij = <x_i, y_j> / (|x_i| |y_j|) of the samples of each group, norms being at least `eps`.

    Args:
        x: Features `(*B, N, D)` of `B` independent groups of `N` samples; float32, float64, bfloat16 or float16.
        other: Features `(*B, M, D)` of other samples y, such as a memory bank; `x` itself by default.
        eps: Least norm. A zero row has similarity 0 and passes no gradient; a row with NaN or Inf, or whose squared
            norm overflows, is NaN in its own row and column.
        backend: One of `icsd.backends()`; by default the best that applies.

    Returns:
        `(*B, N, N)`, or `(*B, N, M)` with another batch; float64 if an input is, float32 otherwise.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: Shapes or devices do not fit, or `eps` or `backend` is not usable.
        RuntimeError: The backend asked for does not take these inputs; the message lists every candidate and why.
    """
    _check_features("x", x)
    _check_eps(eps)
    if other is None:
        return similarity_from_gram(registry.select(backend, [x]).gram(x), eps)
    _check_bank("other", other, "x", x)
    return registry.select(backend, [x, other]).similarity_to(x, other, eps)


def similarity_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    loss: LossLike = "mse",
    *,
    student_bank: Tensor | None = None,
    teacher_bank: Tensor | None = None,
    reduction: Reduction = "mean",
    detach_teacher: bool = True,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    """Loss of a student's cross-sample similarities from a teacher's.

    The similarities of a batch to itself, or of both to banks: S of the student's samples to those of its bank, T of
    the teacher's to those of its own.

    Args:
        student: Features `(*B, N, D_s)`.
        teacher: Features `(*B, N, D_t)` of the same samples.
        loss: The loss as an object, such as `icsd.losses.KL(student_temperature=0.2)`, or by its name with default
            parameters: `"mse"`, `"kl"`, `"smooth_l1"`, `"sp"`, `"cc"`, `"pkt"`, `"cka"`, `"dist"`, `"rkd_distance"`
            or `"rkd_angle"` (`docs/losses.md`). A function that maps the similarities S and T, `(*B, N, N)` each, to
            `(*B)` is a loss, too; the passes over the features stay fused. Only losses of cosine similarities take
            banks: `"mse"`, `"kl"`, `"smooth_l1"`, `"pkt"`, `"dist"` and functions.
        student_bank: Features `(*B, M, D_s)` of M other samples; a gradient flows to them if they require one.
        teacher_bank: Features `(*B, M, D_t)` of the same M samples, as constant as the teacher.
        reduction: `"mean"` over all that is summed, `"sum"`, or `"none"`: each group's mean.
        detach_teacher: Whether the teacher and its bank are constant.
        eps: Least norm, see `cross_sample_similarity`.
        backend: One of `icsd.backends()`; by default the best that applies.

    Returns:
        A scalar, or `(*B)` for `reduction="none"`; float64 if an input is, float32 otherwise. 0 for empty batches.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: Shapes, devices or the loss do not fit.
        RuntimeError: The backend asked for does not take these inputs; the message lists every candidate and why.
    """
    if student_bank is not None or teacher_bank is not None:
        return _distill_to_banks(
            {"student": student, "teacher": teacher, "student_bank": student_bank, "teacher_bank": teacher_bank},
            as_loss(loss),
            reduction,
            detach_teacher,
            eps,
            backend,
        )
    return _distill(
        ("student", "teacher"),
        [student, teacher],
        [1.0],
        as_loss(loss),
        reduction,
        detach_teacher,
        eps,
        backend,
    )


def interstage_distillation_loss(
    stages: Sequence[Tensor],
    loss: LossLike = "mse",
    *,
    weights: Sequence[float] | None = None,
    teacher: int = -1,
    reduction: Reduction = "mean",
    detach_teacher: bool = True,
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    """Interstage cross-sample similarity distillation: Σ_i w_i d(S(X_i), S(X_teacher)) over the other stages.

    After Mao et al., "Learning efficient text-to-image synthesis via interstage cross-sample similarity
    distillation", Sci China Inf Sci 64:120102, 2021. All stages share one pass; the teacher's similarities are computed
    once.

    Args:
        stages: Features `(*B, N, D_i)` of the same samples, coarse to fine; the `D_i` may differ.
        loss: See `similarity_distillation_loss`.
        weights: One for each stage that is not the teacher, in order; 1 by default.
        teacher: Index of the stage that teaches the others.
        reduction: See `similarity_distillation_loss`.
        detach_teacher: Whether the teacher is constant.
        eps: Least norm, see `cross_sample_similarity`.
        backend: One of `icsd.backends()`; by default the best that applies.

    Returns:
        A scalar, or `(*B)` for `reduction="none"`.

    Raises:
        TypeError: A stage is not a floating-point tensor.
        ValueError: Fewer than two stages, or shapes, devices, weights or the loss do not fit.
        RuntimeError: The backend asked for does not take these inputs; the message lists every candidate and why.
    """
    tensors = list(stages)
    names = [f"stages[{i}]" for i in range(len(tensors))]
    if len(tensors) < 2:
        raise ValueError(f"stages must hold at least two: a student and the teacher; got {len(tensors)}")
    if not -len(tensors) <= teacher < len(tensors):
        raise ValueError(f"teacher must index one of the {len(tensors)} stages, got {teacher}")
    tensors.append(tensors.pop(teacher))
    names.append(names.pop(teacher))
    if weights is None:
        weights = [1.0] * (len(tensors) - 1)
    elif len(weights) != len(tensors) - 1:
        raise ValueError(
            f"weights must hold one number for each of the {len(tensors) - 1} students, got {len(weights)}"
        )
    return _distill(names, tensors, list(weights), as_loss(loss), reduction, detach_teacher, eps, backend)


def flatten_samples(maps: Tensor) -> Tensor:
    """A view `(N, D)` of feature maps `(N, ...)`, each sample's values in the order they lie in memory.

    A similarity does not depend on the order of the features, so `channels_last` maps need no copy.
    """
    return maps.permute(0, *(dim for dim in maps.dim_order() if dim)).flatten(1)


def _distill(names, tensors, weights, loss: Loss, reduction, detach_teacher, eps, backend) -> Tensor:
    """Checks everything, then runs a backend; the last of the tensors is the teacher."""
    _check_stages(names, tensors)
    for weight in weights:
        if not -math.inf < weight < math.inf:
            raise ValueError(f"weights must be finite, got {weight}")
    _check_reduction(reduction)
    _check_eps(eps)
    if detach_teacher:
        tensors[-1] = tensors[-1].detach()
    value = registry.select(backend, tensors).distill(tensors, weights, loss, eps)
    n = tensors[-1].shape[-2]
    return _reduce(value, loss.terms(n, n), reduction)


def _distill_to_banks(tensors, loss, reduction, detach_teacher, eps, backend) -> Tensor:
    """The same for similarities to banks."""
    for name, bank in tensors.items():
        if bank is None:
            raise ValueError(f"{name} must be given too: both student and teacher are compared with banks, or neither")
    student, teacher, student_bank, teacher_bank = tensors.values()
    _check_stages(("student", "teacher"), [student, teacher])
    _check_bank("student_bank", student_bank, "student", student)
    _check_bank("teacher_bank", teacher_bank, "teacher", teacher)
    _check_stages(("student_bank", "teacher_bank"), [student_bank, teacher_bank])
    _check_reduction(reduction)
    _check_eps(eps)
    if not isinstance(loss, SimilarityLoss):
        raise ValueError(
            f"loss {loss.name!r} compares the samples of one batch with each other: use it without "
            "banks, or one of cosine similarities such as 'mse' or 'kl' with them"
        )
    if detach_teacher:
        teacher, teacher_bank = teacher.detach(), teacher_bank.detach()
    chosen = registry.select(backend, [student, teacher, student_bank, teacher_bank])
    pairs = ((student, student_bank), (teacher, teacher_bank))
    similarity, target = (chosen.similarity_to(x, bank, eps) for x, bank in pairs)
    dtype = torch.promote_types(similarity.dtype, target.dtype)
    value = loss.to_banks(similarity.to(dtype), target.to(dtype))
    return _reduce(value, loss.terms(*similarity.shape[-2:]), reduction)


def _reduce(loss: Tensor, terms: int, reduction: Reduction) -> Tensor:
    """Of the means of all groups, `(*B)`."""
    if reduction == "sum":
        return loss.sum() * terms
    if reduction == "mean" and loss.dim():
        return loss.sum() / max(1, loss.numel())
    return loss


def _check_stages(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Whether these are features of the same samples."""
    *_, teacher = tensors
    _check_features(names[-1], teacher)
    shape, device = teacher.shape[:-1], teacher.device
    for name, tensor in zip(names, tensors[:-1], strict=False):
        _check_features(name, tensor)
        if tensor.shape[:-1] != shape:
            raise ValueError(
                f"{name} and {names[-1]} must agree in all but the last dimension, got "
                f"{tuple(tensor.shape)} and {tuple(teacher.shape)}: give features of the same samples"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and {names[-1]} on {device}: move them to one device")


def _check_bank(bank_name: str, bank: Tensor, name: str, x: Tensor) -> None:
    """Whether these are features of the same kind, of any samples."""
    _check_features(bank_name, bank)
    if bank.shape[:-2] != x.shape[:-2] or bank.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{bank_name} and {name} must agree in all but the last dimension but one, got "
            f"{tuple(bank.shape)} and {tuple(x.shape)}: give features by the same layer, of any number of samples"
        )
    if bank.device != x.device:
        raise ValueError(f"{bank_name} is on {bank.device} and {name} on {x.device}: move them to one device")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _check_features(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATING:
        raise TypeError(
            f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}: convert it, e.g. .float()"
        )
    if x.dim() < 2:
        raise ValueError(
            f"{name} must have the shape (*B, N, D), got {tuple(x.shape)}: is the batch dimension missing?"
        )


def _check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be a positive finite number, got {eps!r}")

"""The public functions of the operator: they check their arguments, choose a backend and reduce its result."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from icsd.losses import Loss, LossLike, SimilarityLoss, as_loss
from icsd.losses.base import as_number, is_number
from icsd.losses.gram import centered, similarity_from_gram
from icsd.ops import banks, distributed, registry, tuning
from icsd.ops.distributed import ProcessGroupLike

Reduction = Literal["mean", "sum", "none"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cross_sample_similarity(
    x: Tensor,
    other: Tensor | None = None,
    *,
    center: bool = False,
    eps: float = 1e-8,
    backend: str | None = None,
    process_group: ProcessGroupLike | None = None,
) -> Tensor:
    """Return the cosine similarities S_ij = <x_i, y_j> / (max(|x_i|, eps) max(|y_j|, eps)) of the samples of a group.

    Args:
        x: Features `(*B, N, D)` of `B` independent groups of `N` samples; float32, float64, bfloat16 or float16.
        other: Features `(*B, M, D)` of other samples y, such as a memory bank. By default, y is `x`.
        center: True if the mean sample of each group is subtracted from its samples first, from x and y each its own.
            Similarities that would crowd near 1 then spread over [-1, 1]. A NaN makes its whole group NaN.
        eps: The least norm. A zero row has similarity 0 and gradient 0. A row is NaN, and so is its column, if it holds
            NaN or Inf or its squared norm overflows.
        backend: The name of one of `icsd.backends()`. By default, the first one that takes the input.
        process_group: The ranks that have the samples of the batch, see `similarity_distillation_loss`. Not with
            `other`, which needs no communication.

    Returns:
        `(*B, N, N)`, or `(*B, N, M)` with `other`; float64 if an input is float64, float32 otherwise.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: The shapes or devices do not fit, `eps` is not positive and finite, or the backend is unknown.
        RuntimeError: The backend does not take these inputs. The message lists all backends and why they do not.
    """
    if process_group is not None:
        return _similarity_over_ranks(x, other, center, eps, backend, process_group)
    _check_features(("x",), (x,))
    _check_options("none", eps)
    if other is None:
        chosen = registry.select(backend, [x])
        return similarity_from_gram(chosen.gram(centered(x) if center else x), eps)
    _check_bank("other", other, "x", x)
    chosen = registry.select(backend, [x, other])
    if center:
        x, other = centered(x), centered(other)
    return chosen.similarity_to(x, other, eps)


def similarity_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    loss: LossLike = "mse",
    *,
    student_bank: Tensor | None = None,
    teacher_bank: Tensor | None = None,
    center: bool = False,
    reduction: Reduction = "mean",
    detach_teacher: bool = True,
    eps: float = 1e-8,
    backend: str | None = None,
    process_group: ProcessGroupLike | None = None,
) -> Tensor:
    """Return the loss between the cross-sample similarities of a student and those of a teacher.

    The similarities are those of each batch to itself. With banks, they are those of the student's samples to the
    student's bank and those of the teacher's samples to the teacher's bank.

    Args:
        student: Features `(*B, N, D_s)`; float32, float64, bfloat16 or float16.
        teacher: Features `(*B, N, D_t)` of the same samples.
        loss: A loss object such as `icsd.losses.KL(student_temperature=0.2)`; the name of a loss, for its default
            parameters: `"mse"`, `"kl"`, `"smooth_l1"`, `"sp"`, `"cc"`, `"pkt"`, `"cka"`, `"dist"`, `"rkd_distance"` or
            `"rkd_angle"` (see `docs/losses.md`); or a function that maps the similarities S and T, `(*B, N, N)` each,
            to `(*B)`. Banks take the losses of cosine similarities: `"mse"`, `"kl"`, `"smooth_l1"`, `"pkt"`, `"dist"`
            and functions.
        student_bank: Features `(*B, M, D_s)` of M other samples. They get a gradient if they require one.
        teacher_bank: Features `(*B, M, D_t)` of the same M samples.
        center: True if the mean sample of each group is subtracted from its samples before they are compared, see
            `cross_sample_similarity`. A bank has a mean of its own.
        reduction: `"mean"` over all terms, `"sum"`, or `"none"` for the mean of each group.
        detach_teacher: True if the teacher and its bank are constants, which get no gradient.
        eps: The least norm, see `cross_sample_similarity`.
        backend: The name of one of `icsd.backends()`. By default, the first one that takes the input.
        process_group: A process group of `torch.distributed`, or `"world"` for the default one, if the samples of the
            batch are spread over its ranks. Each rank gives its own samples, of any number, and gets the loss of the
            whole batch; banks are the same on all ranks. Averaged over ranks, as `DistributedDataParallel` does, the
            gradients of weights are those of one process (see `docs/distributed.md`). All ranks must make the same
            call.

    Returns:
        A scalar, or `(*B)` with `reduction="none"`; float64 if an input is float64, float32 otherwise. The loss of an
        empty batch is 0.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: The shapes, devices or the loss do not fit, ranks disagree, or another argument is not valid.
        RuntimeError: The backend does not take these inputs. The message lists all backends and why they do not.
    """
    options = (center, reduction, detach_teacher, eps, backend)
    if student_bank is None and teacher_bank is None:
        names, tensors = ("student", "teacher"), [student, teacher]
        if process_group is not None:
            return _over_ranks(lambda: _call(names, tensors, [1.0], as_loss(loss), *options), reduction, process_group)
        return _distill(names, tensors, [1.0], as_loss(loss), *options)
    tensors = {"student": student, "teacher": teacher, "student_bank": student_bank, "teacher_bank": teacher_bank}
    if process_group is not None:
        return _over_ranks(lambda: _call_with_banks(tensors, as_loss(loss), *options), reduction, process_group)
    return _distill_to_banks(tensors, as_loss(loss), *options)


def interstage_distillation_loss(
    stages: Sequence[Tensor],
    loss: LossLike = "mse",
    *,
    weights: Sequence[float] | None = None,
    teacher: int = -1,
    center: bool = False,
    reduction: Reduction = "mean",
    detach_teacher: bool = True,
    eps: float = 1e-8,
    backend: str | None = None,
    process_group: ProcessGroupLike | None = None,
) -> Tensor:
    """Return the interstage distillation loss Σ_i w_i d(S(X_i), S(X_teacher)) over all stages i but the teacher.

    The loss of Mao et al., "Learning efficient text-to-image synthesis via interstage cross-sample similarity
    distillation", Sci China Inf Sci 64:120102, 2021. All stages share one call; the similarities of the teacher are
    computed once.

    Args:
        stages: Features `(*B, N, D_i)` of the same samples, coarse to fine; the `D_i` may differ.
        loss: The loss d, see `similarity_distillation_loss`.
        weights: One weight for each stage that is not the teacher, in order. By default, all are 1.
        teacher: The index of the stage that is the teacher.
        center: See `similarity_distillation_loss`.
        reduction: See `similarity_distillation_loss`.
        detach_teacher: True if the teacher is a constant, which gets no gradient.
        eps: The least norm, see `cross_sample_similarity`.
        backend: The name of one of `icsd.backends()`. By default, the first one that takes the input.
        process_group: The ranks that have the samples of the batch, see `similarity_distillation_loss`.

    Returns:
        A scalar, or `(*B)` with `reduction="none"`; float64 if a stage is float64, float32 otherwise.

    Raises:
        TypeError: A stage is not a floating-point tensor.
        ValueError: There are fewer than two stages, the shapes, devices, weights or the loss do not fit, or another
            argument is not valid.
        RuntimeError: The backend does not take these inputs. The message lists all backends and why they do not.
    """
    options = (center, reduction, detach_teacher, eps, backend)
    if process_group is not None:
        return _over_ranks(
            lambda: _call(*_arrange(stages, weights, teacher), as_loss(loss), *options), reduction, process_group
        )
    return _distill(*_arrange(stages, weights, teacher), as_loss(loss), *options)


def flatten_samples(maps: Tensor) -> Tensor:
    """Return a view `(N, D)` of feature maps `(N, ...)`, with the values of each sample in the order of memory.

    Maps in the `channels_last` format need no copy. The similarities of the samples of one tensor do not depend on the
    order of its features. Samples of two tensors that are compared with each other (`other`, a bank, an
    `icsd.SampleQueue`) need features in the same order, so their maps must have the same memory format.
    """
    return maps.permute(0, *(dim for dim in maps.dim_order() if dim)).flatten(1)


def _arrange(
    stages: Sequence[Tensor], weights: Sequence[float] | None, teacher: int
) -> tuple[list[str], list[Tensor], Sequence[float]]:
    """Return names and features of all stages, the teacher last, and the weights of the students."""
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
    elif is_number(weights) or (isinstance(weights, Tensor) and weights.ndim != 1):
        raise TypeError(f"weights must hold one number for each of the {len(tensors) - 1} students, got {weights!r}")
    elif len(weights) != len(tensors) - 1:
        raise ValueError(
            f"weights must hold one number for each of the {len(tensors) - 1} students, got {len(weights)}"
        )
    else:
        weights = [as_number(f"weights[{i}]", weight) for i, weight in enumerate(weights)]
    return names, tensors, weights


def _distill(
    names, tensors: list[Tensor], weights, loss: Loss, center, reduction, detach_teacher, eps, backend
) -> Tensor:
    """Check all arguments and run a backend. The last tensor is the teacher."""
    chosen = _prepare(names, tensors, weights, reduction, detach_teacher, eps, backend)
    if not tuning.idle:
        chosen = tuning.fastest(chosen, backend, tuning.Call(tensors, weights, loss, eps, center))
    value = chosen.distill(tensors, weights, loss, eps, center)
    if reduction != "sum" and not value.ndim:  # of a single group
        return value
    n = tensors[-1].shape[-2]
    return _reduce(value, loss, (n, n if loss.include_diagonal else n - 1), reduction)


def _prepare(names, tensors: list[Tensor], weights, reduction, detach_teacher, eps, backend) -> registry.Backend:
    """Check all arguments, detach the teacher and return the backend."""
    _check_features(names, tensors)
    for weight in weights:
        if not -math.inf < weight < math.inf:
            raise ValueError(f"weights must be finite, got {weight}")
    _check_options(reduction, eps)
    if detach_teacher:
        tensors[-1] = tensors[-1].detach()
    return registry.select(backend, tensors)


def _call(
    names, tensors: list[Tensor], weights, loss: Loss, center, reduction, detach_teacher, eps, backend
) -> distributed.Call:
    """Check all arguments of a rank. The last tensor is the teacher."""
    chosen = _prepare(names, tensors, weights, reduction, detach_teacher, eps, backend)
    return distributed.Call(names, tensors, weights, loss, center, eps, chosen)


def _call_with_banks(
    tensors: dict[str, Tensor], loss: Loss, center, reduction, detach_teacher, eps, backend
) -> distributed.Call:
    """Check all arguments of a rank with banks."""
    features, chosen = _prepare_banks(tensors, loss, reduction, detach_teacher, eps, backend)
    return distributed.Call([*tensors], features, None, loss, center, eps, chosen)


def _over_ranks(prepare: Callable[[], distributed.Call], reduction, process_group) -> Tensor:
    """Compute the loss of the samples of all ranks. `torch.compile` breaks the graph here."""
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.disable(_over_ranks)(prepare, reduction, process_group)
    return _reduce(*distributed.distill(process_group, prepare, reduction), reduction)


def _similarity_over_ranks(x, other, center, eps, backend, process_group) -> Tensor:
    """Return the similarities of the samples of all ranks. `torch.compile` breaks the graph here."""
    if torch.compiler.is_dynamo_compiling():
        return torch.compiler.disable(_similarity_over_ranks)(x, other, center, eps, backend, process_group)

    def prepare() -> tuple[registry.Backend, Tensor]:
        if other is not None:
            raise ValueError(
                "process_group must be None with other: each rank compares its samples with others as one process does"
            )
        _check_features(("x",), (x,))
        _check_options("none", eps)
        return registry.select(backend, [x]), x

    return similarity_from_gram(distributed.similarity(process_group, prepare, center, eps), eps)


def _distill_to_banks(
    tensors: dict[str, Tensor], loss: Loss, center, reduction, detach_teacher, eps, backend
) -> Tensor:
    """Check all arguments and compute the loss of similarities to banks."""
    features, chosen = _prepare_banks(tensors, loss, reduction, detach_teacher, eps, backend)
    student, teacher, student_bank, teacher_bank = map(centered, features) if center else features
    value = banks.distill(student, teacher, student_bank, teacher_bank, loss, eps, chosen)
    return _reduce(value, loss, (student.shape[-2], student_bank.shape[-2]), reduction)


def _prepare_banks(
    tensors: dict[str, Tensor], loss: Loss, reduction, detach_teacher, eps, backend
) -> tuple[list[Tensor], registry.Backend]:
    """Check all arguments, detach teacher and bank, and return features, banks and the backend."""
    for name, tensor in tensors.items():
        if tensor is None:
            raise ValueError(f"{name} must be given too: both student and teacher are compared with banks, or neither")
    student, teacher, student_bank, teacher_bank = tensors.values()
    _check_features(("student", "teacher"), [student, teacher])
    _check_bank("student_bank", student_bank, "student", student)
    _check_bank("teacher_bank", teacher_bank, "teacher", teacher)
    _check_features(("student_bank", "teacher_bank"), [student_bank, teacher_bank])
    if student_bank.shape[-2] == 0:
        raise ValueError(
            f"student_bank and teacher_bank are empty, got {tuple(student_bank.shape)} and "
            f"{tuple(teacher_bank.shape)}: enqueue some samples before the first loss"
        )
    _check_options(reduction, eps)
    if not isinstance(loss, SimilarityLoss):
        raise ValueError(
            f"loss {loss.name!r} compares the samples of one batch with each other: use it without "
            "banks, or one of cosine similarities such as 'mse' or 'kl' with them"
        )
    if detach_teacher:
        teacher, teacher_bank = teacher.detach(), teacher_bank.detach()
    features = [student, teacher, student_bank, teacher_bank]
    return features, banks.backend_for(backend, features)


def _reduce(values: Tensor, loss: Loss, shape: Sequence[int], reduction: Reduction) -> Tensor:
    """Reduce the means of all groups, `(*B)`, each over matrices of a shape."""
    if reduction == "sum":
        # `torch.func.vmap` over no samples fails at a scalar times a number.
        return (values.flatten().sum(0, keepdim=True) * loss.terms(*shape)).squeeze(0)
    if reduction == "mean" and values.ndim:
        return values.mean() if values.numel() else values.sum()
    return values


def _check_features(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raise an error unless these are features of the same samples on one device."""
    for name, x in zip(names, tensors, strict=True):
        if type(x) is not Tensor and not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}: convert it, e.g. .float()"
            )
        if x.is_nested:
            raise TypeError(
                f"{name} must have samples of one length, got a nested tensor: pad it, e.g. .to_padded_tensor(0)"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got the layout {x.layout}: convert it, e.g. .to_dense()")
        if x.ndim < 2:
            raise ValueError(
                f"{name} must have the shape (*B, N, D), got {tuple(x.shape)}: is the batch dimension missing?"
            )
    *students, teacher = tensors
    shape, device = teacher.shape[:-1], teacher.device
    for name, x in zip(names, students, strict=False):
        if x.shape[:-1] != shape:
            raise ValueError(
                f"{name} and {names[-1]} must agree in all but the last dimension, got "
                f"{tuple(x.shape)} and {tuple(teacher.shape)}: {_remedy({name: x, names[-1]: teacher})}"
            )
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} and {names[-1]} on {device}: move them to one device")


def _remedy(tensors: dict[str, Tensor]) -> str:
    """Return what to give in place of two tensors that are not features of the same samples."""
    x, y = tensors.values()
    for name, maps in tensors.items():
        if maps.dim() == 4 and len(x) == len(y):
            images, channels, height, width = maps.shape
            return (
                f"{name} was understood as {images} x {channels} groups of {height} samples with {width} features. If "
                f"it is maps (B, C, H, W), give {name}.flatten(2).mT to compare the positions of each image, or "
                f"icsd.flatten_samples({name}) to compare the images"
            )
    return "give features of the same samples"


def _check_bank(bank_name: str, bank: Tensor, name: str, x: Tensor) -> None:
    """Raise an error unless the bank and `x` differ only in the number of samples."""
    _check_features((bank_name,), (bank,))
    if bank.shape[:-2] != x.shape[:-2] or bank.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{bank_name} and {name} must agree in all but the last dimension but one, got "
            f"{tuple(bank.shape)} and {tuple(x.shape)}: give features by the same layer, of any number of samples"
        )
    if bank.device != x.device:
        raise ValueError(f"{bank_name} is on {bank.device} and {name} on {x.device}: move them to one device")


def _check_options(reduction: str, eps: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if (type(eps) is not float and not is_number(eps)) or not 0 < eps < math.inf:  # the first check takes no call
        raise ValueError(f"eps must be a positive finite number, got {eps!r}")

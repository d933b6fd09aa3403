"""The distillation losses, as functions of the Gram matrices of a student and a teacher.

Each loss is a frozen dataclass of its parameters with its definition in plain PyTorch. A backend that has a kernel for
a loss finds it by `name` and `kernel_parameters()` (`csrc/core/losses.h` holds the same mathematics); for the other
losses it computes the Gram matrices and leaves the rest to the definition. `docs/losses.md` lists all losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from icsd.losses.base import CustomLoss, Loss, SimilarityLoss
from icsd.losses.correlations import CKA, DIST, SP
from icsd.losses.distributions import KL, PKT
from icsd.losses.elementwise import CC, MSE, SmoothL1
from icsd.losses.gram import compute_dtype
from icsd.losses.relations import RKDAngle, RKDDistance

__all__ = [
    "BUILT_IN",
    "CC",
    "CKA",
    "DIST",
    "KL",
    "LOSSES",
    "MSE",
    "PKT",
    "SP",
    "CustomLoss",
    "Loss",
    "LossLike",
    "RKDAngle",
    "RKDDistance",
    "SimilarityLoss",
    "SmoothL1",
    "as_loss",
    "distill_grams",
    "distill_to_banks",
    "make_loss",
]

LOSSES: dict[str, type[Loss]] = {
    cls.name: cls for cls in (MSE, KL, SmoothL1, SP, CC, PKT, CKA, DIST, RKDDistance, RKDAngle)
}
BUILT_IN = frozenset(LOSSES.values())
"""The classes that kernels compute by name. A class derived from one of them may have other mathematics."""

_DEFAULTS = {name: cls() for name, cls in LOSSES.items()}
_PARAMETERS = {name: [field.name for field in dataclasses.fields(cls)] for name, cls in LOSSES.items()}

LossLike: TypeAlias = str | Loss | Callable[[Tensor, Tensor], Tensor]
"""A loss by its name, as an object, or as a function of the similarities S and T."""


def as_loss(loss: LossLike) -> Loss:
    """Return the loss object: the one given, the default one of a name, or the one that wraps a function.

    Raises:
        ValueError: The name is unknown, or `loss` is the class of a loss instead of an object.
    """
    if (type(loss) is str or isinstance(loss, str)) and loss in _DEFAULTS:  # the first check takes no call
        return _DEFAULTS[loss]
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, type) and issubclass(loss, Loss):
        raise ValueError(f"loss must be an object, got the class {loss.__name__}: write {loss.__name__}()")
    if callable(loss):
        return CustomLoss(loss)
    names = ", ".join(map(repr, LOSSES))
    raise ValueError(
        f"loss must be one of {names}, a loss object such as icsd.losses.KL(), or a function of (S, T), got {loss!r}"
    )


def make_loss(name: str, /, **parameters: bool | float | str) -> Loss:
    """Make the loss of a name with its parameters, as configurations give them.

    Raises:
        ValueError: The name or a parameter is unknown, or a value is out of range.
    """
    if name not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))}, got {name!r}")
    known = _PARAMETERS[name]
    for parameter in parameters:
        if parameter not in known:
            takes = ", ".join(known) if known else "none"
            raise ValueError(f"loss {name!r} has no parameter {parameter!r}; it takes {takes}")
    return LOSSES[name](**parameters)


def distill_grams(grams: Sequence[Tensor], weights: Sequence[float], loss: Loss, eps: float) -> Tensor:
    """Return Σ_k w_k d(K_k, K_t) of Gram matrices `(*B, N, N)`, the last of which is the teacher's: `(*B)`."""
    dtype = compute_dtype(*grams)
    *students, teacher = (_with_groups(gram.to(dtype), loss) for gram in grams)
    losses = [
        weight * loss.from_grams(student, teacher, eps).unsqueeze(0)
        for weight, student in zip(weights, students, strict=True)
    ]
    return torch.cat(losses).sum(0).reshape(grams[0].shape[:-2])


def distill_to_banks(similarity: Tensor, target: Tensor, loss: SimilarityLoss) -> Tensor:
    """Return d(S, T) of similarities to banks, `(*B, N, M)` each: `(*B)`."""
    dtype = compute_dtype(similarity, target)
    value = loss.to_banks(_with_groups(similarity.to(dtype), loss), _with_groups(target.to(dtype), loss))
    return value.reshape(similarity.shape[:-2])


def _with_groups(matrix: Tensor, loss: Loss) -> Tensor:
    """Give a matrix without groups a dimension of one group.

    Then losses need no arithmetic of scalars and numbers, at which `torch.func.vmap` fails over no samples. A user's
    function takes matrices as they are.
    """
    return matrix.unsqueeze(0) if matrix.dim() == 2 and not isinstance(loss, CustomLoss) else matrix

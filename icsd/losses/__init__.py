"""Losses of a student's samples from a teacher's, as functions of their Gram matrices.

Each is a frozen dataclass of its parameters with its definition in plain PyTorch. A backend that has a kernel for one
knows it by `name` and `kernel_parameters()` (`csrc/core/losses.h` holds the same mathematics); for the others it
computes the Gram matrices and leaves the rest to the definition. `docs/losses.md` lists them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from icsd.losses.base import CustomLoss, Loss, SimilarityLoss
from icsd.losses.correlations import CKA, DIST, SP
from icsd.losses.distributions import KL, PKT
from icsd.losses.elementwise import CC, MSE, SmoothL1
from icsd.losses.gram import compute_dtype
from icsd.losses.relations import RKDAngle, RKDDistance

__all__ = [
    "CC",
    "CKA",
    "DIST",
    "KERNELS",
    "KL",
    "LOSSES",
    "MSE",
    "PKT",
    "SP",
    "CustomLoss",
    "Loss",
    "RKDAngle",
    "RKDDistance",
    "SimilarityLoss",
    "SmoothL1",
    "distill_grams",
    "make_loss",
]

LOSSES: dict[str, type[Loss]] = {
    cls.name: cls for cls in (MSE, KL, SmoothL1, SP, CC, PKT, CKA, DIST, RKDDistance, RKDAngle)
}
# Those of csrc/core/losses.h, by their LossKind.
KERNELS = {"mse": 0, "kl": 1, "smooth_l1": 2, "sp": 3, "cc": 4, "pkt": 5, "dist": 6}
_PARAMETERS = {name: [field.name for field in dataclasses.fields(cls)] for name, cls in LOSSES.items()}


def make_loss(loss: str | Callable[[Tensor, Tensor], Tensor], /, **parameters: float | str) -> Loss:
    """The loss of this name with its parameters, or a user's own function.

    Raises:
        ValueError: Unknown name, unknown parameter or a value out of range.
    """
    if callable(loss):
        known, make, label = [], lambda: CustomLoss(loss), "a function"
    elif loss in LOSSES:
        known, make, label = _PARAMETERS[loss], LOSSES[loss], repr(loss)
    else:
        names = ", ".join(map(repr, LOSSES))
        raise ValueError(f"loss must be one of {names} or a function of (S, T), got {loss!r}")
    unknown = [parameter for parameter in parameters if parameter not in known]
    if unknown:
        takes = ", ".join(known) if known else "none"
        raise ValueError(f"loss {label} has no parameter {unknown[0]!r}; it takes {takes}")
    return make(**parameters)


def distill_grams(grams: Sequence[Tensor], weights: Sequence[float], loss: Loss, eps: float) -> Tensor:
    """Σ_k w_k d(K_k, K_t) of Gram matrices `(*B, N, N)`, the teacher's being the last, for every group: `(*B)`."""
    dtype = compute_dtype(*grams)
    *students, teacher = (gram.to(dtype) for gram in grams)
    losses = [
        weight * loss.from_grams(student, teacher, eps) for weight, student in zip(weights, students, strict=True)
    ]
    return torch.stack(losses).sum(0)

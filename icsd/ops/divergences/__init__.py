"""Divergences of a student's samples from a teacher's, as functions of their Gram matrices.

Each is a frozen dataclass of its parameters with its definition in plain PyTorch. A backend that has a kernel for one
knows it by `name` and `kernel_parameters()` (`csrc/core/divergence.h` holds the same mathematics); for the others it
computes the Gram matrices and leaves the rest to the definition. `docs/losses.md` lists them all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from icsd.ops.divergences.base import Custom, Divergence, SimilarityDivergence
from icsd.ops.divergences.correlations import CKA, DIST, SP
from icsd.ops.divergences.distributions import KL, PKT
from icsd.ops.divergences.elementwise import CC, MSE, SmoothL1
from icsd.ops.divergences.relations import RKDAngle, RKDDistance
from icsd.ops.gram import compute_dtype

__all__ = [
    "CC",
    "CKA",
    "DIST",
    "DIVERGENCES",
    "KERNELS",
    "KL",
    "MSE",
    "PKT",
    "SP",
    "Custom",
    "Divergence",
    "RKDAngle",
    "RKDDistance",
    "SimilarityDivergence",
    "SmoothL1",
    "distill_grams",
    "make_divergence",
]

DIVERGENCES: dict[str, type[Divergence]] = {
    cls.name: cls for cls in (MSE, KL, SmoothL1, SP, CC, PKT, CKA, DIST, RKDDistance, RKDAngle)
}
# Those of csrc/core/divergence.h, by their DivergenceKind.
KERNELS = {"mse": 0, "kl": 1, "smooth_l1": 2, "sp": 3, "cc": 4, "pkt": 5, "dist": 6}
_PARAMETERS = {name: [field.name for field in dataclasses.fields(cls)] for name, cls in DIVERGENCES.items()}


def make_divergence(divergence: str | Callable[[Tensor, Tensor], Tensor], /, **parameters: float | str) -> Divergence:
    """The divergence of this name with its parameters, or a user's own function.

    Raises:
        ValueError: Unknown name, unknown parameter or a value out of range.
    """
    if callable(divergence):
        known, make, label = [], lambda: Custom(divergence), "a function"
    elif divergence in DIVERGENCES:
        known, make, label = _PARAMETERS[divergence], DIVERGENCES[divergence], repr(divergence)
    else:
        names = ", ".join(map(repr, DIVERGENCES))
        raise ValueError(f"divergence must be one of {names} or a function of (S, T), got {divergence!r}")
    unknown = [parameter for parameter in parameters if parameter not in known]
    if unknown:
        takes = ", ".join(known) if known else "none"
        raise ValueError(f"divergence {label} has no parameter {unknown[0]!r}; it takes {takes}")
    return make(**parameters)


def distill_grams(grams: Sequence[Tensor], weights: Sequence[float], divergence: Divergence, eps: float) -> Tensor:
    """Σ_k w_k d(K_k, K_t) of Gram matrices `(*B, N, N)`, the teacher's being the last, for every group: `(*B)`."""
    dtype = compute_dtype(*grams)
    *students, teacher = (gram.to(dtype) for gram in grams)
    losses = [
        weight * divergence.from_grams(student, teacher, eps) for weight, student in zip(weights, students, strict=True)
    ]
    return torch.stack(losses).sum(0)

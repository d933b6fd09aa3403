"""Divergences between a student's and a teacher's similarity matrices.

Each is a frozen dataclass of its parameters with the plain PyTorch definition as `forward`. The fused backends know a
divergence by `name` and `parameters()`; `csrc/core/divergence.h` holds the same mathematics.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Divergence(ABC):
    """A function d(S, T) of two `(*B, N, N)` similarity matrices, one value for each of the `B` groups."""

    name: ClassVar[str]

    def parameters(self) -> list[float]:
        """The parameters in the order the native code reads them."""
        return [float(getattr(self, parameter)) for parameter in PARAMETERS[self.name]]

    @abstractmethod
    def terms(self, n: int) -> int:
        """How many terms the mean over a group of `n` samples averages: what turns it into a sum."""

    @abstractmethod
    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        """The mean over each group; 0 for an empty one.

        Args:
            similarity: The student's S, `(*B, N, N)`.
            target: The teacher's T, `(*B, N, N)`.

        Returns:
            `(*B)`.
        """


def _positive(owner: str, **values: float) -> None:
    for argument, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{owner}: {argument} must be a positive finite number, got {value!r}")


@dataclasses.dataclass(frozen=True)
class MSE(Divergence):
    """mean_ij (S_ij - T_ij)²."""

    name: ClassVar[str] = "mse"

    def terms(self, n: int) -> int:
        return n * n

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        return (similarity - target).square().sum((-2, -1)) / max(1, self.terms(similarity.shape[-1]))


@dataclasses.dataclass(frozen=True)
class SmoothL1(Divergence):
    """mean_ij h(S_ij - T_ij) with h(x) = x²/(2β) where |x| < β, |x| - β/2 elsewhere.

    Attributes:
        beta: Width of the quadratic zone.
    """

    name: ClassVar[str] = "smooth_l1"
    beta: float = 1.0

    def __post_init__(self) -> None:
        _positive("smooth_l1", beta=self.beta)

    def terms(self, n: int) -> int:
        return n * n

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        loss = F.smooth_l1_loss(similarity, target, reduction="none", beta=self.beta)
        return loss.sum((-2, -1)) / max(1, self.terms(similarity.shape[-1]))


@dataclasses.dataclass(frozen=True)
class KL(Divergence):
    """mean_i KL(softmax_j(T_ij / τ_t) || softmax_j(S_ij / τ_s)).

    Attributes:
        student_temperature: τ_s.
        teacher_temperature: τ_t.
        include_diagonal: Whether each sample's similarity with itself takes part in its row.
    """

    name: ClassVar[str] = "kl"
    student_temperature: float = 0.1
    teacher_temperature: float = 0.1
    include_diagonal: bool = True

    def __post_init__(self) -> None:
        _positive("kl", student_temperature=self.student_temperature, teacher_temperature=self.teacher_temperature)

    def terms(self, n: int) -> int:
        return n

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        n = similarity.shape[-1]
        if not self.include_diagonal:
            similarity, target = _off_diagonal(similarity), _off_diagonal(target)
        log_p = F.log_softmax(similarity / self.student_temperature, dim=-1)
        log_q = F.log_softmax(target / self.teacher_temperature, dim=-1)
        return (log_q.exp() * (log_q - log_p)).sum((-2, -1)) / max(1, self.terms(n))


def _off_diagonal(matrix: Tensor) -> Tensor:
    """`(*B, N, N)` without its diagonal: `(*B, N, max(N - 1, 0))`."""
    n = matrix.shape[-1]
    if n == 0:
        return matrix
    rows = torch.arange(n, device=matrix.device).unsqueeze(1)
    columns = torch.arange(n - 1, device=matrix.device).unsqueeze(0)
    columns = (columns + (columns >= rows)).expand(*matrix.shape[:-2], n, n - 1)
    return matrix.gather(-1, columns)


DIVERGENCES: dict[str, type[Divergence]] = {cls.name: cls for cls in (MSE, KL, SmoothL1)}
PARAMETERS = {name: [field.name for field in dataclasses.fields(cls)] for name, cls in DIVERGENCES.items()}


def make_divergence(name: str, /, **parameters: float) -> Divergence:
    """The divergence `name` with its parameters.

    Raises:
        ValueError: Unknown name, unknown parameter or a value out of range.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, DIVERGENCES))}, got {name!r}")
    known = PARAMETERS[name]
    unknown = [parameter for parameter in parameters if parameter not in known]
    if unknown:
        raise ValueError(
            f"divergence {name!r} has no parameter {unknown[0]!r}; it takes {', '.join(known) if known else 'none'}"
        )
    return DIVERGENCES[name](**parameters)

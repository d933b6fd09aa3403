"""Divergences of a student's samples from a teacher's, as functions of their Gram matrices.

Each is a frozen dataclass of its parameters with its definition in plain PyTorch. A backend that has a kernel for one
knows it by `name` and `parameters()` (`csrc/core/divergence.h` holds the same mathematics); for the others it computes
the Gram matrices and leaves the rest to the definition.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from icsd.ops.gram import compute_dtype, similarity_from_gram


@dataclasses.dataclass(frozen=True)
class Divergence(ABC):
    """A function of two `(*B, N, N)` Gram matrices, one value for each of the `B` groups."""

    name: ClassVar[str]

    def parameters(self) -> list[float]:
        """The parameters in the order the native code reads them."""
        return [float(getattr(self, parameter)) for parameter in PARAMETERS[self.name]]

    @abstractmethod
    def terms(self, n: int) -> int:
        """How many terms the mean over a group of `n` samples averages: what turns it into a sum."""

    @abstractmethod
    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        """The mean over each group; 0 for an empty one.

        Args:
            student: K_s, `(*B, N, N)`.
            teacher: K_t, `(*B, N, N)`.
            eps: Least norm of a sample.

        Returns:
            `(*B)`.
        """


@dataclasses.dataclass(frozen=True)
class SimilarityDivergence(Divergence):
    """A divergence of the cosine similarities."""

    @abstractmethod
    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        """The mean over each group of d(S, T); 0 for an empty one: two `(*B, N, N)` to `(*B)`."""

    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        return self.forward(similarity_from_gram(student, eps), similarity_from_gram(teacher, eps))


def _positive(owner: str, **values: float) -> None:
    for argument, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{owner}: {argument} must be a positive finite number, got {value!r}")


@dataclasses.dataclass(frozen=True)
class MSE(SimilarityDivergence):
    """mean_ij (S_ij - T_ij)²."""

    name: ClassVar[str] = "mse"

    def terms(self, n: int) -> int:
        return n * n

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        return (similarity - target).square().sum((-2, -1)) / max(1, self.terms(similarity.shape[-1]))


@dataclasses.dataclass(frozen=True)
class SmoothL1(SimilarityDivergence):
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
class KL(SimilarityDivergence):
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


@dataclasses.dataclass(frozen=True)
class Custom(SimilarityDivergence):
    """A user's own d(S, T).

    Attributes:
        function: Two `(*B, N, N)` matrices of similarities to `(*B)`, differentiable by autograd.
    """

    name: ClassVar[str] = "custom"
    function: Callable[[Tensor, Tensor], Tensor]

    def terms(self, n: int) -> int:
        return 1

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        loss = self.function(similarity, target)
        if loss.shape != similarity.shape[:-2]:
            raise ValueError(
                f"divergence must map two {tuple(similarity.shape)} matrices to {tuple(similarity.shape[:-2])}, one "
                f"value for each group; it returned {tuple(loss.shape)}"
            )
        return loss


DIVERGENCES: dict[str, type[Divergence]] = {cls.name: cls for cls in (MSE, KL, SmoothL1)}
PARAMETERS = {name: [field.name for field in dataclasses.fields(cls)] for name, cls in DIVERGENCES.items()}


def make_divergence(divergence: str | Callable[[Tensor, Tensor], Tensor], /, **parameters: float) -> Divergence:
    """The divergence of this name with its parameters, or a user's own function.

    Raises:
        ValueError: Unknown name, unknown parameter or a value out of range.
    """
    if callable(divergence):
        known, make, label = [], lambda: Custom(divergence), "a function"
    elif divergence in DIVERGENCES:
        known, make, label = PARAMETERS[divergence], DIVERGENCES[divergence], repr(divergence)
    else:
        names = ", ".join(map(repr, DIVERGENCES))
        raise ValueError(f"divergence must be one of {names} or a function of (S, T), got {divergence!r}")
    unknown = [parameter for parameter in parameters if parameter not in known]
    if unknown:
        takes = ", ".join(known) if known else "none"
        raise ValueError(f"divergence {label} has no parameter {unknown[0]!r}; it takes {takes}")
    return make(**parameters)


def distill_grams(
    students: Sequence[Tensor], teacher: Tensor, weights: Sequence[float], divergence: Divergence, eps: float
) -> Tensor:
    """Σ_k w_k d(K_k, K_t) of Gram matrices `(*B, N, N)`, for every group: `(*B)`."""
    dtype = compute_dtype(teacher, *students)
    losses = [
        weight * divergence.from_grams(student.to(dtype), teacher.to(dtype), eps)
        for weight, student in zip(weights, students, strict=True)
    ]
    return torch.stack(losses).sum(0)

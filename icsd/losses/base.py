"""What a loss is: a frozen dataclass of its parameters with its definition in plain PyTorch."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor

from icsd.losses.gram import similarity_from_gram

# Differences of equal entries of a Gram matrix, in units of rounding of the entries: nothing can be read from less.
NOISE = 8


@dataclasses.dataclass(frozen=True)
class Loss(ABC):
    """A function of two `(*B, N, N)` Gram matrices, one value for each of the `B` groups."""

    name: ClassVar[str]

    def kernel_parameters(self) -> list[float] | None:
        """What `csrc/core/losses.h` takes to make this one, or None if it holds no such loss."""
        return None

    @classmethod
    def from_kernel_parameters(cls, parameters: Sequence[float]) -> Loss:
        """The loss whose `kernel_parameters` these are."""
        return cls(*parameters)

    @abstractmethod
    def terms(self, rows: int, columns: int) -> int:
        """How many terms the mean over a `(rows, columns)` matrix averages: what turns it into a sum."""

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
class SimilarityLoss(Loss):
    """A loss of the cosine similarities, of a batch to itself or to a bank."""

    @abstractmethod
    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        """The mean over each group of d(S, T); 0 for an empty one: two `(*B, N, N)` to `(*B)`."""

    def to_banks(self, similarity: Tensor, target: Tensor) -> Tensor:
        """The same of similarities to the M samples of banks, among which no sample meets itself: two `(*B, N, M)`."""
        return self.forward(similarity, target)

    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        return self.forward(similarity_from_gram(student, eps), similarity_from_gram(teacher, eps))


@dataclasses.dataclass(frozen=True)
class CustomLoss(SimilarityLoss):
    """A user's own d(S, T).

    Attributes:
        function: Two matrices of similarities, `(*B, N, N)` or `(*B, N, M)` to banks, to `(*B)`, differentiable by
            autograd.
    """

    name: ClassVar[str] = "custom"
    function: Callable[[Tensor, Tensor], Tensor]

    def terms(self, rows: int, columns: int) -> int:
        return 1

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        loss = self.function(similarity, target)
        if loss.shape != similarity.shape[:-2]:
            raise ValueError(
                f"loss must map two {tuple(similarity.shape)} matrices to {tuple(similarity.shape[:-2])}, one "
                f"value for each group; it returned {tuple(loss.shape)}"
            )
        return loss


def require_positive(owner: str, **values: float) -> None:
    """Raises a ValueError that names the first parameter which is not a positive finite number."""
    for parameter, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{owner}: {parameter} must be a positive finite number, got {value!r}")


def require_choice(owner: str, choices: tuple[str, ...], **values: str) -> None:
    """Raises a ValueError that names the first parameter whose value is none of the choices."""
    for parameter, value in values.items():
        if value not in choices:
            raise ValueError(f"{owner}: {parameter} must be {' or '.join(map(repr, choices))}, got {value!r}")

"""The base classes of the losses."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from icsd.losses.gram import similarity_from_gram

# Smaller differences of entries of a Gram matrix, in units of their rounding, count as 0.
NOISE = 8


@dataclasses.dataclass(frozen=True)
class Loss(ABC):
    """A loss: a frozen dataclass of its parameters with its definition in plain PyTorch.

    A loss is a function of the Gram matrices of a student and a teacher and has one value for each group. Kernels
    compute the classes of this package; a class that is derived from one of them is computed by its own definition.
    """

    name: ClassVar[str]
    # Each sample is compared with itself, too. A loss that can leave that out has a field of this name. (With an
    # annotation here, that field would come first.)
    include_diagonal = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                object.__setattr__(self, field.name, as_number(f"{self.name}: {field.name}", value))
        if not isinstance(self.include_diagonal, bool):
            raise ValueError(f"{self.name}: include_diagonal must be True or False, got {self.include_diagonal!r}")

    @property
    def in_feature_space(self) -> bool:
        """True if the regime `"feature"` of a backend, where it has one for this name, computes this loss."""
        return True

    def kernel_parameters(self) -> tuple[float, ...] | None:
        """Return the parameters of the kernels of `csrc/core/losses.h`, or None if there are none for this loss."""
        return None

    @classmethod
    def from_kernel_parameters(cls, parameters: Sequence[float]) -> Loss:
        """Return the loss with these `kernel_parameters`."""
        *others, include_diagonal = parameters
        return cls(*others, include_diagonal=bool(include_diagonal))

    @abstractmethod
    def terms(self, rows: int, columns: int) -> int:
        """Return the number of terms that the mean over a `(rows, columns)` matrix averages.

        A matrix without its diagonal has a column less.
        """

    @abstractmethod
    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        """Return the mean over each group, which is 0 for an empty one.

        Args:
            student: The Gram matrices K of the student, `(*B, N, N)`.
            teacher: The Gram matrices L of the teacher, `(*B, N, N)`.
            eps: The least norm of a sample.

        Returns:
            `(*B)` in the dtype of the matrices.
        """

    def compared(self, *matrices: Tensor) -> tuple[Tensor, ...]:
        """Return the matrices `(*B, N, N)`, or `(*B, N, N - 1)` without the diagonal if the loss leaves it out."""
        return matrices if self.include_diagonal else tuple(map(_off_diagonal, matrices))


@dataclasses.dataclass(frozen=True)
class SimilarityLoss(Loss):
    """A loss of cosine similarities. It can compare a batch with itself or with a bank."""

    @abstractmethod
    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        """Return the mean of d(S, T) over each group, `(*B)`, of S and T, `(*B, N, M)` each; 0 for an empty group."""

    def to_banks(self, similarity: Tensor, target: Tensor) -> Tensor:
        """Return the same from similarities to the M samples of banks, `(*B, N, M)` each.

        No sample is compared with itself there.

        Raises:
            ValueError: The loss leaves out the diagonal.
        """
        if not self.include_diagonal:
            raise ValueError(
                f"{self.name}: include_diagonal must be True with banks, got False: no sample meets itself there"
            )
        return self.forward(similarity, target)

    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        similarities = similarity_from_gram(student, eps), similarity_from_gram(teacher, eps)
        return self.forward(*self.compared(*similarities))


@dataclasses.dataclass(frozen=True)
class CustomLoss(SimilarityLoss):
    """A loss by a function of the user.

    Attributes:
        function: It maps the similarities S and T, `(*B, N, N)` each, or `(*B, N, M)` with banks, to `(*B)`. It must be
            differentiable by autograd.
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


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Return `(*B, N, N)` without its diagonal: `(*B, N, max(N - 1, 0))`."""
    n = matrix.shape[-1]
    if n == 0:
        return matrix
    rows = torch.arange(n, device=matrix.device).unsqueeze(1)
    columns = torch.arange(n - 1, device=matrix.device).unsqueeze(0)
    columns = (columns + (columns >= rows)).expand(*matrix.shape[:-2], n, n - 1)
    return matrix.gather(-1, columns)


def as_number(name: str, value: float | Tensor) -> float:
    """Return a parameter as a number.

    Raises:
        TypeError: It is no number, a tensor that requires a gradient, which no kernel computes, or a tensor of several
            elements.
    """
    if isinstance(value, Tensor):
        if value.requires_grad or value.numel() != 1:
            raise TypeError(
                f"{name} must be a number without a gradient, got a tensor {tuple(value.shape)} with requires_grad="
                f"{value.requires_grad}: give a float, or a loss function of (S, T) that uses the tensor"
            )
        return value.item()
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def is_number(value: object) -> bool:
    """Return whether a value is a real number. A string such as "1e-1", as YAML reads it, is not."""
    return isinstance(value, Real)


def require_positive(owner: str, **values: float) -> None:
    """Raise a ValueError that names the first parameter that is not a positive finite number."""
    for parameter, value in values.items():
        if not is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{owner}: {parameter} must be a positive finite number, got {value!r}")


def require_choice(owner: str, choices: tuple[str, ...], **values: str) -> None:
    """Raise a ValueError that names the first parameter whose value is none of the choices."""
    for parameter, value in values.items():
        if value not in choices:
            raise ValueError(f"{owner}: {parameter} must be {' or '.join(map(repr, choices))}, got {value!r}")

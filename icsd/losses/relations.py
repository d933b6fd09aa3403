"""Relational knowledge distillation: losses of the distances and angles between samples."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from icsd.losses.base import NOISE, Loss, require_choice
from icsd.losses.gram import diagonal

# The number of angles that are held at once, unless those of a single vertex are more.
_ANGLES = 2**20


@dataclasses.dataclass(frozen=True)
class RKDDistance(Loss):
    """The mean Huber loss between the relative distances d_ij/μ of student and teacher.

    d_ij = |x_i - x_j| is a distance of samples and μ the mean of all distances. The loss of Park et al., "Relational
    Knowledge Distillation", CVPR 2019.

    Attributes:
        mode: `"paper"` averages over the N(N - 1) pairs of different samples, for the loss and for μ. `"code"`, the
            authors' code, averages over all N² pairs for the loss and over those with d_ij > 0 for μ.
    """

    name: ClassVar[str] = "rkd_distance"
    mode: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        require_choice(self.name, ("paper", "code"), mode=self.mode)

    def terms(self, rows: int, columns: int) -> int:
        return rows * (rows - 1) if self.mode == "paper" else rows * columns

    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        loss = F.smooth_l1_loss(self._relative(student), self._relative(teacher), reduction="none")
        return loss.sum((-2, -1)) / max(1, self.terms(*student.shape[-2:]))

    def _relative(self, gram: Tensor) -> Tensor:
        square, same = _squared_distances(gram)
        distance = square.sqrt().masked_fill(same, 0)
        pairs = max(1, self.terms(*gram.shape[-2:])) if self.mode == "paper" else (~same).sum((-2, -1)).clamp(min=1)
        mean = distance.sum((-2, -1)) / pairs
        return distance / mean.masked_fill(mean == 0, 1)[..., None, None]


@dataclasses.dataclass(frozen=True)
class RKDAngle(Loss):
    """The mean Huber loss between cos∠(x_i x_j x_k) of student and teacher over all triplets of samples.

    The loss of Park et al., "Relational Knowledge Distillation", CVPR 2019. It takes O(N³) time. For large batches it
    takes O(N²) memory: angles are computed again for the gradient. The angle at coincident samples has cosine 0.

    Attributes:
        mode: `"paper"` averages over the N(N - 1)(N - 2) triplets of different samples. `"code"`, the authors' code,
            averages over all N³.
    """

    name: ClassVar[str] = "rkd_angle"
    mode: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        require_choice(self.name, ("paper", "code"), mode=self.mode)

    def terms(self, rows: int, columns: int) -> int:
        return rows * (rows - 1) * (rows - 2) if self.mode == "paper" else rows**3

    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        n = student.shape[-1]
        matrices = (student, _inverse_distances(student), teacher, _inverse_distances(teacher))
        vertices = max(1, _ANGLES // max(1, student.numel()))
        if vertices >= n or torch._C._are_functorch_transforms_active():  # which do not take `checkpoint`
            loss = self._at_vertices(*matrices, 0, n)
        else:
            loss = torch.stack(
                [
                    checkpoint(
                        self._at_vertices,
                        *matrices,
                        start,
                        min(start + vertices, n),
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                    for start in range(0, n, vertices)
                ]
            ).sum(0)
        return loss / max(1, self.terms(n, n))

    def _at_vertices(
        self, student: Tensor, inverse_s: Tensor, teacher: Tensor, inverse_t: Tensor, start: int, stop: int
    ) -> Tensor:
        """Return the sum over the angles at the vertices from `start` to `stop`, `(*B)`, of matrices `(*B, N, N)`."""
        cosines = (_cosines(student, inverse_s, start, stop), _cosines(teacher, inverse_t, start, stop))
        loss = F.smooth_l1_loss(*cosines, reduction="none")
        total = loss.sum((-3, -2, -1))
        if self.mode == "paper":
            total = total - diagonal(loss).sum((-2, -1))
        return total


def _cosines(gram: Tensor, inverse: Tensor, start: int, stop: int) -> Tensor:
    """Return <x_i - x_j, x_k - x_j> / (d_ij d_kj) at vertices j from `start` to `stop`: `(*B, stop - start, N, N)`."""
    at_vertex, inverse = gram[..., start:stop, :], inverse[..., start:stop, :]
    square = diagonal(gram)[..., start:stop]
    products = (gram.unsqueeze(-3) - at_vertex.unsqueeze(-1)) + (square.unsqueeze(-1) - at_vertex).unsqueeze(-2)
    return products * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)


def _inverse_distances(gram: Tensor) -> Tensor:
    """Return 1 / d_ij, 0 for coincident samples."""
    square, same = _squared_distances(gram)
    return square.rsqrt().masked_fill(same, 0)


def _squared_distances(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return d_ij² = K_ii + K_jj - 2 K_ij and which samples coincide. There, d_ij² is set to 1 and has no gradient."""
    square = diagonal(gram)
    i, j = square.unsqueeze(-1), square.unsqueeze(-2)
    distance = (i - gram) + (j - gram)
    same = distance <= NOISE * torch.finfo(gram.dtype).eps * (i + j)  # False for NaN
    return distance.masked_fill(same, 1), same

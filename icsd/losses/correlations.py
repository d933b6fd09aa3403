"""Losses that compare the directions of two matrices, row by row or as a whole."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from icsd.losses.base import NOISE, Loss, SimilarityLoss


@dataclasses.dataclass(frozen=True)
class SP(Loss):
    """Similarity-preserving distillation: 1/N² Σ_i |k_i/|k_i| - l_i/|l_i||², with the rows k_i of K and l_i of L.

    The loss of Tung & Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019. Rows of zero samples are zero.

    Attributes:
        include_diagonal: True if the rows have the products of each sample with itself. Without them the mean is over
            N(N - 1) elements.
    """

    name: ClassVar[str] = "sp"
    include_diagonal: bool = True

    def kernel_parameters(self) -> tuple[float, ...]:
        return (float(self.include_diagonal),)

    def terms(self, rows: int, columns: int) -> int:
        return rows * columns

    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        # The least norm of a row of products is the square of a sample's.
        student, teacher = self.compared(student, teacher)
        rows = (_unit(gram, (-1,), eps**4) for gram in (student, teacher))
        loss = _squared_distance(*rows, dims=(-1,), if_one_vanishes=1)
        return loss.sum((-2, -1)) / max(1, self.terms(*student.shape[-2:]))


@dataclasses.dataclass(frozen=True)
class DIST(SimilarityLoss):
    """DIST's relation matching: mean_i (1 - ρ(S_i, T_i)), where ρ is Pearson's correlation of two rows.

    The loss of Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022. Its inter-class term
    correlates rows and its intra-class term columns; similarities are symmetric, so both are this loss. ρ is 1 for two
    constant rows and 0 for a constant row and another one.

    Attributes:
        include_diagonal: True if the rows have the similarity of each sample to itself.
    """

    name: ClassVar[str] = "dist"
    include_diagonal: bool = True

    def kernel_parameters(self) -> tuple[float, ...]:
        return (float(self.include_diagonal),)

    def terms(self, rows: int, columns: int) -> int:
        return rows

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        centered = [matrix - matrix.mean(-1, keepdim=True) for matrix in (similarity, target)]
        loss = _decorrelation(*centered, similarity, target, dims=(-1,))
        return loss.sum((-2, -1)) / max(1, self.terms(*similarity.shape[-2:]))


@dataclasses.dataclass(frozen=True)
class CKA(Loss):
    """1 - CKA, with the linear centered kernel alignment CKA = <HKH, HLH> / (|HKH| |HLH|) and H = I - 1/N.

    CKA is from Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019. It is 1 for two
    constant batches and 0 for a constant batch and another one. A batch whose squared elements of K underflow is
    constant, too (norms of samples below 1e-11 in float32), and one where they overflow has a loss NaN.
    """

    name: ClassVar[str] = "cka"

    def terms(self, rows: int, columns: int) -> int:
        return 1

    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        loss = _decorrelation(_center(student), _center(teacher), student, teacher, dims=(-2, -1))
        return loss.sum((-2, -1))


def _center(gram: Tensor) -> Tensor:
    """Return H K H."""
    rows = gram - gram.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def _decorrelation(a: Tensor, b: Tensor, raw_a: Tensor, raw_b: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return 1 - <a, b> / (|a| |b|), where `a` and `b` are `raw_a` and `raw_b` minus their means.

    It is computed as |a/|a| - b/|b||²/2, which does not cancel where `a` and `b` agree.
    """
    noise = (NOISE * torch.finfo(a.dtype).eps) ** 2
    a = _unit(a, dims, noise * raw_a.detach().square().sum(dims, keepdim=True))
    b = _unit(b, dims, noise * raw_b.detach().square().sum(dims, keepdim=True))
    return _squared_distance(a, b, dims, 2) / 2


def _squared_distance(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dims: tuple[int, ...], if_one_vanishes: float
) -> Tensor:
    """Return |a - b|² of two results of `_unit`, or a constant where one of them is defined and the other is not."""
    difference = a[0] - b[0]
    one_vanishes = (a[1] != b[1]) & ~difference.sum(dims, keepdim=True).isnan()
    square = difference.masked_fill(one_vanishes, 0).square().sum(dims, keepdim=True)
    return square + if_one_vanishes * one_vanishes


def _unit(x: Tensor, dims: tuple[int, ...], least_square: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return x / |x| and where it is defined. Where |x|² is at most `least_square`, it is 0 and has no gradient."""
    square = x.square().sum(dims, keepdim=True)
    vanishes = (square <= least_square) & ~square.isinf()  # False for NaN
    inverse = square.masked_fill(vanishes, 1).rsqrt().masked_fill(square.isinf(), torch.nan)
    return (x * inverse).masked_fill(vanishes, 0), ~vanishes

"""Losses that compare two matrices element by element."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from icsd.losses.base import Loss, SimilarityLoss, is_number, require_choice, require_positive
from icsd.losses.gram import similarity_from_gram

_CLAMPS = {"none": 0.0, "both": 1.0, "teacher": 2.0}  # and their parameters of kernels


@dataclasses.dataclass(frozen=True)
class MSE(SimilarityLoss):
    """The mean squared difference mean_ij (S_ij - T_ij)².

    The loss of Mao et al., "Learning efficient text-to-image synthesis via interstage cross-sample similarity
    distillation", Sci China Inf Sci 64:120102, 2021. With `clamp="both"` it is the Gram anchoring of Siméoni et al.,
    "DINOv3", arXiv:2508.10104, 2025.

    Attributes:
        clamp: The negative similarities that are replaced by 0 and get no gradient: `"none"` of them, those of
            `"both"` student and teacher, or those of the `"teacher"`.
        include_diagonal: False to leave out the similarity of each sample to itself.
    """

    name: ClassVar[str] = "mse"
    clamp: Literal["none", "both", "teacher"] = "none"
    include_diagonal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.name, tuple(_CLAMPS), clamp=self.clamp)

    @property
    def in_feature_space(self) -> bool:
        return self.clamp == "none"

    def kernel_parameters(self) -> tuple[float, ...]:
        return _CLAMPS[self.clamp], float(self.include_diagonal)

    @classmethod
    def from_kernel_parameters(cls, parameters: Sequence[float]) -> MSE:
        clamp, include_diagonal = parameters
        return cls([*_CLAMPS][int(clamp)], include_diagonal=bool(include_diagonal))

    def terms(self, rows: int, columns: int) -> int:
        return rows * columns

    def of_elements(self, similarity: Tensor, target: Tensor) -> Tensor:
        """Return the squared difference of each pair of elements."""
        if self.clamp == "both":
            similarity = similarity.masked_fill(similarity < 0, 0)
        if self.clamp != "none":
            target = target.masked_fill(target < 0, 0)
        return (similarity - target).square()

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        loss = self.of_elements(similarity, target)
        return loss.sum((-2, -1)) / max(1, self.terms(*similarity.shape[-2:]))


@dataclasses.dataclass(frozen=True)
class SmoothL1(SimilarityLoss):
    """The Huber loss mean_ij h(|S_ij - T_ij|) with h(x) = x²/(2β) where x < β, x - β/2 elsewhere.

    With `beta=0` and a margin it is the distance matrix loss of Yao, Yang & Wang, "Reconstruction vs. Generation:
    Taming Optimization Dilemma in Latent Diffusion Models", CVPR 2025 (VA-VAE).

    Attributes:
        beta: The width β of the quadratic part; 0 for the absolute difference.
        margin: The difference that costs nothing: h is of max(|S_ij - T_ij| - margin, 0).
        include_diagonal: False to leave out the similarity of each sample to itself.
    """

    name: ClassVar[str] = "smooth_l1"
    beta: float = 1.0
    margin: float = 0.0
    include_diagonal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.beta) or not 0 <= self.beta < math.inf:
            raise ValueError(f"{self.name}: beta must be a finite number >= 0, got {self.beta!r}")
        if not is_number(self.margin) or not 0 <= self.margin < 2:
            raise ValueError(
                f"{self.name}: margin must be in [0, 2), got {self.margin!r}: no two similarities differ by more than 2"
            )

    def kernel_parameters(self) -> tuple[float, ...]:
        return float(self.beta), float(self.margin), float(self.include_diagonal)

    def terms(self, rows: int, columns: int) -> int:
        return rows * columns

    def of_elements(self, similarity: Tensor, target: Tensor) -> Tensor:
        """Return the Huber loss of each pair of elements."""
        if self.margin:
            similarity = ((similarity - target).abs() - self.margin).clamp(min=0)
            target = similarity.new_zeros(()).expand_as(similarity)
        return F.smooth_l1_loss(similarity, target, reduction="none", beta=self.beta)

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        loss = self.of_elements(similarity, target)
        return loss.sum((-2, -1)) / max(1, self.terms(*similarity.shape[-2:]))


@dataclasses.dataclass(frozen=True)
class CC(Loss):
    """Correlation congruence: mean_ij (κ(x_i, x_j) - κ(y_i, y_j))².

    The loss of Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019.

    Attributes:
        kernel: The kernel κ: `"bilinear"` is <x_i, x_j>; `"rbf"` is the Taylor expansion
            exp(-2γ) Σ_{p<=P} (2γ <x_i, x_j>)^p / p! of exp(-γ|x_i - x_j|²) for samples of norm 1.
        gamma: The γ of `"rbf"`.
        order: The order P of the expansion.
        mode: `"paper"` normalizes the samples for `"rbf"`. `"code"`, torchdistill's code, expands raw products, and
            takes the norm |κ_s - κ_t| instead of its square.
        include_diagonal: False to leave out κ(x_i, x_i).
    """

    name: ClassVar[str] = "cc"
    kernel: Literal["rbf", "bilinear"] = "rbf"
    gamma: float = 0.4
    order: int = 2
    mode: Literal["paper", "code"] = "paper"
    include_diagonal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.name, ("rbf", "bilinear"), kernel=self.kernel)
        require_choice(self.name, ("paper", "code"), mode=self.mode)
        require_positive(self.name, gamma=self.gamma, order=self.order)
        if self.order % 1:
            raise ValueError(f"{self.name}: order must be a whole number, got {self.order!r}")

    def kernel_parameters(self) -> tuple[float, ...] | None:
        if self.mode == "code":
            return None
        return float(self.kernel == "rbf"), float(self.gamma), float(self.order), float(self.include_diagonal)

    @classmethod
    def from_kernel_parameters(cls, parameters: Sequence[float]) -> CC:
        rbf, gamma, order, include_diagonal = parameters
        return cls("rbf" if rbf else "bilinear", gamma, order, include_diagonal=bool(include_diagonal))

    def terms(self, rows: int, columns: int) -> int:
        return rows * columns

    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        student, teacher = self.compared(self._kernel(student, eps), self._kernel(teacher, eps))
        loss = (student - teacher).square().sum((-2, -1))
        if self.mode == "code":
            zero = loss == 0
            loss = loss.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
        return loss / max(1, self.terms(*student.shape[-2:]))

    def _kernel(self, gram: Tensor, eps: float) -> Tensor:
        """Return κ of Gram matrices, without its constant term."""
        if self.kernel == "rbf" and self.mode == "paper":
            gram = similarity_from_gram(gram, eps)
        return self.series(gram)

    def series(self, products: Tensor) -> Tensor:
        """Return κ of products or cosines, without its constant term, which cancels in differences of κ."""
        if self.kernel == "bilinear":
            return products
        series = products * (2 * self.gamma / self.order)
        for power in range(int(self.order) - 1, 0, -1):
            series = (series + 1) * products * (2 * self.gamma / power)
        return series * math.exp(-2 * self.gamma)

"""Losses that compare the rows of two matrices as distributions over the other samples."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from icsd.losses.base import SimilarityLoss, require_choice, require_positive


@dataclasses.dataclass(frozen=True)
class KL(SimilarityLoss):
    """The divergence of rows: mean_i KL(softmax_j(T_ij / τ_t) || softmax_j(S_ij / τ_s)).

    The loss of CompRess (Koohpayegani et al., NeurIPS 2020), ISD (Tejankar et al., ICCV 2021) and SEED (Fang et al.,
    ICLR 2021), with the batch as its own memory bank unless banks are given.

    Attributes:
        student_temperature: The temperature τ_s.
        teacher_temperature: The temperature τ_t.
        include_diagonal: True if the row of each sample includes the similarity to the sample itself.
    """

    name: ClassVar[str] = "kl"
    student_temperature: float = 0.1
    teacher_temperature: float = 0.1
    include_diagonal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(
            self.name, student_temperature=self.student_temperature, teacher_temperature=self.teacher_temperature
        )

    def kernel_parameters(self) -> tuple[float, ...]:
        return float(self.student_temperature), float(self.teacher_temperature), float(self.include_diagonal)

    def terms(self, rows: int, columns: int) -> int:
        return rows

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        log_p = F.log_softmax(similarity / self.student_temperature, dim=-1)
        log_q = F.log_softmax(target / self.teacher_temperature, dim=-1)
        return (log_q.exp() * (log_q - log_p)).sum((-2, -1)) / max(1, self.terms(*similarity.shape[-2:]))


@dataclasses.dataclass(frozen=True)
class PKT(SimilarityLoss):
    """Probabilistic knowledge transfer: mean_i KL(q_i || p_i) with p_ij = k_ij / Σ_j k_ij, k_ij = (S_ij + 1) / 2.

    q is the same for the teacher. The loss of Passalis & Tefas, "Learning Deep Representations with Probabilistic
    Knowledge Transfer", ECCV 2018.

    Attributes:
        mode: `"paper"`, or `"code"`, the authors' code, which adds 1e-7 to the probabilities in the logarithm and
            averages over N² terms instead of N rows.
        include_diagonal: True if the distribution of each sample includes the sample itself. By default, that is so in
            the code and not in the paper. It makes no difference with banks.
    """

    name: ClassVar[str] = "pkt"
    mode: Literal["paper", "code"] = "paper"
    include_diagonal: bool | None = None

    def __post_init__(self) -> None:
        require_choice(self.name, ("paper", "code"), mode=self.mode)
        if self.include_diagonal is None:
            object.__setattr__(self, "include_diagonal", self.mode == "code")
        super().__post_init__()

    def kernel_parameters(self) -> tuple[float, ...] | None:
        return (float(self.include_diagonal),) if self.mode == "paper" else None

    def terms(self, rows: int, columns: int) -> int:
        return rows if self.mode == "paper" else rows * columns

    def forward(self, similarity: Tensor, target: Tensor) -> Tensor:
        if self.mode == "paper":
            # Opposite samples have k = 0, which has no logarithm.
            p, q = (_normalize((k + 1).clamp(min=1e-7)) for k in (similarity, target))
            ratio = q.log() - p.log()
        else:
            p, q = _normalize(similarity + 1), _normalize(target + 1)
            ratio = (q + 1e-7).log() - (p + 1e-7).log()
        return (q * ratio).sum((-2, -1)) / max(1, self.terms(*similarity.shape[-2:]))

    def to_banks(self, similarity: Tensor, target: Tensor) -> Tensor:
        return self.forward(similarity, target)


def _normalize(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True)

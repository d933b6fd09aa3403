"""The Gram anchoring loss of DINOv3 (Siméoni et al., arXiv:2508.10104, 2025)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor, nn

from icsd import ops
from icsd.compat.tokens import NORMALIZE_EPS, check_tokens
from icsd.losses import CC, MSE, Loss


@dataclasses.dataclass(frozen=True)
class _OfProducts(Loss):
    """An elementwise loss of the products <x_i, x_j> in place of the cosine similarities."""

    name: ClassVar[str] = "products"
    loss: MSE

    def terms(self, rows: int, columns: int) -> int:
        return self.loss.terms(rows, columns)

    def from_grams(self, student: Tensor, teacher: Tensor, eps: float) -> Tensor:
        return self.loss.forward(student, teacher)


class GramLoss(nn.Module):
    """The mean squared difference of the Gram matrices of patch tokens, as `dinov3.loss.GramLoss`.

    Args:
        apply_norm: True to divide tokens by their norms, so that the Gram matrices hold cosine similarities.
        img_level: It has no effect, as in the original: the argument of `forward` decides.
        remove_neg: True to count negative similarities of student and teacher as 0.
        remove_only_teacher_neg: True to count negative similarities of the teacher as 0. `remove_neg` must be False
            then.

    Raises:
        ValueError: `remove_neg` and `remove_only_teacher_neg` are both True.
    """

    def __init__(
        self,
        apply_norm: bool = True,
        img_level: bool = True,
        remove_neg: bool = True,
        remove_only_teacher_neg: bool = False,
    ) -> None:
        super().__init__()
        if remove_neg and remove_only_teacher_neg:
            raise ValueError("remove_neg and remove_only_teacher_neg are both True: choose one of them")
        self.apply_norm = apply_norm
        self.remove_neg = remove_neg
        self.remove_only_teacher_neg = remove_only_teacher_neg
        loss = MSE("both" if remove_neg else "teacher" if remove_only_teacher_neg else "none")
        if not apply_norm:
            loss = CC("bilinear") if loss.clamp == "none" else _OfProducts(loss)
        self.loss = loss

    def forward(self, output_feats: Tensor, target_feats: Tensor, img_level: bool = True) -> Tensor:
        """Return the loss of a student's and a teacher's patch tokens.

        Args:
            output_feats: Tokens of the student, `(B, N, D)`, or `(B * N, D)` if `img_level` is False.
            target_feats: Tokens of the teacher, the same with any D.
            img_level: True for the Gram matrices of each image, `(N, N)`. Otherwise, there is one of the
                whole batch, `(B * N, B * N)`. Where the matrices of student and teacher would take more than 256 MiB,
                their tiles are computed one after the other and the matrices are not held in memory, except with
                `apply_norm=False` and clamped similarities.
        """
        tokens = {"output_feats": output_feats, "target_feats": target_feats}
        for name, feats in tokens.items():
            check_tokens(name, feats, (3,) if img_level else (2, 3))
        student, teacher = (feats if img_level else feats.flatten(0, -2) for feats in tokens.values())
        return ops.similarity_distillation_loss(student, teacher, self.loss, detach_teacher=False, eps=NORMALIZE_EPS)

"""The mini-batch loss of CIRKD (Yang et al., "Cross-Image Relational Knowledge Distillation", CVPR 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from icsd import ops
from icsd.compat.tokens import NORMALIZE_EPS, tokens_of_maps
from icsd.losses import KL


class CriterionMiniBatchCrossImagePair(nn.Module):
    """The divergence between distributions of pixels over the pixels of each image, for all pairs of images.

    It is the mean over pairs of images (i, j) and pixels a of i of KL(softmax_b(T_ab / τ) || softmax_b(S_ab / τ)),
    where b are the pixels of j, as the class of this name in CIRKD's `losses/cirkd_mini_batch.py`.

    Args:
        temperature: The temperature τ.

    Raises:
        ValueError: The temperature is not positive and finite.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.loss = KL(temperature, temperature)

    def forward(self, feat_S: Tensor, feat_T: Tensor) -> Tensor:
        """Return the loss of maps `(B, C, H, W)` of a student and a teacher."""
        student, teacher = tokens_of_maps("feat_S", feat_S), tokens_of_maps("feat_T", feat_T)
        if not len(student):
            return student.sum() * 0
        return torch.stack(
            [self._to_image(student, teacher, x, y) for x, y in zip(student, teacher, strict=True)]
        ).mean()

    def _to_image(self, student: Tensor, teacher: Tensor, student_image: Tensor, teacher_image: Tensor) -> Tensor:
        """Return the mean over all images i of the loss of the pairs (i, j) with one image j."""
        banks = student_image.expand(student.shape), teacher_image.expand(teacher.shape)
        return ops.similarity_distillation_loss(
            student,
            teacher,
            self.loss,
            student_bank=banks[0],
            teacher_bank=banks[1],
            detach_teacher=False,
            eps=NORMALIZE_EPS,
        )

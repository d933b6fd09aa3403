"""The loss of LightlyTrain's third distillation method: similarities within an image, and to a queue of images."""

from __future__ import annotations

from torch import Tensor, nn

from icsd import ops
from icsd.compat.tokens import NORMALIZE_EPS, check_tokens
from icsd.losses import KL


class DistillationV3Loss(nn.Module):
    """Two losses of distributions, over similar images and over similar tokens, as in LightlyTrain.

    All inputs are expected to be normalized. They are normalized here, too, which changes neither the losses nor the
    gradients of the features before they were normalized.

    Args:
        temperature_global: The temperature of the similarities of images to the queue.
        temperature_local: The temperature of the similarities of the tokens of an image.

    Raises:
        ValueError: A temperature is not positive and finite.
    """

    def __init__(self, temperature_global: float, temperature_local: float) -> None:
        super().__init__()
        self.temperature_global = temperature_global
        self.temperature_local = temperature_local
        self.global_loss = KL(temperature_global, temperature_global)
        self.local_loss = KL(temperature_local, temperature_local)

    def forward(
        self,
        teacher_features_global: Tensor,
        teacher_features_local: Tensor,
        student_features_global: Tensor,
        student_features_local: Tensor,
        queue: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the global and the local loss.

        Args:
            teacher_features_global: The images of the teacher, `(B, D)`.
            teacher_features_local: The tokens of these images, `(B, N, D)`.
            student_features_global: The images of the student, `(B, D)`.
            student_features_local: The tokens of these images, `(B, N, D)`.
            queue: Images of the teacher of this and former batches, `(M, D)`.
        """
        check_tokens("teacher_features_local", teacher_features_local)
        check_tokens("student_features_local", student_features_local)
        return ops.similarity_distillation_loss(
            student_features_global,
            teacher_features_global,
            self.global_loss,
            student_bank=queue,
            teacher_bank=queue,
            detach_teacher=False,
            eps=NORMALIZE_EPS,
        ), ops.similarity_distillation_loss(
            student_features_local,
            teacher_features_local,
            self.local_loss,
            detach_teacher=False,
            eps=NORMALIZE_EPS,
        )

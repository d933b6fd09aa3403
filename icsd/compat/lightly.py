"""The patch kernel alignment loss of lightly (PaKa): 1 - CKA of the patch tokens of each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from icsd import ops
from icsd.compat.tokens import check_tokens
from icsd.losses import CKA
from icsd.losses.gram import compute_dtype


class PatchKernelAlignmentLoss(nn.Module):
    """1 minus the linear CKA of the patch tokens of student and teacher, as `lightly.loss.PatchKernelAlignmentLoss`.

    Nothing underflows in half precision: products are accumulated in float32, of tokens without their mean, and rows
    are divided by norms before they are multiplied.

    Args:
        max_tokens: The largest number of tokens. Of more tokens, so many are drawn at random from each image, those
            that no mask ignores first.

    Raises:
        ValueError: `max_tokens` is less than 2.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        super().__init__()
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, or None for all tokens, got {max_tokens}")
        self.max_tokens = max_tokens

    def forward(self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the mean loss of the images that have two tokens at least, or 0 if there is none.

        Args:
            student_features: Tokens `(B, N, D)`.
            teacher_features: Tokens `(B, N, D)`, another D is possible. They are constants.
            mask: `(B, N)`, True for tokens that are ignored.
        """
        check_tokens("student_features", student_features)
        check_tokens("teacher_features", teacher_features)
        if student_features.shape[:2] != teacher_features.shape[:2]:
            raise ValueError(
                "student_features and teacher_features must agree in all but the last dimension, got "
                f"{tuple(student_features.shape)} and {tuple(teacher_features.shape)}: give the tokens of the same "
                "patches"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != student_features.shape[:2]):
            raise ValueError(
                f"mask must be a boolean tensor {tuple(student_features.shape[:2])}, True for tokens that are ignored, "
                f"got {mask.dtype} {tuple(mask.shape)}"
            )
        tokens = [student_features, teacher_features.detach()]
        if self.max_tokens is not None and student_features.shape[1] > self.max_tokens:
            tokens, mask = self._drawn(tokens, mask)
        if mask is None:
            loss = ops.similarity_distillation_loss(*tokens, CKA(), center=True, reduction="none")
            return loss.mean() if loss.numel() and tokens[0].shape[1] > 1 else loss.sum() * 0
        valid = ~mask
        student, teacher = (_centered(x, valid) for x in tokens)
        loss = ops.similarity_distillation_loss(student, teacher, CKA(), reduction="none")
        images = valid.sum(-1) >= 2
        return (loss * images).sum() / images.sum().clamp(min=1)

    def _drawn(self, tokens: list[Tensor], mask: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """Return `max_tokens` random tokens of each image, the same of student and teacher, and their mask."""
        student = tokens[0]
        order = torch.rand(student.shape[:2], device=student.device)
        if mask is not None:
            order = order.masked_fill(mask, torch.inf)
        chosen = order.topk(self.max_tokens, dim=1, largest=False).indices
        drawn = [x.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1])) for x in tokens]
        return drawn, None if mask is None else mask.gather(1, chosen)


def _centered(x: Tensor, valid: Tensor) -> Tensor:
    """Return the valid tokens minus their mean, and zeros in place of the others.

    The first valid token is subtracted before the mean is taken, as in `icsd.losses.gram.centered`.
    """
    ignored = ~valid.unsqueeze(-1)
    x = x.to(compute_dtype(x))
    if x.numel():
        first = valid.int().argmax(-1)[:, None, None].expand(-1, 1, x.shape[-1])
        x = x - x.detach().gather(1, first)
    x = x.masked_fill(ignored, 0)
    count = valid.sum(-1).clamp(min=1)[:, None, None]
    return (x - x.sum(1, keepdim=True) / count).masked_fill(ignored, 0)

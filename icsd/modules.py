"""The operator as modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from icsd import ops


class _Loss(nn.Module):
    def __init__(self, loss: str | Callable[[Tensor, Tensor], Tensor], options: dict[str, Any]) -> None:
        super().__init__()
        self.loss = loss
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join([repr(self.loss), *(f"{key}={value!r}" for key, value in self.options.items())])


class SimilarityDistillationLoss(_Loss):
    """`icsd.similarity_distillation_loss` as a module.

    Args:
        loss: As the function takes it.
        **options: Any keyword of the function.
    """

    def __init__(self, loss: str | Callable[[Tensor, Tensor], Tensor] = "mse", **options: Any) -> None:
        super().__init__(loss, options)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_bank: Tensor | None = None,
        teacher_bank: Tensor | None = None,
    ) -> Tensor:
        """The loss of a student `(*B, N, D_s)` and a teacher `(*B, N, D_t)`, of themselves or to banks."""
        banks = {"student_bank": student_bank, "teacher_bank": teacher_bank}
        return ops.similarity_distillation_loss(student, teacher, self.loss, **banks, **self.options)


class InterstageDistillationLoss(_Loss):
    """`icsd.interstage_distillation_loss` as a module.

    Args:
        loss: As the function takes it.
        **options: Any keyword of the function.
    """

    def __init__(self, loss: str | Callable[[Tensor, Tensor], Tensor] = "mse", **options: Any) -> None:
        super().__init__(loss, options)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """The loss of stages `(*B, N, D_i)`, coarse to fine."""
        return ops.interstage_distillation_loss(stages, self.loss, **self.options)

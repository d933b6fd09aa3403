"""The operator as modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from icsd import ops
from icsd.losses import LossLike, as_loss
from icsd.ops.distributed import ProcessGroupLike
from icsd.ops.functional import Reduction


class _DistillationLoss(nn.Module):
    """The options that both modules share."""

    def __init__(
        self,
        loss: LossLike,
        center: bool,
        reduction: Reduction,
        detach_teacher: bool,
        eps: float,
        backend: str | None,
        process_group: ProcessGroupLike | None,
    ) -> None:
        super().__init__()
        self.loss = as_loss(loss)
        self.center = center
        self.reduction = reduction
        self.detach_teacher = detach_teacher
        self.eps = eps
        self.backend = backend
        self.process_group = process_group

    def extra_repr(self) -> str:
        options = {name: value for name, value in vars(self).items() if name != "training" and name[0] != "_"}
        return ", ".join([repr(options.pop("loss")), *(f"{name}={value!r}" for name, value in options.items())])


class SimilarityDistillationLoss(_DistillationLoss):
    """A module that calls `icsd.similarity_distillation_loss`. Its arguments are keywords of the function."""

    def __init__(
        self,
        loss: LossLike = "mse",
        *,
        center: bool = False,
        reduction: Reduction = "mean",
        detach_teacher: bool = True,
        eps: float = 1e-8,
        backend: str | None = None,
        process_group: ProcessGroupLike | None = None,
    ) -> None:
        super().__init__(loss, center, reduction, detach_teacher, eps, backend, process_group)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_bank: Tensor | None = None,
        teacher_bank: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of a student `(*B, N, D_s)` and a teacher `(*B, N, D_t)`, or of their similarities to banks.

        The arguments, the result and the errors are those of `icsd.similarity_distillation_loss`.
        """
        return ops.similarity_distillation_loss(
            student,
            teacher,
            self.loss,
            student_bank=student_bank,
            teacher_bank=teacher_bank,
            center=self.center,
            reduction=self.reduction,
            detach_teacher=self.detach_teacher,
            eps=self.eps,
            backend=self.backend,
            process_group=self.process_group,
        )


class InterstageDistillationLoss(_DistillationLoss):
    """A module that calls `icsd.interstage_distillation_loss`. Its arguments are keywords of the function."""

    def __init__(
        self,
        loss: LossLike = "mse",
        *,
        weights: Sequence[float] | None = None,
        teacher: int = -1,
        center: bool = False,
        reduction: Reduction = "mean",
        detach_teacher: bool = True,
        eps: float = 1e-8,
        backend: str | None = None,
        process_group: ProcessGroupLike | None = None,
    ) -> None:
        super().__init__(loss, center, reduction, detach_teacher, eps, backend, process_group)
        self.weights = weights
        self.teacher = teacher

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the loss of stages `(*B, N, D_i)`, coarse to fine.

        The arguments, the result and the errors are those of `icsd.interstage_distillation_loss`.
        """
        return ops.interstage_distillation_loss(
            stages,
            self.loss,
            weights=self.weights,
            teacher=self.teacher,
            center=self.center,
            reduction=self.reduction,
            detach_teacher=self.detach_teacher,
            eps=self.eps,
            backend=self.backend,
            process_group=self.process_group,
        )

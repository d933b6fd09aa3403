"""The operator as modules, and a queue of samples for its banks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from icsd import ops
from icsd.losses import CustomLoss, LossLike, as_loss
from icsd.ops.distributed import ProcessGroupLike, gathered
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
        if isinstance(self.loss, CustomLoss) and isinstance(self.loss.function, nn.Module):
            self.function = self.loss.function  # a submodule of this one, with its parameters
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


class SampleQueue(nn.Module):
    """A queue of the newest samples, as a bank for `similarity_distillation_loss`.

    Call `enqueue` after the backward pass: it writes over the oldest samples, which the backward pass may still need.
    (PyTorch raises an error then.) The samples and their order in time are part of `state_dict`. `torch.compile` breaks
    the graph at `bank` and `enqueue`, because the number of samples changes from call to call.

    Args:
        size: The largest number of samples.
        dim: The number of their features.
        process_group: A process group, or "world". Each rank then enqueues the samples of all ranks, in the order of
            the ranks, so that the queues of all ranks are equal. All ranks must enqueue equally many samples.
        device: The device of the samples.
        dtype: The dtype of the samples.

    Raises:
        ValueError: `size` or `dim` is less than 1.
    """

    samples: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        process_group: ProcessGroupLike | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim must be at least 1, got {size} and {dim}")
        self.process_group = process_group
        self.register_buffer("samples", torch.zeros(size, dim, device=device, dtype=dtype))
        self.start = self.count = 0  # the place of the oldest sample, and the number of samples

    def __len__(self) -> int:
        return self.count

    @property
    def bank(self) -> Tensor:
        """The samples in the queue, `(len(self), dim)`, in no particular order. It is a view of them if it can be."""
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(SampleQueue.bank.fget)(self)
        if self.count == len(self.samples):
            return self.samples
        older, newer = self.in_time
        return torch.cat((older, newer)) if len(newer) else older

    @property
    def in_time(self) -> tuple[Tensor, Tensor]:
        """Views of the samples in the order of time: the older ones, then the newer ones."""
        stop = self.start + self.count
        return self.samples[self.start : stop], self.samples[: max(0, stop - len(self.samples))]

    @torch.no_grad()
    def enqueue(self, x: Tensor) -> None:
        """Add samples `(n, dim)`. Where the queue is full, they replace the oldest ones.

        Raises:
            ValueError: The samples have another number of features.
        """
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(SampleQueue.enqueue)(self, x)
        if self.process_group is None:
            self._check(x)
        else:
            x = gathered(self.process_group, x, self._check)
        size = len(self.samples)
        x = x[-size:].to(self.samples)
        stop = (self.start + self.count) % size
        first = min(len(x), size - stop)
        self.samples[stop : stop + first] = x[:first]
        self.samples[: len(x) - first] = x[first:]
        lost = max(0, self.count + len(x) - size)
        self.start = (self.start + lost) % size
        self.count += len(x) - lost

    def _check(self, x: Tensor) -> None:
        dim = self.samples.shape[1]
        if x.dim() != 2 or x.shape[1] != dim:
            raise ValueError(
                f"x must have the shape (n, {dim}), got {tuple(x.shape)}: the queue was made for dim={dim}"
            )

    def dequeue(self, n: int) -> Tensor:
        """Remove the `n` oldest samples and return a copy of them, `(n, dim)`.

        Raises:
            ValueError: The queue has fewer samples.
        """
        if not 0 <= n <= self.count:
            raise ValueError(f"n must be from 0 to the {self.count} samples in the queue, got {n}")
        size = len(self.samples)
        places = torch.arange(self.start, self.start + n, device=self.samples.device) % size
        self.start = (self.start + n) % size
        self.count -= n
        return self.samples[places]

    def get_extra_state(self) -> dict[str, int | tuple[int, int]]:
        return {"start": self.start, "count": self.count, "shape": tuple(self.samples.shape)}

    def set_extra_state(self, state: dict[str, int | tuple[int, int]]) -> None:
        shape = tuple(self.samples.shape)
        if tuple(state.get("shape", shape)) == shape:  # otherwise load_state_dict refuses the samples
            self.start, self.count = state["start"], state["count"]

    def extra_repr(self) -> str:
        size, dim = self.samples.shape
        return f"size={size}, dim={dim}, count={self.count}, process_group={self.process_group!r}"

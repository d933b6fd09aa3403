"""Losses of similarities to banks: the case, and the implementations, checked before they are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import icsd
from benchmarks.ceilings import Ceilings
from icsd.losses import KL

TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class BankCase:
    """The `kl` of similarities to banks, in float32.

    Attributes:
        samples: N.
        bank: The samples M of each bank.
        dim: D.
        one_bank: True if student and teacher are compared with the same bank.
    """

    samples: int
    bank: int
    dim: int
    one_bank: bool = False

    @property
    def labels(self) -> dict[str, str | int | torch.dtype]:
        """The columns of `benchmarks.results` that tell the case."""
        work = f"{'one' if self.one_bank else 'two'} of {self.bank:,}"
        return {
            "work": work,
            "groups": 1,
            "samples": self.samples,
            "dim": self.dim,
            "dtype": torch.float32,
            "loss": "kl",
        }

    def __str__(self) -> str:
        return f"{self.samples}x{self.bank}x{self.dim}-{'one' if self.one_bank else 'two'}"

    def floor_seconds(self, ceilings: Ceilings) -> float:
        """Return the least time without N x M matrices: two products for the loss, two for the student's gradient."""
        flops = 8 * self.samples * self.bank * self.dim
        moved = torch.float32.itemsize * self.dim * self.bank * (1 if self.one_bank else 2)
        return max(flops / ceilings.gemm_rate[torch.float32], moved / ceilings.copy_bandwidth)


class BankWorkload:
    """The features of a case and the implementations of its loss.

    Args:
        case: The case.
        implementations: The names of the measured ones.

    Raises:
        AssertionError: The loss or the gradient of an implementation differs from that of the first one.
    """

    def __init__(self, case: BankCase, implementations: Sequence[str] = ("icsd", "plain", "compile")) -> None:
        torch.compiler.reset()
        generator = torch.Generator().manual_seed(0)
        student, *others = (
            torch.randn(count, case.dim, generator=generator)
            for count in (case.samples, case.samples, case.bank, *([] if case.one_bank else [case.bank]))
        )
        self.features = [student.requires_grad_(), *others, *(others[-1:] if case.one_bank else [])]
        plain = partial(public_loss, temperature=0.1)
        losses = {"icsd": partial(_ours, loss=KL(0.1, 0.1)), "plain": plain}
        if "compile" in implementations:
            losses["compile"] = torch.compile(plain, dynamic=False)
        self.losses = {name: losses[name] for name in implementations}
        results = [self.forward_backward(name) for name in implementations]
        for name, result in zip(implementations, results, strict=True):
            error = max((torch.dist(x, y) / y.norm()).item() for x, y in zip(result, results[0], strict=True))
            assert error <= TOLERANCE, f"{name} on {case} is off by {error:.1e}"

    def forward_backward(self, implementation: str) -> tuple[Tensor, Tensor]:
        """Return the loss and the student's gradient."""
        loss = self.losses[implementation](*self.features)
        return loss.detach(), torch.autograd.grad(loss, self.features[0])[0]


def _ours(student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor, loss: KL) -> Tensor:
    return icsd.similarity_distillation_loss(
        student, teacher, loss, student_bank=student_bank, teacher_bank=teacher_bank, backend="cpu"
    )


def public_loss(
    student: Tensor, teacher: Tensor, student_bank: Tensor, teacher_bank: Tensor, temperature: float
) -> Tensor:
    """Return the loss as public code computes it: normalized copies, both products, and `F.kl_div`."""
    student, teacher, student_bank, teacher_bank = (
        F.normalize(x, dim=-1) for x in (student, teacher, student_bank, teacher_bank)
    )
    log_p = F.log_softmax(student @ student_bank.mT / temperature, dim=-1)
    log_q = F.log_softmax(teacher @ teacher_bank.mT / temperature, dim=-1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")

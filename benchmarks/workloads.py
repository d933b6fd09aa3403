"""What is measured: shapes, features, and every implementation of the loss, checked before it is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.peers import implementations as implementations_of
from icsd.losses import LOSSES, Loss, make_loss

DTYPES = (torch.float32, torch.bfloat16)
# N x D of the means by which the operator is judged.
GRID = [(n, d) for n in (8, 16, 32, 64, 128, 256) for d in (8192, 65536, 524288)]
TURNS = 3
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss on features of one shape and dtype.

    Attributes:
        samples: N.
        features: D of student and teacher.
        dtype: Of both.
        loss: Name of the loss.
    """

    samples: int
    features: int
    dtype: torch.dtype = torch.float32
    loss: str = "mse"

    @property
    def definition(self) -> Loss:
        """The literature's losses as their well-known code has them."""
        modes = {"mode": "code"} if hasattr(LOSSES[self.loss], "mode") else {}
        return make_loss(self.loss, **modes)

    def __str__(self) -> str:
        return f"{self.samples}x{self.features}-{str(self.dtype).removeprefix('torch.')}-{self.loss}"


class Workload:
    """The features of a case and all implementations of its loss, compiled and found to agree.

    Args:
        case: What of.
        implementations: Those that are measured; all by default. Ours alone is not checked: no peer can compute it.

    Raises:
        AssertionError: An implementation's loss or gradient is not that of plain PyTorch (of the literature's losses,
            torchdistill's) in float32.
    """

    def __init__(self, case: Case, implementations: Sequence[str] | None = None) -> None:
        torch.compiler.reset()
        self.case = case
        generator = torch.Generator().manual_seed(0)
        self.student = _features(case, generator).requires_grad_()
        self.teacher = _features(case, generator)
        self.losses = implementations_of(case.definition)
        if implementations:
            self.losses = {name: self.losses[name] for name in implementations}
        if list(self.losses) == ["icsd"]:
            return
        student = self.student.detach().float().requires_grad_()
        peer = self.losses["torchdistill" if "torchdistill" in self.losses else "plain"]
        truth = peer(student, self.teacher.float())
        (gradient,) = torch.autograd.grad(truth, student)
        for name in self.losses:
            self._check(name, truth.detach(), gradient)

    def forward(self, implementation: str) -> Tensor:
        """The loss alone, without saving anything for a gradient."""
        with torch.no_grad():
            return self.losses[implementation](self.student, self.teacher)

    def forward_backward(self, implementation: str) -> tuple[Tensor, Tensor]:
        """The loss and the student's gradient."""
        loss = self.losses[implementation](self.student, self.teacher)
        return loss, torch.autograd.grad(loss, self.student)[0]

    def _check(self, name: str, truth: Tensor, true_gradient: Tensor) -> None:
        loss, gradient = self.forward_backward(name)
        loss_error = ((loss.detach() - truth) / truth).abs().item()
        gradient_error = (torch.dist(gradient.float(), true_gradient) / true_gradient.norm()).item()
        assert max(loss_error, gradient_error) <= TOLERANCE[self.case.dtype], (
            f"{name} on {self.case}: the loss is off by {loss_error:.1e}, its gradient by {gradient_error:.1e}"
        )


def in_turns(implementations: Sequence[str]) -> list[tuple[int, str]]:
    """(turn, implementation) in the order of measurement.

    Each implementation has several short turns, every other round of turns in reverse order, so that a change of the
    machine's speed meets all of them.
    """
    return [
        (turn, name) for turn in range(TURNS) for name in (implementations if turn % 2 == 0 else implementations[::-1])
    ]


def _features(case: Case, generator: torch.Generator) -> Tensor:
    """Samples with something in common, so that similarities are not all near zero."""
    rank = 4
    common = torch.randn(case.samples, rank, generator=generator) @ torch.randn(
        rank, case.features, generator=generator
    )
    return common.add_(torch.randn(case.samples, case.features, generator=generator)).to(case.dtype)

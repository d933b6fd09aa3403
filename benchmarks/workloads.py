"""The cases that are measured: features, and all implementations of a loss, checked before they are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.peers import implementations as implementations_of
from icsd.losses import LOSSES, MSE, Loss, make_loss

DTYPES = (torch.float32, torch.bfloat16)
# The N x D whose geometric mean is the main result.
GRID = [(n, d) for n in (8, 16, 32, 64, 128, 256) for d in (8192, 65536, 524288)]
# Groups B of N patch tokens with D features: the images of a batch, at the sizes of vision transformers.
TOKENS = [(64, 64, 384), (16, 196, 384), (8, 196, 1024), (4, 256, 4096), (4, 576, 768), (4, 1024, 768)]
# Losses that have a name in the literature and are another one with parameters here.
NAMED = {"gram_anchoring": MSE(clamp="both")}
TURNS = 3
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclasses.dataclass(frozen=True)
class Case:
    """One loss on features of one shape and dtype.

    Attributes:
        samples: N.
        dim: D of student and teacher.
        dtype: The dtype of both.
        loss: The name of the loss.
        groups: B.
    """

    samples: int
    dim: int
    dtype: torch.dtype = torch.float32
    loss: str = "mse"
    groups: int = 1

    @property
    def definition(self) -> Loss:
        """Return the loss; those of the literature as their well-known code computes them."""
        if self.loss in NAMED:
            return NAMED[self.loss]
        modes = {"mode": "code"} if hasattr(LOSSES[self.loss], "mode") else {}
        return make_loss(self.loss, **modes)

    def __str__(self) -> str:
        groups = f"{self.groups}x" if self.groups > 1 else ""
        return f"{groups}{self.samples}x{self.dim}-{str(self.dtype).removeprefix('torch.')}-{self.loss}"


class Workload:
    """The features of a case and all implementations of its loss, compiled and checked against each other.

    Args:
        case: The case.
        implementations: The names of the measured ones; all by default. If it is icsd alone, nothing is checked.

    Raises:
        AssertionError: The loss or gradient of an implementation differs from that of plain PyTorch in float32, or for
            the literature's losses from torchdistill's.
    """

    def __init__(self, case: Case, implementations: Sequence[str] | None = None) -> None:
        torch.compiler.reset()
        self.case = case
        generator = torch.Generator().manual_seed(0)
        self.student = _features(case, generator).requires_grad_()
        self.teacher = _features(case, generator)
        self.losses = implementations_of(case.definition, case.groups)
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
        """Return the loss, without saving anything for a gradient."""
        with torch.no_grad():
            return self.losses[implementation](self.student, self.teacher)

    def forward_backward(self, implementation: str) -> tuple[Tensor, Tensor]:
        """Return the loss and the student's gradient."""
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
    """Return pairs (turn, implementation) in the order of measurement.

    Each implementation has several short turns, every other round of turns in reverse order, so that a change of the
    machine's speed meets all of them.
    """
    return [
        (turn, name) for turn in range(TURNS) for name in (implementations if turn % 2 == 0 else implementations[::-1])
    ]


def _features(case: Case, generator: torch.Generator) -> Tensor:
    """Return samples with something in common, so that similarities are not all near zero."""
    rank = 4
    groups = (case.groups,) if case.groups > 1 else ()
    common = torch.randn(*groups, case.samples, rank, generator=generator) @ torch.randn(
        rank, case.dim, generator=generator
    )
    return common.add_(torch.randn(*groups, case.samples, case.dim, generator=generator)).to(case.dtype)

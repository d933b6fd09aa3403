"""A call of the operator on one rank, as every schedule takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from icsd.losses import Loss
from icsd.ops.registry import Backend


class Call(NamedTuple):
    """The checked arguments of a call on one rank.

    Attributes:
        names: The names of the tensors, for messages.
        tensors: The students, then the teacher; or student, teacher and their banks.
        weights: One weight for each student; None with banks.
        loss: The loss.
        center: True if the mean sample is subtracted.
        eps: The least norm of a sample.
        backend: The backend.
    """

    names: Sequence[str]
    tensors: Sequence[Tensor]
    weights: Sequence[float] | None
    loss: Loss
    center: bool
    eps: float
    backend: Backend

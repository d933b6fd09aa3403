"""The operator in plain PyTorch: the definition that every other backend is held to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses import Loss, distill_grams
from icsd.losses.gram import gram
from icsd.ops.registry import Backend


class ReferenceBackend(Backend):
    """Any device, any dtype, any order of derivative, by PyTorch's own operators."""

    name = "reference"
    description = "plain PyTorch, the definition"

    def unavailable(self) -> None:
        """It always runs."""

    def unsupported(self, tensors: Sequence[Tensor]) -> None:
        """It takes everything."""

    def gram(self, x: Tensor) -> Tensor:
        return gram(x)

    def distill(self, stages: Sequence[Tensor], weights: Sequence[float], loss: Loss, eps: float) -> Tensor:
        return distill_grams([gram(stage) for stage in stages], weights, loss, eps)

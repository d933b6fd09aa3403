"""The operator in plain PyTorch. All other backends are tested against this definition."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from icsd.losses import Loss, distill_grams
from icsd.losses.gram import centered, gram
from icsd.ops.registry import Backend


class ReferenceBackend(Backend):
    """A backend of PyTorch's own operators, for any device and with derivatives of any order."""

    name = "reference"
    description = "plain PyTorch, the definition"

    def unavailable(self) -> None:
        """Return None: it always runs."""

    def unsupported(self, tensors: Sequence[Tensor]) -> None:
        """Return None: it takes all inputs."""

    def gram(self, x: Tensor) -> Tensor:
        return gram(x)

    def distill(
        self, stages: Sequence[Tensor], weights: Sequence[float], loss: Loss, eps: float, center: bool = False
    ) -> Tensor:
        if center:
            stages = [centered(stage) for stage in stages]
        return distill_grams([gram(stage) for stage in stages], weights, loss, eps)

"""PyTorch's matrix products with the derivatives of the operator, without fused kernels."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from icsd.losses.gram import gram, no_autocast
from icsd.ops.backend import FusedBackend
from icsd.ops.library import is_ordinary
from icsd.ops.regimes import Regime


class ProductLauncher:
    """The two products of features, by PyTorch."""

    def gram(self, x: Tensor) -> Tensor:
        return gram(x)

    def combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        with no_autocast(x):
            return (matrix @ x.to(matrix.dtype)).to(x.dtype)


class CompositeBackend(FusedBackend):
    """The fastest way through PyTorch's libraries: the gradient is one product, where autograd would make two.

    It has no regimes, so each loss is PyTorch's function of the Gram matrices. A compiler sees plain PyTorch.
    """

    name = "composite"
    description = "PyTorch's products with fused derivatives"
    launcher = ProductLauncher()
    regimes: Mapping[str, Collection[Regime]] = {}

    def unavailable(self) -> None:
        """Return None: it always runs."""

    def unsupported(self, tensors: Sequence[Tensor]) -> None:
        """Return None: it takes all inputs."""

    def gram(self, x: Tensor) -> Tensor:
        return super().gram(x) if is_ordinary(x) else gram(x)

"""The names by which `icsd.ops.triton` calls the contract until it uses it directly."""

from __future__ import annotations

from icsd.ops import backend
from icsd.ops.contract import MAX_STATISTICS, saved_dtype, saved_shape
from icsd.ops.contract import Spec as Distillation

__all__ = ["MAX_STATISTICS", "Distillation", "FusedBackend", "saved_dtype", "saved_shape"]


class _Methods:
    def __init__(self, owner) -> None:
        self.gram = owner.launch_gram
        self.combine = owner.launch_combine
        self.distill = owner.launch_distill
        self.distill_backward = owner.launch_distill_backward


class FusedBackend(backend.FusedBackend):
    """A backend that launches by methods of its own."""

    @property
    def launcher(self) -> _Methods:
        return _Methods(self)

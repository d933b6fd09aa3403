"""The native module: the fused kernels, as functions of tensors, which it reads and makes by DLPack's exchange table.

Inputs have adjacent features and one stride from group to group (`icsd.ops.contract.sample_dense`). The backends in
`icsd.ops.cpu` and `icsd.ops.cuda` call these functions.
"""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

class _Build(TypedDict):
    compiler: str
    cpu: str
    cuda: str

INTERFACE: int
LOSSES: dict[str, int]  # the losses with kernels and how many parameters each takes
build: _Build

class Spec:
    """The specification of a distillation call. Make it once for each configuration."""

    def __init__(
        self,
        loss: str,
        parameters: Sequence[float],
        weights: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        regime: str,
        center: bool = False,
    ) -> None: ...

def cpu_isa() -> str: ...
def empty_cache() -> None: ...

class cpu:
    """The operator on the CPU."""

    @staticmethod
    def reads(tensors: Sequence[Tensor]) -> bool: ...
    @staticmethod
    def gram(x: Tensor) -> Tensor: ...
    @staticmethod
    def combine(matrix: Tensor, x: Tensor) -> Tensor: ...
    @staticmethod
    def distill(inputs: Sequence[Tensor], spec: Spec, save: bool) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def distill_backward(
        grad: Tensor, saved: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], spec: Spec
    ) -> list[Tensor | None]: ...
    @staticmethod
    def add_exponentials(student: Tensor, teacher: Tensor, rows: Tensor, rising: bool) -> None: ...
    @staticmethod
    def exponent_gradients(
        student: Tensor, teacher: Tensor, rows: Tensor, student_factor: float, teacher_factor: float
    ) -> None: ...

class cuda:
    """The operator on CUDA devices, on the current stream. It is missing from a build without nvcc."""

    @staticmethod
    def reads(tensors: Sequence[Tensor]) -> bool: ...
    @staticmethod
    def gram(x: Tensor) -> Tensor: ...
    @staticmethod
    def combine(matrix: Tensor, x: Tensor) -> Tensor: ...
    @staticmethod
    def distill(inputs: Sequence[Tensor], spec: Spec, save: bool) -> tuple[Tensor, Tensor]: ...
    @staticmethod
    def distill_backward(
        grad: Tensor, saved: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], spec: Spec
    ) -> list[Tensor | None]: ...
    @staticmethod
    def distill_to_banks(
        inputs: Sequence[Tensor], wanted: Sequence[bool], spec: Spec
    ) -> tuple[Tensor, list[Tensor | None]]: ...
    @staticmethod
    def devices() -> tuple[int, str]: ...
    @staticmethod
    def launches() -> int: ...

"""The native module: fused kernels on tensors, which hand their memory over by DLPack's C exchange interface.

Tensors have adjacent features and one stride from group to group (`icsd.ops.fused.sample_dense`); a loss is a
number of csrc/core/losses.h. `icsd.ops.cpu` and `icsd.ops.cuda` call these functions, and check nothing again.
"""

from collections.abc import Sequence
from typing import TypedDict

from torch import Tensor

class _Build(TypedDict):
    compiler: str
    cpu: str
    cuda: str

INTERFACE: int
build: _Build

def cpu_isa() -> str: ...
def empty_cache() -> None: ...
def gram(x: Tensor) -> Tensor: ...
def combine(matrix: Tensor, x: Tensor) -> Tensor: ...
def distill(
    stages: Sequence[Tensor],
    save: bool,
    weights: Sequence[float],
    loss_kind: int,
    parameters: Sequence[float],
    eps: float,
    teacher_gradient: bool,
    regime: str,
) -> tuple[Tensor, Tensor]: ...
def distill_backward(
    grad: Tensor,
    saved: Tensor,
    stages: Sequence[Tensor],
    wanted: Sequence[bool],
    weights: Sequence[float],
    loss_kind: int,
    parameters: Sequence[float],
    eps: float,
    teacher_gradient: bool,
    regime: str,
) -> list[Tensor | None]: ...

class cuda:
    """The same on the current CUDA device, enqueued on a stream (a `cudaStream_t`); not there if built without nvcc.

    Results and workspaces are the caller's; a workspace has the bytes that its function tells.
    """

    @staticmethod
    def devices() -> tuple[int, str]: ...
    @staticmethod
    def launches() -> int: ...
    @staticmethod
    def gram_workspace(x: Tensor) -> int: ...
    @staticmethod
    def gram(x: Tensor, out: Tensor, workspace: Tensor, stream: int) -> None: ...
    @staticmethod
    def combine(matrix: Tensor, x: Tensor, out: Tensor, stream: int) -> None: ...
    @staticmethod
    def distill_workspace(stages: Sequence[Tensor], loss_kind: int, save: bool) -> int: ...
    @staticmethod
    def distill(
        stages: Sequence[Tensor],
        weights: Sequence[float],
        loss_kind: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        loss: Tensor,
        saved: Tensor | None,
        workspace: Tensor,
        stream: int,
    ) -> None: ...
    @staticmethod
    def distill_backward(
        grad: Tensor,
        saved: Tensor,
        stages: Sequence[Tensor],
        outs: Sequence[Tensor | None],
        weights: Sequence[float],
        teacher_gradient: bool,
        stream: int,
    ) -> None: ...
    @staticmethod
    def feature_workspace(stages: Sequence[Tensor], save: bool) -> int: ...
    @staticmethod
    def distill_feature(
        stages: Sequence[Tensor],
        weights: Sequence[float],
        loss_kind: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        loss: Tensor,
        saved: Tensor | None,
        workspace: Tensor,
        stream: int,
    ) -> None: ...
    @staticmethod
    def feature_backward_workspace(stages: Sequence[Tensor]) -> int: ...
    @staticmethod
    def distill_feature_backward(
        grad: Tensor,
        saved: Tensor,
        stages: Sequence[Tensor],
        outs: Sequence[Tensor | None],
        weights: Sequence[float],
        loss_kind: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        workspace: Tensor,
        stream: int,
    ) -> None: ...
    @staticmethod
    def streamed_workspace(stages: Sequence[Tensor], teacher_gradient: bool, save: bool, band_bytes: int) -> int: ...
    @staticmethod
    def distill_streamed(
        stages: Sequence[Tensor],
        weights: Sequence[float],
        loss_kind: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        loss: Tensor,
        saved: Tensor | None,
        band_bytes: int,
        workspace: Tensor,
        stream: int,
    ) -> None: ...
    @staticmethod
    def distill_streamed_backward(
        grad: Tensor,
        saved: Tensor,
        stages: Sequence[Tensor],
        outs: Sequence[Tensor | None],
        weights: Sequence[float],
        loss_kind: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        band_bytes: int,
        workspace: Tensor,
        stream: int,
    ) -> None: ...

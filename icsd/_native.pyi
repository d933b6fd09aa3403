"""The native module: fused kernels on raw pointers. `icsd.ops.cpu` calls it with tensors it checked and keeps alive."""

from collections.abc import Sequence
from typing import TypedDict

# (address, dtype code of csrc/core/dtype.h, features, group stride, sample stride), strides in elements
_Features = tuple[int, int, int, int, int]

class _Build(TypedDict):
    compiler: str
    cpu: str
    cuda: str

build: _Build

def cpu_isa() -> str: ...
def gram(x: _Features, groups: int, samples: int, out: int) -> None: ...
def combine(matrix: int, outputs: int, x: _Features, groups: int, samples: int, out: _Features) -> None: ...
def distill(
    stages: Sequence[_Features],
    groups: int,
    samples: int,
    weights: Sequence[float],
    divergence: int,
    parameters: Sequence[float],
    eps: float,
    teacher_gradient: bool,
    loss: int,
    slots: int,
) -> None: ...
def distill_backward(
    grad: int,
    slots: int,
    stages: Sequence[_Features],
    outs: Sequence[_Features],
    wide: bool,
    groups: int,
    samples: int,
) -> None: ...
def distill_feature(
    stages: Sequence[_Features],
    groups: int,
    samples: int,
    weights: Sequence[float],
    divergence: int,
    parameters: Sequence[float],
    eps: float,
    teacher_gradient: bool,
    loss: int,
    saved: int,
) -> None: ...
def distill_feature_backward(
    grad: int,
    saved: int,
    stages: Sequence[_Features],
    outs: Sequence[_Features],
    groups: int,
    samples: int,
    weights: Sequence[float],
    divergence: int,
    parameters: Sequence[float],
    eps: float,
    teacher_gradient: bool,
) -> None: ...
def distill_streamed(
    stages: Sequence[_Features],
    groups: int,
    samples: int,
    weights: Sequence[float],
    divergence: int,
    parameters: Sequence[float],
    eps: float,
    teacher_gradient: bool,
    loss: int,
    saved: int,
) -> None: ...
def distill_streamed_backward(
    grad: int,
    saved: int,
    stages: Sequence[_Features],
    outs: Sequence[_Features],
    groups: int,
    samples: int,
    weights: Sequence[float],
    divergence: int,
    parameters: Sequence[float],
    eps: float,
    teacher_gradient: bool,
) -> None: ...

class cuda:
    """The same on the current CUDA device, enqueued on a stream (a `cudaStream_t`); not there if built without nvcc."""

    @staticmethod
    def devices() -> tuple[int, str]: ...
    @staticmethod
    def launches() -> int: ...
    @staticmethod
    def gram_workspace(x: _Features, groups: int, samples: int) -> int: ...
    @staticmethod
    def gram(x: _Features, groups: int, samples: int, out: int, workspace: int, stream: int) -> None: ...
    @staticmethod
    def combine(
        matrix: int, outputs: int, x: _Features, groups: int, samples: int, out: _Features, stream: int
    ) -> None: ...
    @staticmethod
    def distill_workspace(
        stages: Sequence[_Features], groups: int, samples: int, divergence: int, save: bool
    ) -> int: ...
    @staticmethod
    def distill(
        stages: Sequence[_Features],
        groups: int,
        samples: int,
        weights: Sequence[float],
        divergence: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        loss: int,
        slots: int,
        workspace: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def distill_backward(
        grad: int,
        slots: int,
        stages: Sequence[_Features],
        outs: Sequence[_Features],
        wide: bool,
        groups: int,
        samples: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def feature_workspace(stages: Sequence[_Features], groups: int, samples: int, save: bool) -> int: ...
    @staticmethod
    def distill_feature(
        stages: Sequence[_Features],
        groups: int,
        samples: int,
        weights: Sequence[float],
        divergence: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        loss: int,
        moments: int,
        workspace: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def feature_backward_workspace(stages: Sequence[_Features], groups: int, samples: int) -> int: ...
    @staticmethod
    def distill_feature_backward(
        grad: int,
        moments: int,
        stages: Sequence[_Features],
        outs: Sequence[_Features],
        groups: int,
        samples: int,
        weights: Sequence[float],
        divergence: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        workspace: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def streamed_workspace(
        stages: Sequence[_Features], groups: int, samples: int, teacher_gradient: bool, save: bool, band_bytes: int
    ) -> int: ...
    @staticmethod
    def distill_streamed(
        stages: Sequence[_Features],
        groups: int,
        samples: int,
        weights: Sequence[float],
        divergence: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        loss: int,
        saved: int,
        band_bytes: int,
        workspace: int,
        stream: int,
    ) -> None: ...
    @staticmethod
    def distill_streamed_backward(
        grad: int,
        saved: int,
        stages: Sequence[_Features],
        outs: Sequence[_Features],
        groups: int,
        samples: int,
        weights: Sequence[float],
        divergence: int,
        parameters: Sequence[float],
        eps: float,
        teacher_gradient: bool,
        band_bytes: int,
        workspace: int,
        stream: int,
    ) -> None: ...

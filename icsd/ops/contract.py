"""The contract between the operator and the kernels of a backend: functions on tensors, without derivatives.

Every fused backend has those of `Launcher`; those for similarities to banks are extras.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from icsd.losses import SimilarityLoss
from icsd.losses.gram import compute_dtype
from icsd.ops.regimes import Regime

MAX_STATISTICS = 5  # kMaxStatistics of csrc/core/losses.h


class Spec(NamedTuple):
    """The specification of a distillation call.

    Attributes:
        loss: The name of the loss.
        parameters: The parameters of the loss, in the order of `Loss.kernel_parameters`.
        weights: One weight for each student.
        eps: The least norm of a sample.
        teacher_gradient: True if the backward pass may ask for the gradient of the teacher.
        regime: The way to compute the loss.
        center: True if the mean sample of each group is subtracted before samples are compared. Only the regime
            `"sample"` can do that; for the others the features are centered before.
    """

    loss: str
    parameters: tuple[float, ...]
    weights: tuple[float, ...]
    eps: float
    teacher_gradient: bool
    regime: Regime
    center: bool = False

    @property
    def reads_teacher(self) -> bool:
        """True if the backward pass reads the features of the teacher, which then stay alive until it."""
        return self.teacher_gradient or self.regime != "sample"


class Launcher(Protocol):
    """The passes over the data that a backend has kernels for.

    Inputs are `(*B, N, D_k)`, one for each student and the last one for the teacher. They are float32, float64,
    bfloat16 or float16 with any strides, on one device that the backend takes, and the launcher `reads` them.
    """

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether the elements of the tensors lie in their memory, where these functions read them.

        They do not in subclasses, in tensors of `torch.func.vmap` and in lazy negations.
        """

    def gram(self, x: Tensor) -> Tensor:
        """Return K = X Xᵀ, `(*B, N, N)` in compute dtype."""

    def combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        """Return the product of `matrix` `(*B, M, N)` in compute dtype and `x` `(*B, N, D)`, in the dtype of `x`."""

    def distill(self, inputs: Sequence[Tensor], spec: Spec, save: bool) -> tuple[Tensor, Tensor]:
        """Return the loss `(*B)` in compute dtype and, if `save`, what the backward pass needs.

        The latter has the backend's `saved_shape` and `saved_dtype`. Without `save` it is an empty tensor.
        """

    def distill_backward(
        self, grad: Tensor, saved: Tensor, inputs: Sequence[Tensor], wanted: Sequence[bool], spec: Spec
    ) -> list[Tensor | None]:
        """Return the gradients of the inputs in their dtypes, None for those that are not wanted.

        `grad` is the gradient of the loss `(*B)`. The teacher is among the inputs if `spec.reads_teacher`. Its gradient
        may be wanted if `spec.teacher_gradient`.
        """


class BankKernels(Protocol):
    """Kernels for `kl`, `mse` and `smooth_l1` of similarities to banks.

    The features are those of student, teacher, the student's bank and the teacher's bank, as `Launcher` takes them.
    """

    def takes(self, features: Sequence[Tensor], wanted: Sequence[bool]) -> bool:
        """Return whether there are kernels for these sizes and for the gradients that are wanted."""

    def distill(
        self, features: Sequence[Tensor], wanted: Sequence[bool], loss: SimilarityLoss, eps: float
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss `(*B)` in compute dtype and its gradients with respect to the features that are wanted."""


class BankPasses(Protocol):
    """The native passes over a piece of exponents, `(*B, N, C)` of student and teacher, which they replace.

    `rows` `(*B, N, 5)` has the largest exponents of student and teacher, the sums of both exponentials, and the sum of
    the teacher's exponentials times the differences of both exponents.
    """

    def add_exponentials(self, student: Tensor, teacher: Tensor, rows: Tensor, rising: bool) -> None:
        """Replace exponents by exponentials and add them to `rows`, relative to the largest ones if `rising`."""

    def exponent_gradients(
        self, student: Tensor, teacher: Tensor, rows: Tensor, student_factor: float, teacher_factor: float
    ) -> None:
        """Replace exponents by the derivatives of the loss of each row, times factors."""


def sample_dense(x: Tensor) -> Tensor:
    """Return `x` with adjacent features and one stride from group to group: itself if it is so, a copy otherwise."""
    if x.dim() > 3 and x.numel():
        x = x.flatten(0, -3).unflatten(0, x.shape[:-2])
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.contiguous()


def is_same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same elements in memory."""
    return a.data_ptr() == b.data_ptr() and (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())


def saved_shape(inputs: Sequence[Tensor], spec: Spec) -> tuple[int, ...]:
    """Return the shape of what `Launcher.distill` saves, unless a backend has one of its own.

    * `sample`: for each stage, the matrix of its gradient with one more column, `(stages, *B, N, N + 1)`, see
      csrc/cpu/sample.h.
    * `feature`: the D x D matrices of csrc/core/covariance.h, `(*B, E)`: X̂ᵀX̂ and X̂ᵀŶ of every student, then ŶᵀŶ.
    * `streamed`: the squared norms of all samples of all stages, then `MAX_STATISTICS` numbers for each row of each
      student, `(*B, E)`, see csrc/cpu/streamed.h.
    """
    *groups, n, dim = inputs[-1].shape
    students = inputs[:-1]
    if spec.regime == "feature":
        elements = sum(student.shape[-1] * (student.shape[-1] + dim) for student in students)
        return (*groups, elements + dim * dim)
    if spec.regime == "streamed":
        return (*groups, n * (len(inputs) + MAX_STATISTICS * len(students)))
    return (len(inputs), *groups, n, n + 1)


def unit_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a gradient for a gradient 1 of the loss, which is multiplied later.

    float16 would underflow before the factor of a gradient scaler comes.
    """
    return torch.float32 if x.dtype is torch.float16 else x.dtype


def saved_dtype(inputs: Sequence[Tensor], spec: Spec) -> torch.dtype:
    """Return the dtype of what `Launcher.distill` saves. Sums over many samples are in float64."""
    return torch.float64 if spec.regime == "feature" else compute_dtype(*inputs)

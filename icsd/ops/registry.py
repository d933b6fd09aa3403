"""The backends of the operator and the choice between them.

Without a name, the first registered backend that can run and that takes the inputs is chosen; `reference` is the last
one and always does. With a name (an argument, `use_backend`, or `ICSD_BACKEND` when the package is imported), that
backend runs, or an error lists all backends and why they do not.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from icsd.losses import Loss
from icsd.losses.gram import similarity_to
from icsd.ops.contract import BankKernels, BankPasses


class Backend(ABC):
    """An implementation of the operator.

    Attributes:
        name: The name by which it is asked for.
        description: A few words about its code.
        ready: True once it is known to be available and stays so: then it is not asked again.
        bank_passes: The passes over similarities to banks that it has kernels for, see `icsd.ops.row_sums`, or None.
        has_bank_kernels: True if it computes losses to banks itself. Others leave it to PyTorch's products.
        bank_kernels: The kernels that do so.
        bank_order: Its place among the backends that do so: on a GPU, the lowest is the default.
    """

    name: str
    description: str
    ready: bool = False
    bank_passes: BankPasses | None = None
    has_bank_kernels: bool = False
    bank_kernels: BankKernels
    bank_order: int = 0

    @abstractmethod
    def unavailable(self) -> str | None:
        """Return why this machine and this build cannot run the backend, or None."""

    @abstractmethod
    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        """Return why the backend does not take these inputs, or None."""

    @abstractmethod
    def gram(self, x: Tensor) -> Tensor:
        """Return K = X Xᵀ, `(*B, N, N)` in compute dtype, of `(*B, N, D)`. It is twice differentiable."""

    def similarity_to(self, x: Tensor, other: Tensor, eps: float) -> Tensor:
        """Return the similarities `(*B, N, M)` of `(*B, N, D)` to `(*B, M, D)`. They are twice differentiable.

        By default this is PyTorch's product, because there is no symmetry for a kernel to use.
        """
        return similarity_to(x, other, eps)

    @abstractmethod
    def distill(
        self, stages: Sequence[Tensor], weights: Sequence[float], loss: Loss, eps: float, center: bool = False
    ) -> Tensor:
        """Return Σ_k w_k d(S(X_k), S(Y)), `(*B)`, where Y is the last stage. It is twice differentiable.

        If `center`, the stages are those given minus the mean sample of each group.
        """


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """The status of one backend.

    Attributes:
        name: Its name for `backend=`, `use_backend` and `ICSD_BACKEND`.
        description: A few words on its implementation.
        available: True if this machine and this build can run it.
        reason: The reason if they cannot, None otherwise.
    """

    name: str
    description: str
    available: bool
    reason: str | None


_backends: dict[str, Backend] = {}
_default: str | None = os.environ.get("ICSD_BACKEND") or None


class _Choice(threading.local):
    """The name that this thread asks for. `torch.compile` traces and guards this form of thread-local state."""

    def __init__(self) -> None:
        self.name = _default


_choice = _Choice()


def register(backend: Backend) -> None:
    """Register a backend. Those registered earlier are preferred."""
    _backends[backend.name] = backend


@contextmanager
def temporarily(backend: Backend) -> Iterator[Backend]:
    """Register a backend within the `with` block, in place of the one of the same name if there is one."""
    before = dict(_backends)
    register(backend)
    try:
        yield backend
    finally:
        _backends.clear()
        _backends.update(before)


def get(name: str) -> Backend:
    """Return the backend of a name.

    Raises:
        ValueError: There is no backend of this name.
    """
    if name not in _backends:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(map(repr, _backends))}")
    return _backends[name]


def backends() -> list[BackendStatus]:
    """Return the status of every backend, in order of preference."""
    reasons = ((backend, backend.unavailable()) for backend in _backends.values())
    return [BackendStatus(backend.name, backend.description, reason is None, reason) for backend, reason in reasons]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operator on one backend within the `with` block, in this thread.

    Compiled functions may contain such a block or be called within one. They are compiled again for another backend.

    Args:
        name: The name of one of `icsd.backends()`.

    Raises:
        ValueError: The name is unknown.
    """
    before, _choice.name = _choice.name, get(name).name
    try:
        yield
    finally:
        _choice.name = before


def name_of(requested: str | None) -> str | None:
    """Return the name of the backend that is asked for: in the call, by `use_backend` or by `ICSD_BACKEND`."""
    return requested or _choice.name


def applicable(tensors: Sequence[Tensor]) -> list[Backend]:
    """Return the backends that can run and that take these inputs, in order of preference."""
    return [backend for backend in _backends.values() if _refusal(backend, tensors) is None]


def select(requested: str | None, tensors: Sequence[Tensor]) -> Backend:
    """Return the backend for these inputs.

    Args:
        requested: The name of the backend. By default, the one of `use_backend`, or the first that takes the inputs.
        tensors: All inputs of the call.

    Raises:
        ValueError: The name is unknown.
        RuntimeError: The backend does not take the inputs. The message lists all backends and why they do not.
    """
    name = requested or _choice.name
    for backend in _backends.values() if name is None else (get(name),):
        if (backend.ready or backend.unavailable() is None) and backend.unsupported(tensors) is None:
            return backend
    lines = [f"  {backend.name}: {_refusal(backend, tensors) or 'applies'}" for backend in _backends.values()]
    raise RuntimeError("\n".join([f"backend {name!r} does not apply here; the candidates are", *lines]))


def _refusal(backend: Backend, tensors: Sequence[Tensor]) -> str | None:
    return (None if backend.ready else backend.unavailable()) or backend.unsupported(tensors)

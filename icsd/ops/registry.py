"""Backends of the operator, and the choice among them.

Asked for by name (argument, `use_backend`, or `ICSD_BACKEND` when the package is imported), exactly that backend runs
or an error lists every candidate; otherwise the best that applies runs, `reference` being the last.
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


class Backend(ABC):
    """One implementation of the operator."""

    name: str
    description: str

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why this machine and this build cannot run it, or None."""

    @abstractmethod
    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        """Why it does not take these inputs, or None."""

    @abstractmethod
    def gram(self, x: Tensor) -> Tensor:
        """K = X Xᵀ in compute dtype, differentiable: `(*B, N, D)` to `(*B, N, N)`."""

    def similarity_to(self, x: Tensor, other: Tensor, eps: float) -> Tensor:
        """Similarities of the samples of two batches, differentiable twice: `(*B, N, D)`, `(*B, M, D)` to `(*B, N, M)`.

        By PyTorch's own product, unless a backend has a better one: there is no symmetry to gain from.
        """
        return similarity_to(x, other, eps)

    @abstractmethod
    def distill(self, stages: Sequence[Tensor], weights: Sequence[float], loss: Loss, eps: float) -> Tensor:
        """Σ_k w_k d(S(X_k), S(Y)) of every group, Y being the last of the stages, differentiable twice: `(*B)`."""


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """What `backends()` tells of one backend.

    Attributes:
        name: What `backend=`, `use_backend` and `ICSD_BACKEND` call it.
        description: What it is.
        available: Whether this machine and this build can run it.
        reason: Why not, if not.
    """

    name: str
    description: str
    available: bool
    reason: str | None


_backends: dict[str, Backend] = {}
_default: str | None = os.environ.get("ICSD_BACKEND") or None


class _Choice(threading.local):
    """The name that this thread asks for: a form of thread-local state that torch.compile traces and guards."""

    def __init__(self) -> None:
        self.name = _default


_choice = _Choice()


def register(backend: Backend) -> None:
    """Adds a backend; earlier ones are preferred."""
    _backends[backend.name] = backend


def get(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: There is none.
    """
    if name not in _backends:
        raise ValueError(f"backend {name!r} is unknown; choose one of {', '.join(map(repr, _backends))}")
    return _backends[name]


def backends() -> list[BackendStatus]:
    """Every backend in order of preference, and why those that cannot run here cannot."""
    reasons = ((backend, backend.unavailable()) for backend in _backends.values())
    return [BackendStatus(backend.name, backend.description, reason is None, reason) for backend, reason in reasons]


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the operator on one backend within the `with` block, in this thread.

    Compiled functions may hold such a block or be called within one: they are compiled again for another choice.

    Raises:
        ValueError: Unknown name.
    """
    before, _choice.name = _choice.name, get(name).name
    try:
        yield
    finally:
        _choice.name = before


def select(requested: str | None, tensors: Sequence[Tensor]) -> Backend:
    """The backend for these inputs.

    Raises:
        ValueError: The one asked for is unknown.
        RuntimeError: The one asked for does not apply; the message lists every candidate with its reason.
    """
    name = requested or _choice.name
    for backend in _backends.values() if name is None else (get(name),):
        if _refusal(backend, tensors) is None:
            return backend
    lines = [f"  {backend.name}: {_refusal(backend, tensors) or 'applies'}" for backend in _backends.values()]
    raise RuntimeError("\n".join([f"backend {name!r} does not apply here; the candidates are", *lines]))


def _refusal(backend: Backend, tensors: Sequence[Tensor]) -> str | None:
    return backend.unavailable() or backend.unsupported(tensors)

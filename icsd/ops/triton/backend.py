"""The Triton backend. It imports triton when it launches its first kernel."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from icsd.ops.backend import FusedBackend
from icsd.ops.cuda import capture_unsupported

_installed = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

# Compiled graphs depend on the sources of this package and on these environment variables.
SOURCES = hashlib.sha256(
    b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))
).hexdigest()
SETTINGS = ("ICSD_TRITON_PRECISION", "ICSD_TRITON_AUTOTUNE")


class TritonBackend(FusedBackend):
    """A backend of Triton kernels, for every GPU that Triton compiles for.

    With `TRITON_INTERPRET=1`, Triton interprets the kernels on CPU tensors.
    """

    name = "triton"
    description = "fused Triton kernels"
    device_type = "cpu" if _interpreted else "cuda"  # "cuda" is PyTorch's name for AMD's GPUs, too
    regimes = {  # noqa: RUF012
        "mse": ("sample", "feature", "streamed"),
        "kl": ("sample", "streamed"),
        "smooth_l1": ("sample", "streamed"),
    }

    centers = True
    has_bank_kernels = True

    # The other regimes launch many kernels that write parts of one result; a functional graph would copy it for each.
    traced = () if _interpreted else ("sample",)

    @cached_property
    def launcher(self) -> ModuleType:
        from icsd.ops.triton import launcher

        return launcher

    @cached_property
    def bank_kernels(self) -> ModuleType:
        from icsd.ops.triton import banks

        return banks

    @property
    def key(self) -> str:
        return " ".join([self.name, SOURCES, *(os.environ.get(name, "") for name in SETTINGS)])

    def unavailable(self) -> str | None:
        """Return why the kernels cannot run here, or None if they can."""
        if not _installed:
            return 'triton is not installed; run: pip install -e ".[triton]" in the checkout'
        if not _interpreted and not torch.cuda.is_available():
            return "no GPU with a driver is found; TRITON_INTERPRET=1 interprets the kernels on the CPU"
        return None

    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        return super().unsupported(tensors) or (None if _interpreted else capture_unsupported())

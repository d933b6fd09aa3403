"""The Triton backend. It imports triton when it first launches a kernel."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from icsd.losses.gram import compute_dtype
from icsd.ops.fused import Distillation, FusedBackend, saved_dtype, saved_shape

_installed = importlib.util.find_spec("triton") is not None
_interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

# What decides on launches: this package and variables.
SOURCES = hashlib.sha256(
    b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py")))
).hexdigest()
SETTINGS = ("ICSD_TRITON_PRECISION", "ICSD_TRITON_AUTOTUNE")


class TritonBackend(FusedBackend):
    """Kernels in Triton, for every GPU it compiles for; with `TRITON_INTERPRET=1` also step by step on the CPU."""

    name = "triton"
    description = "fused Triton kernels"
    device_type = "cuda"  # PyTorch calls AMD's so too
    regimes = {  # noqa: RUF012
        "mse": ("sample", "feature", "streamed"),
        "kl": ("sample", "streamed"),
        "smooth_l1": ("sample", "streamed"),
    }

    # The others are many launches into parts of one result, which a functional graph would copy for each.
    traced = () if _interpreted else ("sample",)

    @property
    def key(self) -> str:
        return " ".join([self.name, SOURCES, *(os.environ.get(name, "") for name in SETTINGS)])

    def unavailable(self) -> str | None:
        """Why there is nothing to run it with or on, if so."""
        if not _installed:
            return 'triton is not installed; run: pip install "icsd[triton]"'
        if not _interpreted and not torch.cuda.is_available():
            return "no GPU with a driver is found; TRITON_INTERPRET=1 interprets the kernels on the CPU"
        return None

    def unsupported(self, tensors: Sequence[Tensor]) -> str | None:
        if _interpreted and all(tensor.device.type == "cpu" and tensor.layout == torch.strided for tensor in tensors):
            return None
        return super().unsupported(tensors)

    def launch_gram(self, x: Tensor) -> Tensor:
        from icsd.ops.triton.launch import as_groups, gram

        out = x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=compute_dtype(x))
        gram(as_groups(x), as_groups(out))
        return out

    def launch_combine(self, matrix: Tensor, x: Tensor) -> Tensor:
        from icsd.ops.triton.launch import as_groups, combine

        out = x.new_empty((*matrix.shape[:-1], x.shape[-1]))
        combine(as_groups(matrix), as_groups(x), as_groups(out))
        return out

    def launch_distill(self, stages: Sequence[Tensor], how: Distillation, save: bool) -> tuple[Tensor, Tensor]:
        from icsd.ops.triton.launch import as_groups

        saved = stages[-1].new_empty(saved_shape(stages, how) if save else 0, dtype=saved_dtype(stages, how))
        groups = [as_groups(stage) for stage in stages]
        loss = _regime(how).distill(groups, how, saved if save else None)
        return loss.view(stages[-1].shape[:-2]), saved

    def launch_distill_backward(
        self, grad: Tensor, saved: Tensor, stages: Sequence[Tensor], wanted: Sequence[bool], how: Distillation
    ) -> list[Tensor | None]:
        from icsd.ops.triton.launch import as_groups

        outs = [x.new_empty(x.shape) if want else None for x, want in zip(stages, wanted, strict=True)]
        views = [None if out is None else as_groups(out) for out in outs]
        groups = [as_groups(stage) for stage in stages]
        _regime(how).distill_backward(grad.reshape(-1).contiguous(), saved, groups, views, how)
        return outs


def _regime(how: Distillation) -> ModuleType:
    """The module that computes it."""
    from icsd.ops.triton import feature_space, sample_space, streamed

    return {"sample": sample_space, "feature": feature_space, "streamed": streamed}[how.regime]

"""The cases for which docs/kernels.md lists the GPU kernels; the tests pin their resources and their traffic."""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    """A distillation from a teacher to one student; both have N samples of dimension D."""

    regime: str
    loss: str
    dtype: str
    samples: int
    dim: int


CASES = [
    Case("sample", "kl", "float32", 64, 2048),
    Case("sample", "kl", "bfloat16", 64, 2048),
    Case("feature", "mse", "float32", 512, 256),
    Case("streamed", "kl", "float32", 512, 256),
]
PASSES = ("forward", "backward")
TEMPERATURES = [0.1, 0.1, 1.0]  # the parameters of kl: both temperatures, and the diagonal included

"""Check every kernel of a GPU's backend against float64 at the sizes where launches change.

`python -m tools.gpu_checks FILE` appends failures and their count to a file of JSON lines. With `--backend triton` it
checks the Triton kernels, and with `--one-of-each` one shape for each kernel, which is short enough for
compute-sanitizer.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import icsd
from benchmarks import records
from icsd.ops.regimes import force_regime
from tools.gpu_device import GPU, open_device

# Tiles of 16, 32, 64, 96 and 128 samples; one tile, several, and one more; then the limits of shared memory.
FEW = [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 257, 300]
MANY = [1025, 2048, 2049, 3073, 4096, 5120, 5121, 5793]
DIMS = [1, 8, 33, 260, 4099]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = ["kl", "mse", "smooth_l1", "cc", "pkt"]
# The bounds of the norms of errors, relative to the norms of the values: some roundings of the dtype.
NEARLY_ZERO = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-6, torch.float16: 1e-6}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 2**-7, torch.float16: 2**-9}


class Check(NamedTuple):
    """One call: a distillation to two students of equal and of another dimension."""

    samples: int
    dim: int
    dtype: torch.dtype
    regime: str
    loss: str

    def __str__(self) -> str:
        return f"{self.regime} {self.loss} {self.samples} x {self.dim} {str(self.dtype).removeprefix('torch.')}"


def sweep() -> Iterator[Check]:
    """Return checks of all thresholds with all dtypes; losses take turns."""
    losses = itertools.cycle(LOSSES)
    for samples, dtype in itertools.product(FEW, DTYPES):
        for dim in DIMS:
            yield Check(samples, dim, dtype, "sample", next(losses))
            if dim <= 260:
                yield Check(samples, dim, dtype, "streamed", next(losses))
                yield Check(samples, dim, dtype, "feature", "mse")
    for samples, dtype in itertools.product(MANY, DTYPES):
        yield Check(samples, 40, dtype, "sample", next(losses))
        yield Check(samples, 40, dtype, "streamed", next(losses))
        yield Check(samples, 40, dtype, "feature", "mse")


def one_of_each() -> Iterator[Check]:
    """Return one check for each kernel, small enough for compute-sanitizer."""
    for dtype in DTYPES:
        yield Check(17, 70, dtype, "sample", "kl")
        yield Check(70, 40, dtype, "sample", "mse")
        yield Check(150, 40, dtype, "streamed", "kl")
        yield Check(150, 40, dtype, "feature", "mse")
    for loss in icsd.losses.LOSSES:
        yield Check(35, 50, torch.float32, "sample", loss)


def loss_and_gradients(stages: list[Tensor], check: Check, backend: str) -> list[Tensor]:
    """Return the loss and the gradients of all stages, scaled so that float16 can hold them."""
    options = {"weights": [check.samples, 0.5 * check.samples], "detach_teacher": False, "backend": backend}
    with force_regime(check.regime if backend != "reference" else "sample"):
        loss = icsd.interstage_distillation_loss(stages, check.loss, **options)
        return [loss.detach(), *torch.autograd.grad(loss, stages)]


def run(check: Check, device: GPU, backend: str) -> str | None:
    """Return what is wrong with the results of a check, if something is."""
    generator = torch.Generator().manual_seed(check.samples * 7919 + check.dim)
    common = torch.randn(check.samples, 4, generator=generator)
    stages = []
    for dim in (check.dim, check.dim + 3, check.dim):
        x = common @ torch.randn(4, dim, generator=generator) + torch.randn(check.samples, dim, generator=generator)
        stages.append(x.to(device.device, check.dtype).requires_grad_())
    results = loss_and_gradients(stages, check, backend)
    truth = loss_and_gradients([x.detach().double().requires_grad_() for x in stages], check, "reference")
    for name, got, want in zip(
        ("loss", "gradient 0", "gradient 1", "the teacher's gradient"), results, truth, strict=True
    ):
        error = torch.dist(got.double(), want).item()
        bound = TOLERANCE[check.dtype] * want.norm().item() + NEARLY_ZERO[check.dtype]
        if not error <= bound:
            return f"{name} is off by {error:.2g}, where {bound:.2g} is allowed"
    return None


def main() -> int:
    """Append the results; return 2 if there is no device, 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="the file of JSON lines")
    parser.add_argument("--backend", help="the backend, by default the compiled one")
    parser.add_argument("--one-of-each", action="store_true", help="check one shape for each kernel")
    options = parser.parse_args()
    device = open_device()
    if (reason := device.unavailable()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 2
    backend = options.backend or device.backend
    every = list(one_of_each() if options.one_of_each else sweep())
    checks = device.choose(every, [check for check in every if check.samples in (17, 33) and check.dim in (33, 70)])
    failed = 0
    for check in checks:
        try:
            wrong = run(check, device, backend)
        except RuntimeError as error:
            wrong = str(error).partition("\n")[0]
        if wrong is not None:
            failed += 1
            records.append(options.file, "failure", name=f"{backend}: {check}", detail=wrong)
    print(f"{len(checks)} checks of {backend}, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The launches of the CUDA backend at the shapes of docs/kernels.md, counted in the emulator.

`python -m tools.kernel_table --pin` has it write launches.csv anew.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from emulated import EmulatedBackend, Traffic
from resources import instructions

import icsd
from icsd.ops import registry
from icsd.ops.regimes import force_regime
from tools.kernel_cases import CASES, PASSES, Case

TABLE = Path(__file__).with_name("launches.csv")
ARCHITECTURES = ("80", "75")  # the emulated device has their capability
MULTIPROCESSORS = 132


class Launches(NamedTuple):
    """The launches of one kernel in one pass.

    Attributes:
        kernel: Its name.
        threads: Threads of a block.
        shared: Bytes of dynamic shared memory of a block.
        bytes: Bytes of features and gradients that are read and written, for each feature of the stages it touches.
    """

    kernel: str
    threads: int
    shared: int
    bytes: float


def count(backend: EmulatedBackend, case: Case) -> dict[str, list[Launches]]:
    """By pass, in their order."""
    backend.library.emulator_multiprocessors(MULTIPROCESSORS)
    stages = [torch.randn(case.samples, case.dim).to(getattr(torch, case.dtype)) for _ in range(2)]
    stages[0].requires_grad_()
    with force_regime(case.regime):
        with Traffic(backend.library, *stages) as forward:
            loss = icsd.similarity_distillation_loss(*stages, case.loss, backend=backend.name)
        with Traffic(backend.library, *stages) as backward:
            (gradient,) = torch.autograd.grad(loss, stages[0])
    found = _by_kernel(forward, stages), _by_kernel(backward, [*stages, gradient])
    return dict(zip(PASSES, map(list, found), strict=True))


def _by_kernel(traffic: Traffic, tensors: list[torch.Tensor]) -> Iterator[Launches]:
    for name in dict.fromkeys(launch.kernel for launch in traffic.launches):
        of_kernel = [launch for launch in traffic.launches if launch.kernel == name]
        moved = [sum(launch.bytes.get(x.data_ptr(), 0) for launch in of_kernel) for x in tensors]
        touched = sum(x.numel() for x, number in zip(tensors[:2], moved, strict=False) if number)
        shared = max(launch.shared for launch in of_kernel)
        yield Launches(name, of_kernel[0].threads, shared, round(sum(moved) / max(1, touched), 1))


def main() -> None:
    """Write the table."""
    matrix = {}  # float64 products are those of groups that cancel, in kernels that have others
    for kernel, code in instructions("80").items():
        found = re.findall(r"\b[A-Z]+MMA\.\S+", code)
        matrix[kernel] = min(found, key=lambda name: name.startswith("DMMA"), default="")
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Case._fields, "pass", "architecture", *Launches._fields, "instruction"])
        for architecture in ARCHITECTURES:
            backend = EmulatedBackend("counted", int(architecture))
            registry.register(backend)
            for case in CASES:
                if case.regime not in backend.regimes[case.loss]:
                    continue
                for name, launches in count(backend, case).items():
                    for launch in launches:
                        instruction = matrix[launch.kernel] if architecture == "80" else ""
                        writer.writerow([*case, name, architecture, *launch, instruction])


if __name__ == "__main__":
    main()

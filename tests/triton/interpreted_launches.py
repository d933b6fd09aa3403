"""Count in the interpreter what the Triton backend launches at the shapes of the kernel table.

`python -m tools.kernel_table --pin` has it write launches.csv anew.
"""

import csv
from pathlib import Path

import pytest
import torch
from accesses import record

import icsd
from icsd.ops.regimes import force_regime
from tools.kernel_cases import CASES, PASSES, Case

TABLE = Path(__file__).with_name("launches.csv")


def count(case, trace):
    """Return the kernels of each pass, in their order, with the bytes of features and gradients that they move.

    The bytes are read or written, for each feature of the stages that the kernel accesses.
    """
    stages = [torch.randn(case.samples, case.dim).to(getattr(torch, case.dtype)) for _ in range(2)]
    stages[0].requires_grad_()
    first = len(trace.kernels)
    with force_regime(case.regime):
        loss = icsd.similarity_distillation_loss(*stages, case.loss, backend="triton")
        middle = len(trace.kernels)
        (gradient,) = torch.autograd.grad(loss, stages[0])
    passes = range(first, middle), range(middle, len(trace.kernels))
    return {name: by_kernel(trace, launches, stages, gradient) for name, launches in zip(PASSES, passes, strict=True)}


def by_kernel(trace, launches, stages, gradient):
    found = {}
    for name in dict.fromkeys(trace.kernels[number] for number in launches):
        of_kernel = [
            access
            for access in trace.loads + trace.stores
            if access[0] in launches and trace.kernels[access[0]] == name
        ]
        moved = [trace.bytes(of_kernel, tensor) for tensor in (*stages, gradient)]
        touched = sum(x.numel() for x, number in zip(stages, moved, strict=False) if number)
        found[name] = round(sum(moved) / max(1, touched), 1)
    return found


def main():
    """Write the table."""
    with TABLE.open("w", newline="") as file, pytest.MonkeyPatch.context() as patch:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Case._fields, "pass", "kernel", "bytes"])
        trace = record(patch)
        for case in CASES:
            for name, found in count(case, trace).items():
                writer.writerows([*case, name, *row] for row in found.items())


if __name__ == "__main__":
    main()

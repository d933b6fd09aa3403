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

TO_BANKS = [Case("banks", loss, "float32", 16, 200) for loss in ("kl", "mse")]
BANK_SAMPLES = 300
TABLE = Path(__file__).with_name("launches.csv")


def count(case, trace):
    """Return the kernels of each pass, in their order, with the bytes of features and gradients that they move.

    The bytes are read or written, for each feature of the stages that the kernel accesses.
    """
    to_banks = case.regime == "banks"
    samples = [case.samples] * 2 + [BANK_SAMPLES] * 2 * to_banks
    stages = [torch.randn(n, case.dim).to(getattr(torch, case.dtype)) for n in samples]
    stages[0].requires_grad_()
    banks = dict(zip(("student_bank", "teacher_bank"), stages[2:], strict=True)) if to_banks else {}
    first = len(trace.kernels)
    with force_regime(case.regime):
        loss = icsd.similarity_distillation_loss(*stages[:2], case.loss, **banks, backend="triton")
        middle = len(trace.kernels)
        (gradient,) = torch.autograd.grad(loss, stages[0])
    passes = range(first, middle), range(middle, len(trace.kernels))
    # The gradient of a loss to banks is not what the kernels wrote, but a multiple of it.
    moved = stages if to_banks else [*stages, gradient]
    return {name: by_kernel(trace, launches, stages, moved) for name, launches in zip(PASSES, passes, strict=True)}


def by_kernel(trace, launches, stages, tensors):
    found = {}
    for name in dict.fromkeys(trace.kernels[number] for number in launches):
        of_kernel = [
            access
            for access in trace.loads + trace.stores
            if access[0] in launches and trace.kernels[access[0]] == name
        ]
        moved = [trace.bytes(of_kernel, tensor) for tensor in tensors]
        touched = sum(x.numel() for x, number in zip(stages, moved, strict=False) if number)
        found[name] = round(sum(moved) / max(1, touched), 1)
    return found


def main():
    """Write the table."""
    with TABLE.open("w", newline="") as file, pytest.MonkeyPatch.context() as patch:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Case._fields, "pass", "kernel", "bytes"])
        trace = record(patch)
        for case in [*CASES, *TO_BANKS]:
            for name, found in count(case, trace).items():
                writer.writerows([*case, name, *row] for row in found.items())


if __name__ == "__main__":
    main()

"""Time one case of the operator in this process and print the result as JSON; `benchmarks.builds` starts it.

It imports only torch and the `icsd` on the path, so that it can run with an old checkout.
"""

from __future__ import annotations

import argparse
import json
import statistics
from time import perf_counter

import torch

import icsd
from icsd import _native


def parse() -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--loss")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def main() -> None:
    """Time forward + backward and print the median, the instruction set and the folder of `icsd`."""
    options = parse()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    student, teacher = (torch.randn(options.samples, options.dim).to(dtype) for _ in range(2))
    student.requires_grad_()

    def call() -> None:
        loss = icsd.similarity_distillation_loss(student, teacher, options.loss, backend="cpu")
        torch.autograd.grad(loss, student)

    for _ in range(3):
        call()
    times: list[float] = []
    end = perf_counter() + options.seconds
    while len(times) < 5 or perf_counter() < end:
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    print(json.dumps({"median": statistics.median(times), "isa": _native.cpu_isa(), "icsd": icsd.__file__}))


if __name__ == "__main__":
    main()

"""``icsd tune``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Literal

import torch
from jsonargparse import Namespace

from icsd.cli.parser import Parser
from icsd.errors import InputError
from icsd.losses import LOSSES, as_loss
from icsd.ops.tuning import FEWEST_SAMPLES, Call, tune
from icsd.ops.verdicts import verdicts_of

DESCRIPTION = """Measure which backend of the operator is the fastest on this device, for forward and backward of a
loss between a student and a teacher, and keep the result for later calls of similar sizes. Backends whose results
differ from those of plain PyTorch are left out. `icsd doctor` shows what is kept.

Examples:

  icsd tune
      a few common sizes

  icsd tune --samples 24 --dim 8192 131072 --loss mse kl --dtype bfloat16
      all combinations of these"""


DTYPES = ("float32", "float64", "bfloat16", "float16")


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--samples", type=int, nargs="+", default=[16, 64, 256], metavar="N", help="samples of a batch")
    add("--dim", type=int, nargs="+", default=[4096, 65536], metavar="D", help="features of a sample")
    add(
        "--loss",
        type=Literal[tuple(LOSSES)],
        nargs="+",
        default=["mse"],
        metavar="NAME",
        help=f"losses, of {', '.join(LOSSES)}",
    )
    add(
        "--dtype",
        type=Literal[DTYPES],
        nargs="+",
        default=["float32"],
        metavar="DTYPE",
        help=f"dtypes of the features, of {', '.join(DTYPES)}",
    )
    add(
        "--device",
        type=str,
        default="cuda" if torch.cuda.is_available() else "cpu",
        metavar="DEVICE",
        help="device to measure: cpu, cuda, cuda:1, ...",
    )


def run(options: Namespace) -> int:
    """Measure."""
    for name, least in (("samples", FEWEST_SAMPLES), ("dim", 1)):
        if min(options[name]) < least:
            raise InputError(f"--{name} is {min(options[name])}: give at least {least}")
    device = _device(options.device)
    verdicts = verdicts_of(device, torch.get_num_threads())
    for loss, dtype, samples, dim in product(options.loss, options.dtype, options.samples, options.dim):
        features = torch.empty(samples, dim, dtype=getattr(torch, dtype), device=device)
        call = Call([features.clone().requires_grad_(), features], [1.0], as_loss(loss), 1e-8, False)
        if not tune(verdicts, call, again=True):
            raise InputError(
                f"another process is measuring, and holds {verdicts.path.with_suffix('.lock')}: wait for it"
            )
        print(f"{call.key}: {verdicts.get(call.key, 'no backend runs')}", flush=True)
    print(verdicts.path if verdicts.path.exists() else "nothing is kept")
    return 0


def _device(name: str) -> torch.device:
    """Return the device of a name, with its index."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device is {name}, which cannot be used here: {str(error).splitlines()[0]}") from error

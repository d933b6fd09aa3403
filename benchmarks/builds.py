"""Compare the operator of two checkouts, an old and a new one, in processes that take turns.

    python -m benchmarks.builds ../old .
    python -m benchmarks.builds ../old . --shapes 16x65536 64x65536 --losses kl --dtypes bfloat16 --turns 9

Build the native module of each checkout first: CXX=g++ ICSD_CUDA=0 python setup.py build_ext --inplace. A pair of turns
runs both checkouts one after the other, every second pair in reverse order, so that a change of the machine's speed
meets both. The table has the medians of both and the median, least and greatest ratio new / old of all pairs. A ratio
means something where its range leaves 1 out, and where the same comparison of a checkout with itself does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median

SCRIPT = Path(__file__).with_name("timed_call.py")
SHAPES = ["16x1024", "16x65536", "64x65536", "128x32768"]
ROW = "{:>14}  {:>8}  {:>9}  {:>10}  {:>9}  {:>9}  {:>18}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = _parser().parse_args(arguments)
    for checkout in (options.old, options.new):
        if not list(checkout.glob("icsd/_native*.so")):
            print(f"error: {checkout} has no native module: build it there with setup.py", file=sys.stderr)
            return 2
    print(ROW.format("N x D", "dtype", "loss", "isa", "old µs", "new µs", "new / old"))
    for shape, dtype, loss in product(options.shapes, options.dtypes, options.losses):
        pairs = list(_pairs(options, shape, dtype, loss))
        old, new = (median(pair[k]["median"] for pair in pairs) for k in range(2))
        ratios = sorted(pair[1]["median"] / pair[0]["median"] for pair in pairs)
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        isa = "/".join(dict.fromkeys(result["isa"] for result in pairs[0]))
        print(ROW.format(shape, dtype, loss, isa, f"{old * 1e6:,.1f}", f"{new * 1e6:,.1f}", spread), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.builds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="checkout with the old code")
    parser.add_argument("new", type=Path, help="checkout with the new code")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxD", help="samples x dim (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], metavar="DTYPE", help="dtypes (%(default)s)")
    parser.add_argument("--losses", nargs="+", default=["mse", "kl"], metavar="LOSS", help="losses (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each checkout (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time of a turn (%(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads (%(default)s)")
    return parser


def _pairs(options: argparse.Namespace, shape: str, dtype: str, loss: str) -> Iterator[tuple[dict, dict]]:
    """Yield the results of the old and the new checkout, turn by turn."""
    samples, dim = shape.split("x")
    command = [sys.executable, str(SCRIPT), f"--samples={samples}", f"--dim={dim}", f"--dtype={dtype}"]
    command += [f"--loss={loss}", f"--seconds={options.seconds}", f"--threads={options.threads}"]
    for turn in range(options.turns):
        order = ("old", "new") if turn % 2 == 0 else ("new", "old")
        results = {name: _time(command, getattr(options, name)) for name in order}
        yield results["old"], results["new"]


def _time(command: list[str], checkout: Path) -> dict:
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(run.stdout)
    if not Path(result["icsd"]).is_relative_to(checkout.resolve()):
        raise RuntimeError(f"{checkout} was to be timed, but {result['icsd']} was imported")
    return result


if __name__ == "__main__":
    sys.exit(main())

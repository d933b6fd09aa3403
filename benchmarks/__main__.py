"""``python -m benchmarks``: run the suite, keep the results, show them; or compare two files of results."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import plots, report, results
from benchmarks.ceilings import CONTENTION_LIMIT, contention
from icsd.errors import InputError

SUITE = Path(__file__).parent

DESCRIPTION = """Measure the operator beside plain PyTorch, torch.compile of it and the best PyTorch composite, and
against the floor of this machine. Rows are added to a file of results, tables are printed, figures are drawn beside
the file."""

EXAMPLES = """examples:
  python -m benchmarks                                   everything
  python -m benchmarks --select grid                     the means over N in 8 ... 256 by D in 8,192 ... 524,288
  python -m benchmarks --select "operator and 16x65536"  a part of it (an expression for pytest -k)
  python -m benchmarks --quick                           a few shapes: a quarter of an hour on two cores
  python -m benchmarks compare before.csv after.csv      what got slower or faster beyond noise

Close other programs first: see benchmarks/README.md on noise."""

COMPARE = """Say which of our measurements got slower or faster beyond noise between the latest runs in two files of
results. The exit code is 1 if something got slower or takes more memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all went well, 1 if a benchmark failed or something got slower, 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=_run)
    parser.add_argument("--quick", action="store_true", help="measure a few shapes instead of the whole grid")
    parser.add_argument("--select", metavar="EXPRESSION", help="run the tests whose names match, as pytest -k does")
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="time of each of an implementation's turns (%(default)s)"
    )
    parser.add_argument("--threads", type=int, help=f"CPU threads ({torch.get_num_threads()})")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        default=Path("runs/benchmarks/results.csv"),
        help="file that rows are added to; figures go beside it (%(default)s)",
    )
    compare = parser.add_subparsers(title="another command").add_parser(
        "compare", help="compare two files of results", description=COMPARE
    )
    compare.set_defaults(command=_compare)
    compare.add_argument("before", type=Path, help="file of results")
    compare.add_argument("after", type=Path, help="file of results")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads is {options.threads}: give at least 1")
    if not options.seconds > 0:
        raise InputError(f"--seconds is {options.seconds}: give a positive number")
    results.append(options.results, [])
    torch.set_num_threads(options.threads or torch.get_num_threads())
    if contention() > CONTENTION_LIMIT:
        print(
            f"This machine is too busy to measure {torch.get_num_threads()} threads; see benchmarks/README.md on noise."
        )
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "report.json"
        command = [str(SUITE), "--benchmark-only", "--benchmark-quiet", "--benchmark-disable-gc", "--disable-warnings"]
        command += [f"--benchmark-json={measured}", f"--seconds={options.seconds}"]
        command += ["--quick"] if options.quick else []
        command += ["-k", options.select] if options.select else []
        code = pytest.main([*command, "-p", "no:cacheprovider", "-o", "timeout=0"])  # a measurement takes its time
        rows = results.rows_from_report(measured) if measured.exists() else []
    if not rows:
        raise InputError("nothing was measured: see what pytest said above, and whether --select matches any test")
    results.append(options.results, rows)
    shown = results.best_composite(rows)
    print(report.tables(shown), end="\n\n")
    for path in [options.results, *plots.draw(shown, options.results.parent)]:
        print(f"written: {path}")
    return int(code != 0)


def _compare(options: argparse.Namespace) -> int:
    before, after = results.read(options.before), results.read(options.after)
    found = results.compare(before, after)
    if not found:
        raise InputError(
            f"{options.before} and {options.after} have no measurement in common: give two runs of the same suite"
        )
    print(report.changes(found, results.drift(before, after)[1]))
    return int(any(change.verdict in ("slower", "larger") for change in found))


if __name__ == "__main__":
    sys.exit(main())

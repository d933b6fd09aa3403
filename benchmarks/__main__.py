"""Run the benchmarks and show the results, or compare two files of results: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report, records, report, results
from benchmarks.ceilings import CONTENTION_LIMIT, contention
from icsd.errors import InputError

SUITE = Path(__file__).parent

DESCRIPTION = """Measure time, memory and call overhead of the operator beside plain PyTorch, torch.compile of it and
the best PyTorch composite, and beside the floor: the least time that this machine allows. The command prints tables of
ratios, appends one row per measurement to a CSV file and draws figures beside it. Each row names processor,
instruction set, threads and versions."""

EXAMPLES = """examples:
  python -m benchmarks                                   run everything
  python -m benchmarks --quick                           run a few shapes: a quarter of an hour on two cores
  python -m benchmarks --select groups                   patch tokens: 4 x 1,024 x 768 and others, and the means
  python -m benchmarks --select grid                     N in 8 ... 256 by D in 8,192 ... 524,288, and the means
  python -m benchmarks --select "operator and 16x65536"  run a part; the expression is pytest's -k
  ICSD_CPU_ISA=avx2 python -m benchmarks --quick         measure another instruction set
  python -m benchmarks compare before.csv after.csv      show what got slower or faster beyond noise
  python -m benchmarks.builds OLD NEW                    time two checkouts in processes that take turns
  python -m tools.first_hour                             try a CUDA device out, and measure it
  python -m benchmarks gpu runs/gpu.jsonl                show the tables of that

How to read the tables: "plain 8.2x" means that plain PyTorch takes 8.2 times as long as icsd; "/ floor 1.3" means that
icsd takes 1.3 times as long as the floor. Close other programs first: see benchmarks/README.md on noise."""

COMPARE = """Show which measurements of icsd changed beyond noise between the latest runs in two files of results. The
exit code is 1 if something got slower or takes more memory."""

GPU = """Show the tables of the latest run in a file that `python -m tools.first_hour` or `python -m benchmarks.gpu` has
written: first what failed, then the times. They are in Markdown, as in docs/cuda.md. The exit code is 1 if something
failed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a benchmark failed or something got slower, 2 for bad input, else 0."""
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
    parser.add_argument("--select", metavar="EXPRESSION", help="run the benchmarks whose names match, as in pytest -k")
    parser.add_argument(
        "--seconds", type=float, default=0.2, help="length of a turn; an implementation has three (%(default)s)"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure the processor time of one thread, which other programs on the machine change little",
    )
    parser.add_argument("--threads", type=int, help=f"CPU threads ({torch.get_num_threads()})")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        default=Path("runs/benchmarks/results.csv"),
        help="CSV file to which rows are appended; figures are drawn beside it (%(default)s)",
    )
    commands = parser.add_subparsers(title="commands")
    compare = commands.add_parser("compare", help="compare two files of results", description=COMPARE)
    compare.set_defaults(command=_compare)
    compare.add_argument("before", type=Path, help="file of results")
    compare.add_argument("after", type=Path, help="file of results")
    gpu = commands.add_parser("gpu", help="show what a GPU did", description=GPU)
    gpu.set_defaults(command=_show_gpu)
    gpu.add_argument("file", type=Path, help="file of JSON lines")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads is {options.threads}: give at least 1")
    if not options.seconds > 0:
        raise InputError(f"--seconds is {options.seconds}: give a positive number")
    if options.processor_time and options.threads not in (None, 1):
        raise InputError(f"--threads is {options.threads}: --processor-time is that of one thread, leave it out")
    results.append(options.results, [])  # fails now if the file holds something else
    torch.set_num_threads(1 if options.processor_time else options.threads or torch.get_num_threads())
    if not options.processor_time and contention() > CONTENTION_LIMIT:
        print(
            f"This machine is too busy to measure {torch.get_num_threads()} threads: see benchmarks/README.md on noise."
        )
    code, rows = _measure(options)
    if not rows:
        raise InputError("nothing was measured: read pytest's output above, and check that --select matches a name")
    from benchmarks import plots  # it imports matplotlib, which no other command needs

    results.append(options.results, rows)
    shown = results.best_composite(rows)
    print(report.tables(shown), end="\n\n")
    for path in [options.results, *plots.draw(shown, options.results.parent)]:
        print(f"written: {path}")
    return int(code != 0)


def _measure(options: argparse.Namespace) -> tuple[int, list[results.Row]]:
    """Run the suite and return pytest's exit code and the rows."""
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "report.json"
        command = [str(SUITE), "--benchmark-only", "--benchmark-quiet", "--benchmark-disable-gc", "--disable-warnings"]
        command += [f"--benchmark-json={measured}", f"--seconds={options.seconds}"]
        command += ["--quick"] if options.quick else []
        command += ["--benchmark-timer=time.process_time"] if options.processor_time else []
        command += ["-k", options.select] if options.select else []
        code = pytest.main([*command, "-p", "no:cacheprovider", "-o", "timeout=0"])  # measurements have no time limit
        return int(code), results.rows_from_report(measured) if measured.exists() else []


def _compare(options: argparse.Namespace) -> int:
    before, after = results.read(options.before), results.read(options.after)
    found = results.compare(before, after)
    if not found:
        raise InputError(
            f"{options.before} and {options.after} have no measurement in common: give two runs of the same suite"
        )
    print(report.changes(found, results.drift(before, after)[1]))
    return int(any(change.verdict in ("slower", "larger") for change in found))


def _show_gpu(options: argparse.Namespace) -> int:
    run = gpu_report.latest(records.read(options.file))
    print(gpu_report.tables(run))
    return int(bool(gpu_report.failures(run)))


if __name__ == "__main__":
    sys.exit(main())

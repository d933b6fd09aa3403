"""``icsd ablate``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jsonargparse import Namespace

from icsd.cli.parser import Parser
from icsd.errors import InputError

PROGRAM = [sys.executable, "-c", "import sys; from icsd.cli.main import main; sys.exit(main())"]

DESCRIPTION = """Train the arms of an ablation with several seeds each, evaluate every run, and report the difference of
each arm from a reference, paired by seed, with its 95 % interval.

The sweep is a YAML file:

  base: [configs/emoji.yaml]                        # configurations of all runs
  arms:                                             # further configurations of each arm
    none: [configs/ablations/none.yaml]
    both: []
    kl: [configs/ablations/kl.yaml]
  reference: none
  seeds: [0, 1, 2, 3, 4]
  count: 1000                                       # images to generate from each model

Examples:

  icsd ablate configs/sweeps/distillation.yaml --output runs/ablation
      as many runs at once as there are cores; the same command goes on after an interruption

  icsd ablate configs/sweeps/distillation.yaml --output runs/ablation --print-jobs > jobs.txt
      one line for each run, for a job array; afterwards the first command only reports

The output folder gets a run folder for each arm and seed, rows.csv with every figure, and the table of differences."""


@dataclass(frozen=True)
class Sweep:
    """An ablation.

    Attributes:
        base: Configuration files of all runs.
        arms: Further configuration files of each arm by its name.
        reference: Name of the arm that the others are compared with.
        seeds: Seeds of the runs of each arm.
        count: Number of images to generate from each model.
    """

    base: list[str]
    arms: dict[str, list[str]]
    reference: str
    seeds: list[int] = field(default_factory=lambda: list(range(5)))
    count: int = 1000

    def __post_init__(self) -> None:
        if self.reference not in self.arms:
            raise InputError(f"reference is {self.reference!r}: give one of the arms, {', '.join(self.arms)}")
        for name, files in {"base": self.base, **self.arms}.items():
            missing = next((file for file in files if not Path(file).is_file()), None)
            if missing is not None:
                raise InputError(f"{name} names {missing}, which is not there: give paths of configuration files")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"seeds is {self.seeds}: give different numbers, at least one")

    def runs(self, output: Path) -> Iterator[tuple[str, int, Path]]:
        """Yield the arm, the seed and the folder of every run, seed by seed."""
        return ((arm, seed, output / arm / f"seed-{seed}") for seed in self.seeds for arm in self.arms)


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = "icsd ablate SWEEP --output FOLDER [options]"
    parser.description = DESCRIPTION
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="YAML file that describes the arms")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of all runs")
    parser.add_argument("--jobs", type=int | None, help="number of runs at once; by default the number of cores")
    parser.add_argument("--print-jobs", action="store_true", help="print a command line for each run; run nothing")


def run(options: Namespace) -> int:
    """Run what is left of the sweep and report."""
    from icsd.evaluation.paired import format_differences, paired_differences, write_rows

    sweep = read_sweep(options.sweep)
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs is {options.jobs}: give at least 1")
    commands = {folder: commands_of(sweep, arm, seed, folder) for arm, seed, folder in sweep.runs(options.output)}
    if options.print_jobs:
        for lines in commands.values():
            print(" && ".join(shlex.join(["icsd", *line]) for line in lines))
        return 0
    failures = _run_all({folder: lines for folder, lines in commands.items() if lines}, options.jobs or os.cpu_count())
    rows = [row for arm, seed, folder in sweep.runs(options.output) for row in rows_of(arm, seed, folder)]
    options.output.mkdir(parents=True, exist_ok=True)
    write_rows(options.output / "rows.csv", rows)
    for folder, log in failures.items():
        print(f"failed       {folder}: see {log}", file=sys.stderr)
    print(format_differences(paired_differences(rows, sweep.reference)))
    print(f"\nrows         {options.output / 'rows.csv'}")
    return 2 if failures else 0


def read_sweep(path: Path) -> Sweep:
    """Read a sweep.

    Raises:
        InputError: The file cannot be read or holds something else.
    """
    try:
        return Sweep(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); see `icsd ablate --help`") from error
    except (yaml.YAMLError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} holds no sweep ({' '.join(str(error).split())}); see `icsd ablate --help`") from error


def commands_of(sweep: Sweep, arm: str, seed: int, folder: Path) -> list[list[str]]:
    """Return the arguments of the commands that a run still needs: training, new or resumed, and evaluation."""
    if (folder / "results.json").is_file():
        return []
    evaluate = ["evaluate", str(folder), "--count", str(sweep.count), "--output", str(folder / "results.json")]
    if not folder.exists():
        configs = [part for file in [*sweep.base, *sweep.arms[arm]] for part in ("--config", file)]
        return [
            ["train", *configs, "--seed", str(seed), "--output", str(folder.parent), "--name", folder.name],
            evaluate,
        ]
    return [evaluate] if _is_trained(folder) else [["train", "--resume", str(folder)], evaluate]


def _is_trained(folder: Path) -> bool:
    """Return whether a run has a checkpoint of its last step."""
    try:
        steps = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return False
    return (folder / "checkpoints" / f"step-{steps:08d}.safetensors").is_file()


def rows_of(arm: str, seed: int, folder: Path) -> list:
    """Return the figures of a finished run."""
    from icsd.evaluation import report
    from icsd.evaluation.paired import Row

    path = folder / "results.json"
    if not path.is_file():
        return []
    return [
        Row(arm, seed, stage, figure, estimate.value, result.protocol.identifier)
        for stage, result in report.read(path).items()
        for figure, estimate in result.figures.items()
    ]


def _run_all(commands: dict[Path, list[list[str]]], jobs: int) -> dict[Path, Path]:
    """Run the commands of every folder, several folders at once; return the logs of those that failed."""
    from tqdm import tqdm

    def run_one(folder: Path) -> bool:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with log_of(folder).open("ab") as log:
            return all(
                subprocess.run([*PROGRAM, *line], stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode == 0
                for line in commands[folder]
            )

    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(commands), unit="run") as progress:
        futures = {folder: pool.submit(run_one, folder) for folder in commands}
        try:
            for future in futures.values():
                future.result()
                progress.update()
        except KeyboardInterrupt:  # the runs get the signal too, and save a checkpoint
            pool.shutdown(cancel_futures=True)
            raise
    return {folder: log_of(folder) for folder, future in futures.items() if not future.result()}


def log_of(folder: Path) -> Path:
    """Return the file with everything that a run printed."""
    return folder.with_suffix(".log")

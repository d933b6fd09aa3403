"""``icsd ablate``."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import Namespace

from icsd.cli.parser import Parser
from icsd.errors import InputError

if TYPE_CHECKING:
    from icsd.evaluation.paired import Row
    from icsd.team import Team

LONGEST_WAIT = timedelta(days=14)  # of a rank whose runs are finished for the others

WITHOUT_INFLUENCE = ("output", "name", "device", "workers", "loggers")  # on the metrics of a run

PROGRAM = [sys.executable, "-c", "import sys; from icsd.cli.main import main; sys.exit(main())"]

DESCRIPTION = """Train the arms of an ablation with several seeds each, evaluate every run, and report the difference of
each arm from a reference, paired by seed, with its 95 % interval. It needs pip install -e ".[evaluate]" in the
checkout.

The sweep is a YAML file:

  base: [configs/emoji.yaml]                        # configurations of all runs
  arms:                                             # what each arm changes: files, or keys written out
    none: [configs/ablations/none.yaml]
    both: []
    more: [{losses: {generator: {distillation: 0.3}, discriminator: {distillation: 0.3}}}]   # a larger share
  reference: none
  seeds: [0, 1, 2, 3, 4]
  count: 1000                                       # images to generate from each model at the end
  evaluate_every: 250                               # steps between two evaluations during training, for:
  targets: {tone_accuracy: 0.75}                    # metrics whose cost in steps and seconds is an endpoint
  endpoints: [kernel_distance, tone_accuracy, inconsistency]   # metrics of the table; by default all
  evaluate: [--encoder, runs/damsm]                 # further options of `icsd evaluate`

Examples:

  icsd ablate configs/sweeps/distillation.yaml --output runs/ablation
      as many runs at once as there are cores; the same command goes on after an interruption

  icsd ablate configs/sweeps/distillation.yaml --output runs/ablation --report
      the runs that are finished by now, even while others are in progress

  torchrun --standalone --nproc-per-node 8 --no-python icsd ablate sweep.yaml --output runs/ablation --jobs 1
      one run at a time on each of eight GPUs

  icsd ablate configs/sweeps/distillation.yaml --output runs/ablation --print-jobs > jobs.txt
      one line for each unfinished run, for a job array; afterwards the first command only reports

The output folder gets a run folder for each arm and seed with its log beside it, rows.csv with every metric of every
run, differences.csv with the paired differences and intervals.png with their 95 % intervals. An arm or a seed can be
added to the sweep later. For evaluations on one core each, OMP_NUM_THREADS is 1 unless it is set."""


@dataclass(frozen=True)
class Sweep:
    """An ablation.

    Attributes:
        base: Configurations of all runs: files, or mappings of keys.
        arms: Further configurations of each arm by its name.
        reference: Name of the arm that the others are compared with.
        seeds: Seeds of the runs of each arm.
        count: Number of images to generate from each model.
        evaluate_every: Steps between two evaluations during training, or None.
        targets: Values of metrics whose cost in steps and seconds is reported.
        endpoints: Parts of the names of the metrics in the table and the plot, beside the cost; all if empty.
        evaluate: Further options of `icsd evaluate`.
    """

    base: list[str | dict[str, Any]]
    arms: dict[str, list[str | dict[str, Any]]]
    reference: str
    seeds: list[int] = field(default_factory=lambda: list(range(5)))
    count: int = 1000
    evaluate_every: int | None = None
    targets: dict[str, float] = field(default_factory=dict)
    endpoints: list[str] = field(default_factory=list)
    evaluate: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        named = isinstance(self.arms, dict) and _is_list([*self.arms], str)
        self._check("arms", named, "a list for each name, with quotes around names such as on, off and 0.1")
        if self.reference not in self.arms:
            raise InputError(f"reference is {self.reference!r}: give one of the arms, {', '.join(self.arms)}")
        for name, parts in [("base", self.base), *self.arms.items()]:
            if not _is_list(parts, str | dict):
                raise InputError(f"{name} is {parts!r}: give a list of configuration files and of keys with values")
            missing = next((part for part in parts if isinstance(part, str) and not Path(part).is_file()), None)
            if missing is not None:
                raise InputError(f"{name} names {missing}, which is not there: give paths of configuration files")
        different = _is_list(self.seeds, int) and len(set(self.seeds)) == len(self.seeds) > 0
        self._check("seeds", different, "different whole numbers, at least one")
        self._check("count", _is(self.count, int) and self.count > 1, "a whole number of images, at least 2")
        steps = self.evaluate_every is None or (_is(self.evaluate_every, int) and self.evaluate_every > 0)
        self._check("evaluate_every", steps, "a whole number of steps, at least 1")
        self._check("targets", _is_mapping(self.targets, int | float), "a number for each metric")
        self._check("endpoints", _is_list(self.endpoints, str), "a list of names of metrics")
        self._check("evaluate", _is_list(self.evaluate, str), "a list such as [--encoder, runs/damsm, --seed, '1']")
        if self.targets and not self.evaluate_every:
            raise InputError("targets needs evaluate_every: give the steps between two evaluations during training")

    def _check(self, key: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise InputError(f"{key} is {getattr(self, key)!r}: give {wanted}")

    def runs(self, output: Path) -> Iterator[Run]:
        """Yield every run, seed by seed."""
        return (Run(self, arm, seed, output / arm / f"seed-{seed}") for seed in self.seeds for arm in self.arms)

    def configuration(self, arm: str) -> dict[str, Any]:
        """Return every key of the configuration that base and arm give now, as JSON values.

        Raises:
            InputError: A file cannot be read, or a key or value cannot be used.
        """
        from icsd.cli.configuration import load_configuration
        from icsd.training.config import TrainConfig
        from icsd.training.run_folder import plain

        parser = Parser(prog="icsd train")
        parser.add_class_arguments(TrainConfig)
        options = parser.get_defaults()
        try:
            for part in [*self.base, *self.arms[arm]]:
                keys = load_configuration(Path(part)) if isinstance(part, str) else part
                options = parser.parse_object(keys, options)
            return plain(TrainConfig(**parser.instantiate(options)))
        except InputError as error:
            raise InputError(f"the arm {arm} cannot be trained: {error}") from error


def _is(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type; a bool, which YAML makes of yes and no, is no number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_list(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(_is(each, kind) for each in value)


def _is_mapping(value: Any, kind: Any) -> bool:
    return isinstance(value, dict) and _is_list([*value], str) and _is_list([*value.values()], kind)


@dataclass(frozen=True, eq=False)
class Run:
    """One arm of a sweep with one seed."""

    sweep: Sweep
    arm: str
    seed: int
    folder: Path

    @property
    def log(self) -> Path:
        """The file with everything that the run printed."""
        return self.folder.with_suffix(".log")

    @property
    def results(self) -> Path:
        """The results of the evaluation at the end."""
        return self.folder / "results.json"

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of the configuration that outrank those of base and arm."""
        every = {"evaluate_every": self.sweep.evaluate_every} if self.sweep.evaluate_every else {}
        return {"seed": self.seed, "evaluate": False, **every}

    @property
    def note(self) -> Path:
        """The file with the options that the results were measured with."""
        return self.folder.with_suffix(".json")

    @property
    def noted(self) -> dict[str, Any] | None:
        """The content of the note, or None where there is none; earlier versions noted a list of other things.

        Raises:
            InputError: The note cannot be read.
        """
        try:
            content = json.loads(self.note.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(f"{self.note} cannot be read ({error}): remove it, and {self.results}") from error
        return content if isinstance(content, dict) else None

    @property
    def is_trained(self) -> bool:
        """True if there is a checkpoint of the last step, after which nothing failed."""
        try:
            steps = yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8"))["steps"]
        except (OSError, yaml.YAMLError, KeyError, TypeError):
            return False
        from icsd.training.checkpoint import events_are_due, step_path

        path = step_path(self.folder, steps)
        return path.is_file() and not events_are_due(path)

    @property
    def is_evaluated(self) -> bool:
        """True if there are results of as many images and by the options that the sweep asks for."""
        if self.noted not in (None, {"evaluate": self.sweep.evaluate}):
            return False
        from icsd.evaluation import report as results

        try:
            stages = results.read(self.results).values()
        except InputError:
            return False
        return all(stage.protocol.generated_images == self.sweep.count for stage in stages)

    def begin(self, configuration: dict[str, Any]) -> None:
        """Check that the run is what the sweep would train now; clear what it cannot resume or has to measure again.

        Args:
            configuration: Every key that base and arm give.

        Raises:
            InputError: The run was made with another configuration, or a process trains in its folder.
        """
        from icsd.training.run_folder import RunFolder, write_text

        begun = (self.folder / "config.yaml").is_file() or any(self.folder.glob("checkpoints/step-*.safetensors"))
        if self.folder.exists() and not begun:
            with RunFolder(self.folder).locked():  # no process is about to write the first one
                shutil.rmtree(self.folder)
        if self.folder.exists():
            self._check_configuration(configuration | self.keys)
        noted, options = self.noted, {"evaluate": self.sweep.evaluate}
        if noted != options:
            if noted is not None:
                self.results.unlink(missing_ok=True)
            self.note.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.note, json.dumps(options) + "\n")

    def _check_configuration(self, wanted: dict[str, Any]) -> None:
        from icsd.cli.configuration import read_configuration
        from icsd.training.checkpoint import check_config
        from icsd.training.config import TrainConfig
        from icsd.training.run_folder import RunFolder, plain

        folder = RunFolder(self.folder)
        folder.restore_config()
        text = [] if wanted["damsm"]["checkpoint"] is None else ["text"]  # that of the pretrained encoder
        try:
            saved = read_configuration(folder.config_path)
            check_config(self.folder, saved, wanted, [*WITHOUT_INFLUENCE, *text], plain(TrainConfig()))
        except InputError as error:
            raise InputError(f"{error}: give another --output, or remove {self.folder}") from error

    def commands(self) -> list[list[str]]:
        """Return the arguments of the commands that are still needed: training, new or resumed, and evaluation."""
        if self.is_evaluated:
            return []
        evaluate = ["evaluate", str(self.folder), "--count", str(self.sweep.count), *self.sweep.evaluate]
        evaluate += ["--output", str(self.results)]
        if self.is_trained:
            return [evaluate]
        return [["train", "--resume", str(self.folder)] if self.folder.exists() else self._training(), evaluate]

    def _training(self) -> list[str]:
        configs = []
        for number, part in enumerate([*self.sweep.base, *self.sweep.arms[self.arm]]):
            path = part
            if isinstance(part, dict):
                path = self.folder.parent / f"keys-{number}.yaml"
                path.write_text(yaml.safe_dump(part), encoding="utf-8")
            configs += ["--config", str(path)]
        keys = [[f"--{key.replace('_', '-')}", json.dumps(value)] for key, value in self.keys.items()]
        place = ["--output", str(self.folder.parent), "--name", self.folder.name]
        return ["train", *configs, *itertools.chain(*keys), *place]


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = "icsd ablate SWEEP --output FOLDER [options]"
    parser.description = DESCRIPTION
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="YAML file that describes the arms")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder of all runs")
    parser.add_argument("--jobs", type=int | None, help="number of runs at once; by default the number of cores")
    parser.add_argument(
        "--print-jobs", action="store_true", help="print a command line for each unfinished run; run nothing"
    )
    parser.add_argument("--report", action="store_true", help="report the finished runs; run nothing")


def run(options: Namespace) -> int:
    """Run what is left of the sweep, on all ranks together, and report."""
    from icsd.team import joined

    sweep = read_sweep(options.sweep)
    if options.jobs is not None and options.jobs < 1:
        raise InputError(f"--jobs is {options.jobs}: give at least 1")
    runs = list(sweep.runs(options.output))
    with joined(LONGEST_WAIT) as team, contextlib.ExitStack() as stack:
        if options.report:
            team.first(lambda: report(sweep, runs, options.output))
            return 0
        commands = team.first(lambda: _begin(sweep, runs, options.output, stack))
        work = [(each, lines) for each, lines in zip(runs, commands, strict=True) if lines]
        if options.print_jobs:
            for _, lines in work:
                print(" && ".join(shlex.join(["icsd", *line]) for line in lines))
            return 0
        everyone = team.gather([runs.index(each) for each in _run_all(work, options.jobs or _cores(), team)])
        failed = [runs[number] for number in sorted(itertools.chain(*everyone))]
        if team.leads:
            for each in failed:
                print(f"failed       {each.folder}: see {each.log}", file=sys.stderr)
        team.first(lambda: report(sweep, runs, options.output))
    return 2 if failed else 0


def _begin(sweep: Sweep, runs: Sequence[Run], output: Path, stack: contextlib.ExitStack) -> list[list[list[str]]]:
    """Lock the output folder, begin every run, and return the arguments of the commands that each run still needs."""
    from filelock import FileLock, Timeout

    configurations = {arm: sweep.configuration(arm) for arm in sweep.arms}
    output.mkdir(parents=True, exist_ok=True)
    try:
        stack.enter_context(FileLock(output / ".lock", blocking=False))
    except Timeout as error:
        raise InputError(f"another `icsd ablate` works in {output}: wait for it, or add --report") from error
    for each in runs:
        each.begin(configurations[each.arm])
    return [each.commands() for each in runs]


def _cores() -> int:
    """Return the number of cores for this process; the ranks on one machine share them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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


def report(sweep: Sweep, runs: Sequence[Run], output: Path) -> None:
    """Write rows, differences and plot of the finished runs, and print the differences.

    Raises:
        InputError: No run of the reference is finished, or metrics were measured under different protocols.
    """
    from icsd.evaluation.paired import Difference, Row, format_differences, paired_differences, write_csv
    from icsd.evaluation.plot import plot_differences

    finished = [each for each in runs if each.is_evaluated]
    rows = rows_of(sweep, finished)
    write_csv(output / "rows.csv", Row, rows)
    differences = paired_differences(rows, sweep.reference)
    write_csv(output / "differences.csv", Difference, differences)
    shown = [each for each in differences if _is_endpoint(sweep, each.metric)]
    print(format_differences(shown))
    if shown:
        plot_differences(shown, sweep.reference, output / "intervals.png")
        print(f"\nplot         {output / 'intervals.png'}")
    for note in _unmeasured(sweep, rows):
        print(f"note         {note}")
    print(f"runs         {len(finished)} of {len(runs)} finished")
    print(f"rows         {output / 'rows.csv'}")
    print(f"differences  {output / 'differences.csv'}")


def _is_endpoint(sweep: Sweep, metric: str) -> bool:
    named = not sweep.endpoints or any(part in metric for part in [*sweep.endpoints, " of training"])
    return named and not metric.endswith(("_real", "_shuffled"))


def _unmeasured(sweep: Sweep, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a note for each target and each endpoint that no run measured, such as a name with a typing error."""
    metrics = {row.metric for row in rows}
    for name, target in sweep.targets.items():
        if f"reaches {name} {target:g}" not in metrics:
            yield f"targets names {name}, which no finished run measured during training"
    for part in sweep.endpoints:
        if not any(part in metric for metric in metrics):
            yield f"endpoints names {part}, which is part of no metric of the finished runs"


def rows_of(sweep: Sweep, runs: Sequence[Run]) -> list[Row]:
    """Return the metrics of finished runs: at the end, costs of the targets, and values at equal cost."""
    from icsd.evaluation import report as results
    from icsd.evaluation.curves import late_training, read_curves, whole_cost
    from icsd.evaluation.paired import Row

    rows, curves = [], {}
    costs = {each: whole_cost(each.folder / "metrics.jsonl") for each in runs}
    for each in runs:
        stages = results.read(each.results)
        rows += [Row(each.arm, each.seed, 0, f"{clock} of training", cost) for clock, cost in costs[each].items()]
        late = late_training(each.folder / "metrics.jsonl")
        rows += [Row(each.arm, each.seed, 0, f"{name} of training", value) for name, value in late.items()]
        for stage, result in stages.items():
            for metric, estimate in result.metrics.items():
                network = result.measured_by.get(metric, "")
                rows.append(
                    Row(each.arm, each.seed, stage, metric, estimate.value, result.protocol.identifier, network)
                )
        curves[each] = read_curves(each.folder / "metrics.jsonl")
    return rows + [row for each in runs for row in _curve_rows(sweep, each, curves[each], costs)]


def _curve_rows(sweep: Sweep, run: Run, curves: Sequence, costs: dict[Run, dict[str, float]]) -> Iterator[Row]:
    """Yield the endpoints that need evaluations during training.

    A run that never reaches a target counts with its whole cost, which understates the difference.
    """
    from icsd.evaluation.curves import CLOCKS
    from icsd.evaluation.paired import Row

    protocols = _protocols(run)
    for curve in curves:
        place = (run.arm, run.seed, curve.stage)
        protocol = protocols.get(curve.stage, "")
        if curve.metric in sweep.targets:
            target = sweep.targets[curve.metric]
            found = {clock: curve.cost_of(target, clock) for clock in CLOCKS}
            name = f"{curve.metric} {target:g}"
            yield Row(*place, f"reaches {name}", float(found["steps"] is not None), protocol)
            for clock, cost in found.items():
                value = curve.costs[clock][-1] if cost is None else cost
                yield Row(*place, f"{clock} to {name}", value, protocol)
        for clock in list(CLOCKS)[1:]:
            budget = min(cost[clock] for cost in costs.values() if clock in cost)
            value = curve.value_at(budget, clock)
            if value is not None and not curve.metric.startswith("r_precision_training"):
                yield Row(*place, f"{curve.metric} at equal {clock}", value, protocol)


def _protocols(run: Run) -> dict[int, str]:
    """Return the identifiers of the protocols of the evaluations during training, by stage."""
    from icsd.evaluation.protocol import Protocol

    path = run.folder / "evaluation" / "during-training.json"
    if not path.is_file():
        return {}
    stages = json.loads(path.read_text(encoding="utf-8"))
    return {int(stage): Protocol(**fields).identifier for stage, fields in stages.items()}


def _run_all(work: Sequence[tuple[Run, list[list[str]]]], jobs: int, team: Team) -> list[Run]:
    """Run the commands of runs, several at once on each rank; return the runs of this rank that failed.

    Args:
        work: The runs of all ranks, with their commands. Each rank takes the next one when it has finished one.
        jobs: Number of runs at once on this rank.
        team: The ranks.
    """
    from tqdm import tqdm

    from icsd.team import environment_alone

    children: set[subprocess.Popen] = set()
    starting = threading.Lock()  # no child starts between the last check of `stopped` and the signals to the children
    failed: list[Run] = []
    stopped = False
    environment = {"OMP_NUM_THREADS": "1", **environment_alone()}

    def run_one(run: Run, lines: list[list[str]]) -> int:
        """Return the exit code of the last command of a run."""
        code = 0
        with run.log.open("ab") as log:
            for line in lines:
                with starting:
                    if stopped:
                        break
                    child = subprocess.Popen(
                        [*PROGRAM, *line],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,  # Ctrl-C reaches this process alone, which passes one signal on
                    )
                    children.add(child)
                code = child.wait()
                children.discard(child)
                if code:
                    break
        return code

    def run_next(progress: tqdm) -> None:
        """Take runs that no one has taken until there are none."""
        while not stopped and (number := team.take()) < len(work):
            run, since = work[number][0], time.perf_counter()
            code = run_one(*work[number])
            if code:
                failed.append(run)
            outcome = f"failed with exit code {code}" if code else "finished"
            line = f"{run.folder}: {outcome} after {(time.perf_counter() - since) / 60:.1f} min"
            progress.write(line, sys.stdout if team.leads else sys.stderr)
            progress.update()

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    pool = ThreadPoolExecutor(jobs)
    try:
        with tqdm(total=len(work), unit="run", disable=team.size > 1) as progress:
            for future in as_completed([pool.submit(run_next, progress) for _ in range(jobs)]):
                future.result()
    except KeyboardInterrupt as error:
        with starting:
            stopped = True
            for child in list(children):  # each saves a checkpoint after the step in progress
                child.terminate()
        pool.shutdown()
        raise KeyboardInterrupt("stopped; the same command goes on where each run was") from error
    finally:
        pool.shutdown()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return failed

"""Differences between the arms of an ablation, paired by seed."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from icsd.errors import InputError
from icsd.outputs import replacing


@dataclass(frozen=True)
class Row:
    """The value of a metric in one run.

    Attributes:
        arm: Name of the arm.
        seed: Seed of the run.
        stage: Resolution of the stage in pixels; 0 for metrics of the whole run, such as its seconds.
        metric: Name of the metric.
        value: Its value.
        protocol: Identifier of the protocol; empty for metrics of the whole run.
        measured_by: The network behind the metric, where it is not the extractor of the protocol.
    """

    arm: str
    seed: int
    stage: int
    metric: str
    value: float
    protocol: str = ""
    measured_by: str = ""


@dataclass(frozen=True)
class Difference:
    """The mean difference of an arm from the reference, over the seeds that both have.

    Attributes:
        arm: Name of the arm.
        stage: Resolution of the stage in pixels, or 0.
        metric: Name of the metric.
        reference: Mean of the reference.
        mean: Mean difference, arm minus reference.
        low: Lower end of the 95 % interval (Student's t), or None for a single pair.
        high: Upper end of the interval, or None.
        pairs: Number of seeds.
    """

    arm: str
    stage: int
    metric: str
    reference: float
    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        """True if the interval is known and does not hold 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def paired_differences(rows: Iterable[Row], reference: str) -> list[Difference]:
    """Return the differences of all arms from the reference.

    Metrics that were measured by a different network in each run, such as the encoder that was trained with the model,
    are left out: they say nothing about each other.

    Raises:
        InputError: There is no run of the reference, or the runs of a metric have different protocols.
    """
    rows = list(rows)
    table: dict[tuple[int, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        table.setdefault((row.stage, row.metric), {}).setdefault(row.arm, {})[row.seed] = row
    if not any(row.arm == reference for row in rows):
        raise InputError(f"there is no finished run of the reference {reference!r} to compare with")
    differences = []
    for (stage, metric), arms in table.items():
        expected = arms.get(reference, {})
        for arm, runs in arms.items():
            seeds = sorted(set(runs) & set(expected))
            compared = [each[seed] for seed in seeds for each in (runs, expected)]
            if arm == reference or not seeds or len({row.measured_by for row in compared}) > 1:
                continue
            _require_one_protocol(metric, compared)
            values = [runs[seed].value - expected[seed].value for seed in seeds]
            mean = statistics.mean(expected[seed].value for seed in seeds)
            differences.append(
                Difference(arm, stage, metric, mean, statistics.mean(values), *_interval(values), len(seeds))
            )
    return differences


def _require_one_protocol(metric: str, rows: list[Row]) -> None:
    if len({row.protocol for row in rows}) > 1:
        runs = ", ".join(f"{row.arm} seed {row.seed}: {row.protocol}" for row in rows)
        raise InputError(f"{metric} was measured under different protocols ({runs}): evaluate these runs again")


def _interval(values: list[float]) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean by Student's t."""
    if len(values) < 2:
        return None, None
    try:
        quantile = importlib.import_module("scipy.stats").t.ppf(0.975, len(values) - 1)
    except ImportError as error:
        raise InputError(f'intervals need SciPy ({error}): run pip install -e ".[evaluate]" in the checkout') from error
    half = float(quantile) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def write_csv(path: Path, kind: type, rows: Iterable[Row | Difference]) -> None:
    """Write rows of one dataclass as CSV, with the names of its fields first."""
    columns = [field.name for field in dataclasses.fields(kind)]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows([getattr(row, column) for column in columns] for row in rows)


def format_differences(differences: Sequence[Difference]) -> str:
    """Return a table of differences; a star marks an interval that excludes 0."""
    width = max([len("metric"), *(len(each.metric) for each in differences)])
    names = max([len("arm"), *(len(each.arm) for each in differences)])
    lines = [
        f"{'metric':<{width}} {'stage':>6} {'arm':<{names}} {'reference':>10} {'difference':>11} "
        f"{'95 % interval':>24} pairs"
    ]
    for each in sorted(differences, key=lambda one: (one.metric, one.stage)):
        interval = f"[{each.low:.4g}, {each.high:.4g}]" if each.low is not None else ""
        stage = f"{each.stage} px" if each.stage else ""
        lines.append(
            f"{each.metric:<{width}} {stage:>6} {each.arm:<{names}} {each.reference:>10.4g} {each.mean:>11.4g} "
            f"{interval:>24} {each.pairs:>5}{' *' if each.excludes_zero else ''}"
        )
    return "\n".join(lines)

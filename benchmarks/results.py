"""Files of results: one row for each implementation of each case in each run; comparison of two files."""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

import icsd
from benchmarks.ceilings import CONTENTION_LIMIT
from icsd.errors import InputError

LEAST_CHANGE = 0.05


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        date: The time in UTC at which the run began; all rows of a run have the same.
        cpu: The model of the processor.
        isa: The instruction set of the native kernels.
        threads: The number of CPU threads.
        torch: The version of PyTorch.
        icsd: The version of icsd.
        commit: The commit of icsd's git repository, with a + if files differ from it; empty outside a repository.
        benchmark: operator, groups, banks, banks-memory, family, regimes, overhead, memory, training or field.
        work: The measured work: forward+backward, forward, step, ...
        groups: B.
        samples: N.
        dim: D.
        dtype: The dtype of the features.
        loss: The name of the loss.
        implementation: icsd or a peer.
        unit: The unit of median and quartiles: s, or B for bytes.
        median: The median over all rounds of all turns.
        lower_quartile: The lower quartile of the same rounds.
        upper_quartile: The upper quartile of the same rounds.
        floor: The least possible time (`benchmarks.ceilings.floor_seconds`) by the best rates of all turns, if known.
        ratio_to_floor: median / floor.
        ratio_to_plain: median / the median of plain PyTorch in the same run, if that was measured.
        copy_gb_s: The best copy bandwidth that was measured before the turns, in 10⁹ bytes per second.
        gemm_gflop_s: The best rate of a matrix product in this dtype before the turns, in 10⁹ flops per second.
        contention: The median of `benchmarks.ceilings.contention` before the turns.
    """

    date: str
    cpu: str
    isa: str
    threads: int
    torch: str
    icsd: str
    commit: str
    benchmark: str
    work: str
    groups: int
    samples: int
    dim: int
    dtype: str
    loss: str
    implementation: str
    unit: str
    median: float
    lower_quartile: float
    upper_quartile: float
    floor: float | None
    ratio_to_floor: float | None
    ratio_to_plain: float | None
    copy_gb_s: float
    gemm_gflop_s: float
    contention: float

    @property
    def disturbed(self) -> bool:
        """True if the machine was too busy during this measurement."""
        return self.unit == "s" and self.contention > CONTENTION_LIMIT

    @property
    def case(self) -> tuple[str | int, ...]:
        """The key of what was measured, without the implementation."""
        return self.benchmark, self.work, self.groups, self.samples, self.dim, self.dtype, self.loss


COLUMNS = [field.name for field in dataclasses.fields(Row)]
LABELS = COLUMNS[: COLUMNS.index("median")]


def environment() -> dict[str, str | int]:
    """Return the columns that describe processor and software; they name neither the host nor a path."""
    from icsd import _native

    return {
        "cpu": _processor(),
        "isa": _native.cpu_isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "icsd": icsd.__version__,
        "commit": _commit(),
    }


def rows_from_report(path: Path) -> list[Row]:
    """Return the rows of a run from pytest-benchmark's JSON report; all turns of an implementation make one row."""
    turns: dict[tuple, list[dict[str, Any]]] = {}
    for entry in json.loads(path.read_text())["benchmarks"]:
        labels = {"values": entry["stats"]["data"], **entry["extra_info"]}
        turns.setdefault(tuple(labels[column] for column in LABELS), []).append(labels)
    rows = [_row(labels) for labels in turns.values()]
    plain = {row.case: row.median for row in rows if row.implementation == "plain"}
    return [
        dataclasses.replace(row, ratio_to_plain=row.median / plain[row.case]) if row.case in plain else row
        for row in rows
    ]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a file, which is created if it does not exist.

    Raises:
        InputError: The file holds something other than results.
    """
    new = not path.exists()
    if not new:
        _check_header(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    """Return all rows of a file.

    Raises:
        InputError: The file does not exist, or holds something other than results.
    """
    _check_header(path)
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return [Row(**{key: _parse(key, text) for key, text in line.items()}) for line in csv.DictReader(file)]
        except (TypeError, ValueError) as error:
            raise InputError(f"{path} holds a row that cannot be read ({error}): delete that row") from error


def best_composite(rows: Iterable[Row]) -> list[Row]:
    """Return the rows with only the fastest composite of each case, named `composite`."""
    best: dict[tuple, Row] = {}
    for row in rows:
        name = "composite" if row.implementation.startswith("composite") else row.implementation
        row = dataclasses.replace(row, implementation=name)
        key = (*row.case, name)
        if key not in best or row.median < best[key].median:
            best[key] = row
    return list(best.values())


@dataclasses.dataclass(frozen=True)
class Change:
    """The change of one measurement of icsd between two files.

    Attributes:
        before: The latest row in the first file.
        after: The latest row in the second file.
        ratio: after / before, divided by the change of the machine's speed.
        verdict: slower, faster or same ("larger" and "smaller" for memory).
    """

    before: Row
    after: Row
    ratio: float
    verdict: str


def drift(before: Sequence[Row], after: Sequence[Row]) -> tuple[float, float, float]:
    """Return the quartiles of the peers' times after / before: the change of the machine's speed. 1 without peers."""
    ratios = [
        new.median / old.median
        for old, new in _pairs(before, after)
        if new.implementation != "icsd" and new.unit == "s"
    ]
    if not ratios:
        return 1.0, 1.0, 1.0
    lower, middle, upper = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return lower, middle, upper


def compare(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Return the changes of icsd's measurements between the latest runs of two files, the largest ratio first.

    The code of the peers does not change, so their drift is the machine's, and the times of icsd are divided by it. A
    change counts if it exceeds 5 % and the quartile ranges do not overlap, even at the quartiles of the drift.
    """
    lower, middle, upper = drift(before, after)
    changes = []
    for old, new in _pairs(before, after):
        if new.implementation != "icsd":
            continue
        low, mid, high = (lower, middle, upper) if new.unit == "s" else (1.0, 1.0, 1.0)
        ratio = new.median / old.median / mid
        verdict = "same"
        if ratio > 1 + LEAST_CHANGE and new.lower_quartile / high > old.upper_quartile:
            verdict = "slower" if new.unit == "s" else "larger"
        elif ratio < 1 - LEAST_CHANGE and new.upper_quartile / low < old.lower_quartile:
            verdict = "faster" if new.unit == "s" else "smaller"
        changes.append(Change(old, new, ratio, verdict))
    return sorted(changes, key=lambda change: -change.ratio)


def _pairs(before: Sequence[Row], after: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the latest rows of everything that both files hold, without disturbed ones."""
    old, new = (
        {(*row.case, row.implementation): row for row in sorted(rows, key=lambda row: row.date)}
        for rows in (before, after)
    )
    pairs = [(old[key], row) for key, row in new.items() if key in old]
    return [pair for pair in pairs if not any(row.disturbed for row in pair)]


def _row(turns: list[dict[str, Any]]) -> Row:
    values = [value for turn in turns for value in turn["values"]]
    lower, middle, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    floor = turns[0]["floor"] and min(turn["floor"] for turn in turns)
    return Row(
        **{column: turns[0][column] for column in LABELS},
        median=middle,
        lower_quartile=lower,
        upper_quartile=upper,
        floor=floor,
        ratio_to_floor=middle / floor if floor else None,
        ratio_to_plain=None,
        copy_gb_s=max(turn["copy_gb_s"] for turn in turns),
        gemm_gflop_s=max(turn["gemm_gflop_s"] for turn in turns),
        contention=median(turn["contention"] for turn in turns),
    )


def _check_header(path: Path) -> None:
    try:
        header = path.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a result file ({error}): give another file") from error
    if header != ",".join(COLUMNS):
        raise InputError(f"{path} does not begin with the columns of this version's results: give another file")


def _parse(column: str, text: str) -> str | int | float | None:
    if column in ("threads", "groups", "samples", "dim"):
        return int(text)
    if column in LABELS:
        return text
    return float(text) if text else None


def _commit() -> str:
    git = ["git", "-C", str(Path(icsd.__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _processor() -> str:
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()

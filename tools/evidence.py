"""Write the tables and the figures of docs/evidence.md from the rows of its sweeps, docs/evidence/*.csv.

python -m tools.evidence                          print the tables
python -m tools.evidence --write docs/evidence.md write them into the page, and the figures beside the rows

The rows are the rows.csv that `icsd ablate` writes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from icsd.evaluation.paired import Difference, Row, paired_differences
from icsd.evaluation.plot import plot_differences
from tools.descriptions import write_description

FOLDER = Path(__file__).parents[1] / "docs" / "evidence"
PAGE = FOLDER.with_suffix(".md")
MARKS = "<!-- python -m tools.evidence --write docs/evidence.md -->\n", "<!-- end -->\n"
REFERENCE = "none"
ENDPOINTS = (
    "kernel_distance",
    "kernel_distance at equal cpu_seconds",
    "tone_accuracy",
    "inconsistency",
    "inconsistency/generator of training",
    "inconsistency/discriminator of training",
    "steps to tone_accuracy 0.75",
    "cpu_seconds to tone_accuracy 0.75",
    "cpu_seconds of training",
)
ARMS_PER_TABLE = 4
LEAST_PAIRS = 3
"""The number of seeds from which on an interval is shown; two seeds hardly tell its width."""


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a sweep."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != [field.name for field in dataclasses.fields(Row)]:
            raise SystemExit(f"{path} has other columns than the rows of `icsd ablate`: report its sweep again")
        return [
            Row(**{**row, "seed": int(row["seed"]), "stage": int(row["stage"]), "value": float(row["value"])})
            for row in reader
        ]


def endpoints(rows: list[Row]) -> list[Difference]:
    """Return the differences of the endpoints and of all accuracies from the reference, in the order of the page.

    The cost of a target is left out for a stage at which a run did not reach it.
    """
    accuracies = sorted({row.metric for row in rows if row.metric.endswith("_accuracy")} - set(ENDPOINTS))
    order = [*ENDPOINTS, *accuracies]
    missed = {(row.stage, row.metric.removeprefix("reaches ")) for row in rows if _is_missed(row)}
    found = [
        each if each.pairs >= LEAST_PAIRS else dataclasses.replace(each, low=None, high=None)
        for each in paired_differences(rows, REFERENCE)
        if each.metric in order and (each.stage, each.metric.partition(" to ")[2]) not in missed
    ]
    return sorted(found, key=lambda each: (order.index(each.metric), each.stage))


def table(differences: list[Difference]) -> Iterator[str]:
    """Yield the lines of tables in Markdown, with a row for each endpoint and a column for each arm."""
    arms = list(dict.fromkeys(each.arm for each in differences))
    for start in range(0, len(arms), ARMS_PER_TABLE):
        shown = arms[start : start + ARMS_PER_TABLE]
        yield f"| endpoint | stage | {REFERENCE} | {' | '.join(f'{arm}, minus {REFERENCE}' for arm in shown)} |"
        yield "|---" * (3 + len(shown)) + "|"
        for (metric, stage), group in itertools.groupby(differences, lambda each: (each.metric, each.stage)):
            cells = {each.arm: each for each in group}
            reference = max(cells.values(), key=lambda each: each.pairs).reference
            place = f"{stage} px" if stage else ""
            differences_of = " | ".join(_cell(cells.get(arm)) for arm in shown)
            yield f"| {metric} | {place} | {_number(reference)} | {differences_of} |"
        yield ""


def text_of(rows: list[Row]) -> str:
    """Return the tables of a sweep."""
    return "\n".join(table(endpoints(rows)))


def page() -> str:
    """Return the generated part of the page: the tables of all sweeps."""
    parts = []
    for path in sorted(FOLDER.glob("*.csv")):
        rows = read_rows(path)
        seeds = sorted({row.seed for row in rows if row.arm == REFERENCE})
        counts = {arm: len({row.seed for row in rows if row.arm == arm}) for arm in dict.fromkeys(r.arm for r in rows)}
        runs = ", ".join(f"{arm} {count}" for arm, count in counts.items())
        parts.append(f"### {path.stem}\n\nSeeds {', '.join(map(str, seeds))}; runs by arm: {runs}.\n")
        parts.append(text_of(rows))
        parts.append(f"![Differences of the arms with their intervals](evidence/{path.stem}.png)\n")
    return "\n".join(parts)


def write(path: Path) -> None:
    """Replace the generated part of a page, and draw the figures."""
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    path.write_text(before + MARKS[0] + page() + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")
    for sweep in FOLDER.glob("*.csv"):
        rows, image = read_rows(sweep), sweep.with_suffix(".png")
        plot_differences(endpoints(rows), REFERENCE, image)
        write_description(image, text_of(rows))


def _is_missed(row: Row) -> bool:
    return row.metric.startswith("reaches ") and not row.value


def _cell(difference: Difference | None) -> str:
    """Return a mean difference with its interval, in bold if the interval excludes 0."""
    if difference is None:
        return ""
    if difference.low is None:
        return _number(difference.mean, "+")
    text = "{} [{}, {}]".format(*(_number(x, "+") for x in (difference.mean, difference.low, difference.high)))
    return f"**{text}**" if difference.excludes_zero else text


def _number(value: float, sign: str = "") -> str:
    """Return a value with two digits, or as a whole number; a mean that differs from 0 by rounding alone is 0."""
    value = round(value, 9) + 0.0  # the sum is never -0.0
    return f"{value:{sign},.0f}" if abs(value) >= 99.5 else f"{value:{sign}.2g}"


def main() -> None:
    """Print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page to write into")
    options = parser.parse_args()
    if options.write:
        write(options.write)
    else:
        print(page())


if __name__ == "__main__":
    main()

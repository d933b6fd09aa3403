"""Results of evaluations as files and as tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from icsd.errors import InputError
from icsd.evaluation.distances import Estimate
from icsd.evaluation.evaluate import StageResult
from icsd.evaluation.protocol import Protocol, require_one_protocol


def to_json(checkpoint: str, step: int, results: dict[int, StageResult]) -> str:
    """Return the results of a checkpoint as JSON text."""
    stages = {str(resolution): dataclasses.asdict(result) for resolution, result in results.items()}
    return json.dumps({"checkpoint": checkpoint, "step": step, "stages": stages}, indent=2) + "\n"


def read(path: Path) -> dict[int, StageResult]:
    """Read the results that `to_json` wrote.

    Raises:
        InputError: The file cannot be read, or holds something else.
    """
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {
            int(resolution): StageResult(
                Protocol(**stage["protocol"]),
                {name: Estimate(**estimate) for name, estimate in stage["figures"].items()},
                stage["left_out"],
            )
            for resolution, stage in stages.items()
        }
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a file that `icsd evaluate` wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no results of `icsd evaluate` ({error}): evaluate the run again") from error


def table(results: dict[int, StageResult]) -> str:
    """Return a table with a column for each stage, and below it the protocol of each stage."""
    names = list(dict.fromkeys(name for result in results.values() for name in result.figures))
    width = max(map(len, names))
    lines = ["".join([" " * width, *(f"{f'{resolution} px':>24}" for resolution in results)])]
    for name in names:
        cells = (_cell(result.figures.get(name)) for result in results.values())
        lines.append("".join([name.ljust(width), *(f"{cell:>24}" for cell in cells)]))
    left_out = {name: reason for result in results.values() for name, reason in result.left_out.items()}
    lines += ["", *(f"left out: {name}: {reason}" for name, reason in left_out.items())]
    lines += [f"protocol {result.protocol.identifier}: {result.protocol.name}" for result in results.values()]
    return "\n".join(lines)


def comparison(results: dict[int, StageResult], others: dict[int, StageResult]) -> str:
    """Return a table of the differences of two evaluations, this one minus the other.

    Raises:
        InputError: They have no stage in common, or differ in their protocol.
    """
    shared = [resolution for resolution in results if resolution in others]
    if not shared:
        raise InputError(f"the stages are {list(results)} and {list(others)} pixels: there is nothing to compare")
    differences = {}
    for resolution in shared:
        mine, other = results[resolution], others[resolution]
        protocol = require_one_protocol({"this evaluation": mine.protocol, "the other one": other.protocol})
        figures = {
            name: _difference(estimate, other.figures[name])
            for name, estimate in mine.figures.items()
            if name in other.figures
        }
        differences[resolution] = StageResult(protocol, figures, {})
    return table(differences)


def _difference(a: Estimate, b: Estimate) -> Estimate:
    """Return a - b with the error of independent estimates."""
    known = a.error is not None and b.error is not None
    return Estimate(a.value - b.value, (a.error**2 + b.error**2) ** 0.5 if known else None)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.4g}" + ("" if estimate.error is None else f" ± {estimate.error:.2g}")

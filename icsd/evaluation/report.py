"""Results of evaluations as files and as tables."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from icsd.errors import InputError
from icsd.evaluation.distances import Estimate
from icsd.evaluation.evaluate import StageResult
from icsd.evaluation.protocol import VERSION, Protocol, require_one_protocol


def to_json(checkpoint: str, step: int, results: dict[int, StageResult], key: str) -> str:
    """Return the results of a checkpoint as JSON text; equal keys stand for equal models measured in the same way."""
    stages = {str(resolution): dataclasses.asdict(result) for resolution, result in results.items()}
    content = {"version": VERSION, "checkpoint": checkpoint, "step": step, "key": key, "stages": stages}
    return json.dumps(content, indent=2) + "\n"


def key_of(path: Path) -> str | None:
    """Return the key of a file of results, or None if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read(path: Path) -> dict[int, StageResult]:
    """Read the results that `to_json` wrote.

    Raises:
        InputError: The file cannot be read, holds something else, or was measured by another version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stages = content["stages"]
        if content.get("version") != VERSION:
            raise InputError(f"{path} holds metrics of another version of icsd: evaluate the run again")
        return {
            int(resolution): StageResult(
                Protocol(**stage["protocol"]),
                {name: Estimate(**estimate) for name, estimate in stage["metrics"].items()},
                stage["left_out"],
                stage["measured_by"],
            )
            for resolution, stage in stages.items()
        }
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give a file that `icsd evaluate` wrote") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no results of `icsd evaluate` ({error}): evaluate the run again") from error


def table(results: dict[int, StageResult]) -> str:
    """Return a table with a column for each stage, and below it the protocol of each stage."""
    names = list(dict.fromkeys(name for result in results.values() for name in result.metrics))
    width = max(map(len, [*names, ""]))
    lines = ["".join([" " * width, *(f"{f'{resolution} px':>24}" for resolution in results)])]
    for name in names:
        cells = (_cell(result.metrics.get(name)) for result in results.values())
        lines.append("".join([name.ljust(width), *(f"{cell:>24}" for cell in cells)]).rstrip())
    lines += ["", *_reasons(results)]
    for resolution, result in results.items():
        lines += [f"protocol {result.protocol.identifier}: {result.protocol.name}"]
        lines += [f"  {resolution} px, {name}: {network}" for name, network in _by_network(result).items()]
    return "\n".join(lines)


def _reasons(results: dict[int, StageResult]) -> list[str]:
    """Return a line for each metric that is left out and each reason, with its stages."""
    stages: dict[tuple[str, str], list[str]] = {}
    for resolution, result in results.items():
        for reason in result.left_out.items():
            stages.setdefault(reason, []).append(f"{resolution} px")
    return [f"left out: {name} ({', '.join(where)}): {reason}" for (name, reason), where in stages.items()]


def _by_network(result: StageResult) -> dict[str, str]:
    """Return the networks of a stage besides the extractor, by the names of their metrics."""
    names: dict[str, list[str]] = {}
    for name, network in result.measured_by.items():
        if name in result.metrics and not name.endswith(("_real", "_shuffled")):
            names.setdefault(network, []).append(name)
    return {", ".join(metrics): network for network, metrics in names.items()}


def comparison(results: dict[int, StageResult], others: dict[int, StageResult]) -> str:
    """Return a table of the differences of two evaluations, this one minus the other.

    Raises:
        InputError: They have no stage in common, or differ in their protocol.
    """
    shared = [resolution for resolution in results if resolution in others]
    if not shared:
        raise InputError(f"the stages are {list(results)} and {list(others)} pixels: there is nothing to compare")
    return table({resolution: _differences(results[resolution], others[resolution]) for resolution in shared})


def _differences(mine: StageResult, other: StageResult) -> StageResult:
    """Return the differences of the metrics that the same network measured in both evaluations."""
    result = StageResult(require_one_protocol({"this evaluation": mine.protocol, "the other one": other.protocol}), {})
    for name in dict.fromkeys([*mine.metrics, *other.metrics]):
        if name.endswith(("_real", "_shuffled")):
            continue
        networks = [each.measured_by.get(name) for each in (mine, other)]
        if name not in mine.metrics or name not in other.metrics:
            result.left_out[name] = "one of the evaluations did not measure it"
        elif networks[0] != networks[1]:
            result.left_out[name] = f"measured by {networks[0]} and by {networks[1]}"
        else:
            result.metrics[name] = _difference(mine.metrics[name], other.metrics[name])
    return result


def _difference(a: Estimate, b: Estimate) -> Estimate:
    """Return a - b with the error of independent estimates."""
    known = a.error is not None and b.error is not None
    return Estimate(a.value - b.value, (a.error**2 + b.error**2) ** 0.5 if known else None)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate.value:.4g}" + ("" if estimate.error is None else f" ± {estimate.error:.2g}")

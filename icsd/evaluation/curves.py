"""Metrics during training, and the endpoints that come from them: the cost of a value, and values at equal cost."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from icsd.errors import InputError

CLOCKS = {"steps": "step", "seconds": "seconds", "cpu_seconds": "cpu_seconds"}
"""Measures of cost and their keys in the metrics: steps, and their time by the wall clock and of the processor, without
that of evaluations."""

LATE = 0.2
"""Part of a run, its last one, over which the numbers of its training are averaged."""

LOWER_IS_BETTER = ("kernel_distance", "frechet_distance", "inconsistency", "constant_pixel_error")


@dataclass
class Curve:
    """A metric of one stage during training.

    Attributes:
        stage: Resolution in pixels.
        metric: Name of the metric.
        values: Its value at each evaluation.
        costs: Cost of training until each evaluation, by clock.
    """

    stage: int
    metric: str
    values: list[float] = field(default_factory=list)
    costs: dict[str, list[float]] = field(default_factory=lambda: {clock: [] for clock in CLOCKS})

    def cost_of(self, target: float, clock: str) -> float | None:
        """Return the cost at which the metric first reaches a target, between evaluations on a straight line.

        Returns:
            The cost, or None if no evaluation reaches the target.
        """
        sign = -1 if self.metric in LOWER_IS_BETTER else 1
        reached = [sign * value >= sign * target for value in self.values]
        if True not in reached:
            return None
        first = reached.index(True)
        if first == 0:
            return self.costs[clock][0]
        (a, b), (x, y) = (each[first - 1 : first + 1] for each in (self.values, self.costs[clock]))
        return x + (y - x) * (target - a) / (b - a)

    def value_at(self, cost: float, clock: str) -> float | None:
        """Return the value at a cost, between evaluations on a straight line, or None outside of the curve."""
        costs = self.costs[clock]
        for (x, y), (a, b) in zip(itertools.pairwise(costs), itertools.pairwise(self.values), strict=True):
            if x <= cost <= y:
                return a if x == y else a + (b - a) * (cost - x) / (y - x)
        return None


def read_curves(metrics: Path) -> list[Curve]:
    """Return the curves of a run from its file of metrics; none if it was not evaluated during training."""
    curves: dict[tuple[int, str], Curve] = {}
    for line in _lines(metrics):
        for name, value in line.items():
            kind, _, rest = name.partition("/")
            if kind != "evaluation":
                continue
            stage, metric = rest.split("/", 1)
            curve = curves.setdefault((int(stage), metric), Curve(int(stage), metric))
            curve.values.append(value)
            for clock, key in CLOCKS.items():
                curve.costs[clock].append(line[key])
    return list(curves.values())


def whole_cost(metrics: Path) -> dict[str, float]:
    """Return the cost of a whole run by clock, as far as its metrics know it."""
    last = {}
    for line in _lines(metrics):
        last |= {clock: float(line[key]) for clock, key in CLOCKS.items() if key in line}
    return last


def late_training(metrics: Path) -> dict[str, float]:
    """Return the means of numbers of training over the last fifth of a run, by their keys in the metrics.

    They are the inconsistency of the features that distillation compares, and the share of distillation in the
    gradient of each network. A line has no numbers that were not finite.
    """
    lines = [line for line in _lines(metrics) if any(map(_is_of_distillation, line))]
    late = [line for line in lines if line["step"] > (1 - LATE) * lines[-1]["step"]]
    names = dict.fromkeys(name for line in late for name in line if _is_of_distillation(name))
    return {name: statistics.mean(line[name] for line in late if name in line) for name in names}


def _is_of_distillation(name: str) -> bool:
    return name.startswith("inconsistency/") or (name.startswith("share/") and name.endswith("/distillation"))


def _lines(metrics: Path) -> Iterator[dict]:
    try:
        for line in metrics.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)
    except FileNotFoundError:
        return
    except ValueError as error:
        raise InputError(f"{metrics} cannot be read ({error}): resume the run, which repairs it") from error

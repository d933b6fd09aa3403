"""The intervals of paired differences as an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from icsd.evaluation.paired import Difference

COLUMNS = 3


def plot_differences(differences: Sequence[Difference], reference: str, path: Path) -> None:
    """Draw a panel for each metric and stage, with the mean difference and the 95 % interval of each arm.

    Args:
        differences: The differences, at least one.
        reference: Name of the arm that the others are compared with.
        path: Image file to write.
    """
    panels: dict[tuple[str, int], list[Difference]] = {}
    for each in sorted(differences, key=lambda one: (one.metric, one.stage)):
        panels.setdefault((each.metric, each.stage), []).append(each)
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    arms = max(map(len, panels.values()))
    figure = Figure(figsize=(4.6 * columns, rows * (1.2 + 0.28 * arms)), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, ((name, stage), group) in zip(axes, panels.items(), strict=False):
        _draw(axis, f"{name}, {stage} px" if stage else name, group)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(f"difference from {reference}, paired by seed, with 95 % intervals", fontsize=10)
    figure.savefig(path, dpi=120)


def _draw(axis: Axes, title: str, group: list[Difference]) -> None:
    axis.axvline(0, color="0.6", linewidth=1)
    for place, each in enumerate(reversed(group)):
        color = "tab:red" if each.excludes_zero else "0.2"
        if each.low is not None:
            axis.plot([each.low, each.high], [place, place], color=color, linewidth=2)
        axis.plot(each.mean, place, "o", color=color, markersize=4)
    axis.set_yticks(range(len(group)), [f"{each.arm} ({each.pairs})" for each in reversed(group)], fontsize=8)
    axis.set_ylim(-0.6, len(group) - 0.4)
    axis.tick_params(axis="x", labelsize=8)
    axis.locator_params(axis="x", nbins=5)
    axis.set_title(f"{title} (reference {group[0].reference:.4g})", fontsize=8)

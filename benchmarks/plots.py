"""Draw results as figures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks.results import Row

COLORS = {  # the palette of Okabe and Ito, which color-blind readers can tell apart
    "icsd": "#D55E00",
    "composite": "#009E73",
    "compile": "#0072B2",
    "plain": "#666666",
    "metric-learning": "#CC79A7",
}
LABELS = {
    "icsd": "icsd",
    "composite": "best PyTorch composite",
    "compile": "torch.compile of plain",
    "plain": "plain PyTorch",
    "metric-learning": "pytorch-metric-learning",
}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw the figures for which the rows of one run have enough points.

    Args:
        rows: The rows of one run.
        folder: The folder of the PNG files.

    Returns:
        The files: time against D and against N, with the floor, and speed-ups.
    """
    operator = [row for row in rows if row.benchmark in ("operator", "regimes") and not row.disturbed]
    figures = {
        "time-against-dim.png": lambda path: _scaling(operator, "dim", "samples", path),
        "time-against-samples.png": lambda path: _scaling(operator, "samples", "dim", path),
        "speed-ups.png": lambda path: _speedups(operator, path),
    }
    with mpl.rc_context(STYLE):
        return [folder / name for name, figure in figures.items() if figure(folder / name)]


def _scaling(rows: Sequence[Row], along: str, fixed: str, path: Path) -> bool:
    """Draw time against `along` on logarithmic axes, one plot for each value of `fixed` with at least three points."""
    panels: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if (row.dtype, row.loss) == ("float32", "mse"):
            panels[getattr(row, fixed)].append(row)
    panels = {
        value: panel for value, panel in sorted(panels.items()) if len({getattr(row, along) for row in panel}) >= 3
    }
    if not panels:
        return False
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (max(3.4 * columns, 4.8), 2.8 * lines + 1.0)
    figure, axes = plt.subplots(lines, columns, sharex=True, sharey=True, squeeze=False, figsize=size)
    letter, other = ("D", "N") if along == "dim" else ("N", "D")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (value, panel) in zip(axes.flat, panels.items(), strict=False):
        _lines(axis, panel, along)
        axis.set_title(f"{other} = {value:,}", loc="left")
    points = Counter(point for panel in panels.values() for point in {getattr(row, along) for row in panel})
    axes.flat[0].set_xticks([point for point, count in points.items() if 2 * count >= len(panels)])
    for axis in axes[-1]:
        axis.set_xlabel(f"{letter} ({'features per sample' if letter == 'D' else 'samples'})")
    for axis in axes[:, 0]:
        axis.set_ylabel("time")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    _finish(figure, "Forward + backward, mse, float32", rows[0], handles, labels, path)
    return True


def _lines(axis: Axes, rows: Sequence[Row], along: str) -> None:
    for name, color in reversed(COLORS.items()):
        points = sorted((getattr(row, along), row.median) for row in rows if row.implementation == name)
        if points:
            emphasis = {"linewidth": 2.4, "zorder": 3} if name == "icsd" else {"linewidth": 1.4}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=color, label=LABELS[name], **emphasis)
    floor = sorted({(getattr(row, along), row.floor) for row in rows})
    axis.plot(*zip(*floor, strict=True), color="black", linestyle="--", linewidth=1.2, label="floor of this machine")
    axis.set(xscale="log", yscale="log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(_duration))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _speedups(rows: Sequence[Row], path: Path) -> bool:
    """Draw bars of peer's time / time of icsd, one plot for each loss and dtype."""
    cases: dict[tuple[str, str], dict[tuple[int, int], dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cases[row.dtype, row.loss][row.samples, row.dim][row.implementation] = row.median
    if "icsd" not in {row.implementation for row in rows}:
        return False
    peers = [name for name in COLORS if name != "icsd" and any(row.implementation == name for row in rows)][::-1]
    complete = [{shape for shape, times in shapes.items() if len(times) > len(peers)} for shapes in cases.values()]
    common = sorted(set.intersection(*complete))
    if not (peers and common):
        return False
    columns = 2 if len(common) <= 6 and len(cases) > 1 else 1
    lines = -(-len(cases) // columns)
    size = (columns * max(4.2, 1 + 0.75 * len(common)), 2.2 * lines + 1.0)
    figure, axes = plt.subplots(lines, columns, squeeze=False, sharey=True, figsize=size)
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, ((dtype, loss), shapes) in zip(axes.flat, cases.items(), strict=False):
        _bars(axis, peers, {shape: shapes[shape] for shape in common})
        axis.set_title(f"{loss}, {dtype}", loc="left")
    for axis in axes[:, 0]:
        axis.set_ylabel("time / time of icsd")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    _finish(figure, "Forward + backward: time of the peers / time of icsd", rows[0], handles, labels, path)
    return True


def _bars(axis: Axes, peers: Sequence[str], times: dict[tuple[int, int], dict[str, float]]) -> None:
    width = 0.8 / len(peers)
    for offset, peer in enumerate(peers):
        places = [place + (offset - (len(peers) - 1) / 2) * width for place in range(len(times))]
        heights = [of_shape[peer] / of_shape["icsd"] for of_shape in times.values()]
        bars = axis.bar(places, heights, width * 0.94, color=COLORS[peer], label=LABELS[peer])
        digits = [f"{height:.{1 if height < 10 else 0}f}" for height in heights]
        texts = axis.bar_label(bars, digits, fontsize=6.5, padding=1)
        plt.setp(texts, path_effects=[withStroke(linewidth=2, foreground="white")])
    axis.axhline(1, color=COLORS["icsd"], linewidth=1.5, label=LABELS["icsd"])
    axis.set_xticks(range(len(times)), [f"{n} x\n{d:,}" for n, d in times], fontsize=8)
    axis.set_xlim(-0.6, len(times) - 0.4)
    axis.tick_params(axis="x", length=0)
    axis.grid(visible=False, axis="x")


def _finish(figure: Figure, title: str, row: Row, handles: Sequence[Artist], labels: Sequence[str], path: Path) -> None:
    """Add the title, the machine and the legend to a figure, and write it."""
    width, height = figure.get_size_inches()
    place = {"x": 0.02, "ha": "left", "va": "top"}
    figure.text(y=1 - 0.1 / height, s=title, fontsize=11, weight="bold", **place)
    threads = f"{row.threads} thread{'s' if row.threads > 1 else ''}"
    machine = f"{row.cpu}, {threads}, {row.isa}, torch {row.torch}"
    figure.text(y=1 - 0.33 / height, s=machine, fontsize=8, color="#666666", **place)
    columns = int(width / 2)
    anchor = (0.01, 1 - 0.46 / height)
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=anchor, ncols=columns, columnspacing=1.2)
    header = 0.55 + 0.18 * -(-len(labels) // columns)
    figure.tight_layout(rect=(0, 0, 1, 1 - header / height))
    figure.savefig(path)
    plt.close(figure)


def _duration(seconds: float, _) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            return f"{seconds * scale:g} {unit}"

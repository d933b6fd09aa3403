"""Heat maps with color bars: attention to words, and similarities of samples."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

from icsd.visualization import tensor_to_image

_PAPER, _PALE = "#f7f7f5", "#77776f"
_DPI, _MAPS_IN_A_ROW, _LABELS, _ANNOTATED = 110, 8, 32, 10


def draw_attention(
    image: Tensor, attention: Sequence[Tensor], words: Sequence[str], *, title: str, footer: str | None = None
) -> Image.Image:
    """Draw heat maps of the attention that each pixel pays to each word, with a color bar for each stage.

    Args:
        image: The generated image, (3, R, R) in [-1, 1].
        attention: One tensor (r, r, T) per stage after the first: at each pixel of the stage before, the weights of
            the T words, which add up to 1.
        words: T words.
        title: Line on top.
        footer: Line at the bottom.

    Returns:
        The image, RGB.
    """
    rows = math.ceil((len(words) + 1) / _MAPS_IN_A_ROW)
    columns = math.ceil((len(words) + 1) / rows)
    size = (max(1.25 * columns + 1.4, 5), len(attention) * (1.55 * rows + 0.4) + 0.7)
    figure = _figure(size, title)
    parts = figure.subfigures(len(attention), 1, squeeze=False)[:, 0]
    for stage, (part, maps) in enumerate(zip(parts, attention, strict=True), start=2):
        maps = maps.detach().float().cpu()
        part.suptitle(f"stage {stage}: attention on a map of {maps.shape[0]} x {maps.shape[1]} pixels", fontsize=10)
        axes = part.subplots(rows, columns, squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        axes.flat[0].imshow(tensor_to_image(image))
        axes.flat[0].set_title("image", fontsize=9)
        largest = max(maps.max().item(), 1e-6)
        for axis, word, weights in zip(axes.flat[1:], words, maps.unbind(2), strict=False):
            drawn = axis.imshow(weights.numpy(), cmap="inferno", vmin=0, vmax=largest, interpolation="nearest")
            axis.set_title(_plain(word), fontsize=9)
        part.colorbar(drawn, ax=axes, label="attention weight", shrink=0.9)
    return _rendered(figure, footer)


def draw_similarities(
    matrices: Sequence[Tensor],
    labels: Sequence[str],
    headers: Sequence[str],
    *,
    title: str,
    footer: str | None = None,
) -> Image.Image:
    """Draw cosine similarity matrices side by side, with the samples' labels and one color bar.

    Args:
        matrices: One (N, N) per stage.
        labels: N labels of the samples, drawn beside the first matrix; the samples are numbered from 1.
        headers: A heading per matrix.
        title: Line on top.
        footer: Line at the bottom.

    Returns:
        The image, RGB.
    """
    count = len(labels)
    side = min(max(0.42 * count, 2.2), 8)
    values = torch.stack([matrix.detach().float().cpu() for matrix in matrices])
    lowest = min(values.min().item(), 0.99)
    scale = {"cmap": "viridis", "vmin": lowest, "vmax": 1} if lowest >= 0 else {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}
    figure = _figure((len(matrices) * (side + 0.4) + 4, side + 1.6), title)
    axes = figure.subplots(1, len(matrices), squeeze=False)[0]
    step = max(1, math.ceil(count / _LABELS))
    ticks = range(0, count, step)
    for axis, matrix, header in zip(axes, values, headers, strict=True):
        drawn = axis.imshow(matrix.numpy(), interpolation="nearest", **scale)
        axis.set_title(header, fontsize=10)
        axis.set_xlabel("image", fontsize=9)
        axis.set_xticks(ticks, [str(tick + 1) for tick in ticks], fontsize=8)
        axis.set_yticks(ticks, [str(tick + 1) for tick in ticks], fontsize=8)
        if count <= _ANNOTATED:
            _annotate(axis, matrix, drawn)
    names = [f"{textwrap.shorten(_plain(labels[tick]), 60, placeholder=' ...')}  {tick + 1}" for tick in ticks]
    axes[0].set_yticks(ticks, names, fontsize=8)
    figure.colorbar(drawn, ax=axes, label="cosine similarity", shrink=0.8)
    return _rendered(figure, footer)


def _annotate(axis: Axes, matrix: Tensor, drawn: AxesImage) -> None:
    """Write each value into its cell, in a color that stands out."""
    for row in range(len(matrix)):
        for column in range(len(matrix)):
            value = matrix[row, column].item()
            red, green, blue, _ = drawn.cmap(drawn.norm(value))
            color = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)


def _figure(size: tuple[float, float], title: str) -> Figure:
    """Make a figure with a title that is broken to its width, and margins around."""
    figure = Figure(figsize=size, layout="constrained", dpi=_DPI, facecolor=_PAPER)
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    figure.suptitle("\n".join(textwrap.wrap(_plain(title), round(11 * size[0]))), fontsize=12)
    return figure


def _rendered(figure: Figure, footer: str | None) -> Image.Image:
    """Render a figure, with a line at the bottom."""
    if footer:
        figure.supxlabel(_plain(footer), fontsize=8, color=_PALE)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of characters that the font does not have
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _plain(text: str) -> str:
    """Return text that matplotlib draws as it is: no formulas, no lone surrogates, one line."""
    return " ".join(text.encode(errors="replace").decode().split()).replace("$", r"\$")

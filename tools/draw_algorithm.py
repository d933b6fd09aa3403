"""Draw the figure of the README: the two passes of the operator. Run `python -m tools.draw_algorithm`."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from tools.descriptions import write_description

STUDENT, TEACHER, GRADIENT, TEXT = "#3b6fb6", "#c9772c", "#3f8f5b", "#222222"
TARGET = Path(__file__).parents[1] / "docs" / "images" / "algorithm.png"
NARROW, WIDE, SQUARE = 2.6, 3.6, 0.9


def matrix(axes: Axes, x: float, y: float, width: float, height: float, color: str, label: str) -> None:
    """Draw one matrix with its lower left corner at (x, y) and its name in the middle."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", alpha=0.88, linewidth=1.5))
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", color="white", fontsize=12)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "") -> None:
    """Draw an arrow with a label above its middle."""
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "color": TEXT, "linewidth": 1.3}
    axes.add_patch(FancyArrowPatch(start, end, **style))
    if label:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.14, label, ha="center", fontsize=9.5, color=TEXT)


def note(axes: Axes, x: float, y: float, text: str, **options) -> None:
    """Write text that explains a matrix or a pass."""
    axes.text(x, y, text, color=TEXT, **({"fontsize": 9.5, "va": "center"} | options))


def draw_forward(axes: Axes) -> None:
    """Draw the forward pass: features, Gram matrices and the loss."""
    note(axes, 0, 4.75, "Forward: read the features of each stage once", fontsize=12, weight="bold")
    note(axes, 0, 4.42, "N samples x D features (D may differ)", fontsize=9)
    note(axes, 5.2, 4.42, "N x N", fontsize=9)
    for y, width, color, name, gram in (
        (3.35, NARROW, STUDENT, "student  X", "K = X Xᵀ"),
        (2.15, WIDE, TEACHER, "teacher  Y", "L = Y Yᵀ"),
    ):
        matrix(axes, 0, y, width, SQUARE, color, name)
        arrow(axes, (width + 0.1, y + SQUARE / 2), (5.1, y + SQUARE / 2))
        matrix(axes, 5.2, y, 1.3, SQUARE, color, gram)
        arrow(axes, (6.6, y + SQUARE / 2), (7.9, 3.2 + (y - 2.75) / 4))
    axes.add_patch(Rectangle((8, 2.6), 4, 1.2, facecolor="#f1f1f1", edgecolor=TEXT, linewidth=1))
    note(axes, 10, 3.2, "S, T = cosine similarities from K, L\nloss(S, T), such as mean (S - T)²", ha="center")


def draw_backward(axes: Axes) -> None:
    """Draw the backward pass: one product of the matrix that the forward pass kept with the features."""
    note(axes, 0, 1.3, "Backward: read X once, write its gradient once", fontsize=12, weight="bold")
    arrow(axes, (10, 2.5), (10, 1.1))
    note(axes, 10.15, 1.8, "keep M")
    matrix(axes, 9.35, 0.1, 1.3, SQUARE, GRADIENT, "M")
    note(axes, 10.85, 0.55, "N x N", fontsize=9)
    arrow(axes, (9.25, 0.55), (NARROW + 0.1, 0.55), "one product with the features, without a normalized copy of X")
    matrix(axes, 0, 0.1, NARROW, SQUARE, GRADIENT, "dX = M X")


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(10.4, 4.3), dpi=110)
    axes = figure.subplots()
    draw_forward(axes)
    draw_backward(axes)
    axes.set(xlim=(-0.1, 12.1), ylim=(0, 5.0))
    axes.axis("off")
    return figure


def describe(figure: Figure) -> str:
    """Return where which text stands in the figure."""
    texts = figure.axes[0].texts
    return "\n".join("{:.4g} {:.4g} {}".format(*text.get_position(), text.get_text()) for text in texts)


def main() -> None:
    """Write the figure to docs/images."""
    figure = draw()
    figure.savefig(TARGET, bbox_inches="tight", facecolor="white")
    write_description(TARGET, describe(figure))
    print(TARGET)


if __name__ == "__main__":
    main()

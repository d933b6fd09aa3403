"""Print and plot what a rank receives in a step of the loss, and how long that takes by a model, up to 1,024 ranks.

    python -m tools.bytes_over_ranks --plot docs/images/bytes-over-ranks.png

Bytes are those of `icsd.ops.distributed.Problem`, whose formulas a test compares with the bytes on the wire. Times are
a model, not a measurement: bytes over the bandwidth of a link plus operations over the rate of an H100, by the numbers
that their makers publish.
"""

import argparse
from pathlib import Path

from icsd.losses import KL
from icsd.ops.distributed import Cost, Problem
from tools.descriptions import write_description

RANKS = [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
SAMPLES, DIMS = 8, [65536, 262144]  # of a rank; student and teacher
LINK = 50e9  # bytes a second: InfiniBand NDR, 400 Gbit/s
OPERATIONS = 67e12  # a second: an H100 SXM in float32
TITLE = f"kl, {SAMPLES} samples on each rank, {DIMS[0]:,} and {DIMS[1]:,} features"


def cost_of(schedule: str, ranks: int) -> Cost:
    """Return the cost of a schedule."""
    return Problem(KL(), [SAMPLES] * ranks, DIMS).costs()[schedule]


def seconds_of(cost: Cost) -> float:
    """Return the time by the model."""
    return cost.received / LINK + cost.operations / OPERATIONS


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| ranks | slices: received | gather: received | slices: time (model) | gather: time (model) |",
        "|---|---|---|---|---|",
    ]
    for ranks in RANKS[::3]:
        costs = [cost_of(schedule, ranks) for schedule in ("slices", "gather")]
        cells = [f"{cost.received / 1e6:,.1f} MB" for cost in costs]
        cells += [f"{1e3 * seconds_of(cost):,.2f} ms" for cost in costs]
        lines.append(f"| {ranks:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def describe() -> str:
    """Return the title and some of the numbers of the image."""
    return f"{TITLE}\n\n{table()}"


def plot(path: Path) -> None:
    """Draw bytes and modeled times of two schedules."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for schedule in ("slices", "gather"):
        costs = [cost_of(schedule, ranks) for ranks in RANKS]
        axes[0].plot(RANKS, [cost.received / 1e6 for cost in costs], "o-", label=schedule)
        axes[1].plot(RANKS, [1e3 * seconds_of(cost) for cost in costs], "o-", label=schedule)
    for axis, title, unit in ((axes[0], "Received by a rank", "MB"), (axes[1], "Time by a model, not measured", "ms")):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(RANKS[::3])
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_major_formatter(f"{{x:,g}} {unit}")
        axis.set(xlabel="ranks", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(TITLE)
    figure.savefig(path, dpi=110)
    write_description(path, describe())


def main() -> None:
    """Print the table, and draw the plot if a file is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="image to write")
    options = parser.parse_args()
    print(table())
    if options.plot:
        plot(options.plot)


if __name__ == "__main__":
    main()

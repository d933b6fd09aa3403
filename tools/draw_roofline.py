"""Print and draw a model of the operator's speed on GPUs, from their published peak rates.

    python -m tools.draw_roofline --output docs/images/roofline.png

Nothing is measured. The bytes and flops are those of `benchmarks.ceilings.floor_seconds`; `tests/cuda/test_traffic.py`
checks in the emulator that the kernels read X and Y once and write the gradient once. The model does not say which part
of a peak rate a kernel reaches.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.ceilings import Ceilings, floor_seconds
from benchmarks.plots import STYLE
from icsd.ops.regimes import sample_flops
from tools.descriptions import write_description

# NVIDIA's data sheets (SXM modules; dense rates). float32 goes through three tf32 products.
DEVICES = {
    "A100": Ceilings(2.04e12, {torch.float32: 156e12 / 3, torch.bfloat16: 312e12}),
    "H100": Ceilings(3.35e12, {torch.float32: 495e12 / 3, torch.bfloat16: 989e12}),
    "B200": Ceilings(8.0e12, {torch.float32: 1.1e15 / 3, torch.bfloat16: 2.25e15}),
}
COLORS = {"A100": "#0072B2", "H100": "#D55E00", "B200": "#009E73"}
SAMPLES = (8, 16, 32, 64, 128, 256, 512)
DIM = 65536
TITLE = "A model from published peak rates, not a measurement"


def intensity(samples: int, dtype: torch.dtype) -> float:
    """Return the flops per byte of forward + backward where student and teacher have the same dim."""
    return sample_flops(samples, [DIM, DIM]) / (4 * dtype.itemsize * samples * DIM)


def table() -> str:
    """Return a table in Markdown: modeled times of forward + backward of `kl`; `*` marks those that flops bound."""
    lines = ["| N x D | dtype | flops / byte | " + " | ".join(DEVICES) + " |", "|---|---|---|" + "---|" * len(DEVICES)]
    for dtype in (torch.float32, torch.bfloat16):
        for samples in SAMPLES:
            cells = []
            for device in DEVICES.values():
                seconds = floor_seconds(samples, DIM, DIM, dtype, "kl", device)
                bound = "*" if intensity(samples, dtype) > device.gemm_rate[dtype] / device.copy_bandwidth else ""
                cells.append(f"{seconds * 1e6:.0f} µs{bound}")
            name = str(dtype).removeprefix("torch.")
            row = [f"{samples} x {DIM:,}", name, f"{intensity(samples, dtype):.0f}", *cells]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def describe() -> str:
    """Return the title and the numbers of the image."""
    return f"{TITLE}\n\n{table()}"


def draw(path: Path) -> None:
    """Draw the rooflines of both dtypes with the operator's shapes on them."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
        for axis, dtype in zip(axes, (torch.float32, torch.bfloat16), strict=True):
            _draw_dtype(axis, dtype)
        axes[0].set_ylabel("attainable Tflop/s (model)")
        axes[0].legend(loc="upper left")
        figure.suptitle(TITLE)
        figure.savefig(path)
        plt.close(figure)
    write_description(path, describe())


def _draw_dtype(axis: Axes, dtype: torch.dtype) -> None:
    shapes = [intensity(samples, dtype) for samples in SAMPLES]
    for name, device in DEVICES.items():
        ridge = device.gemm_rate[dtype] / device.copy_bandwidth
        least, most = 0.7 * shapes[0], 1.4 * shapes[-1]
        line = [least, min(max(ridge, least), most), most]
        axis.plot(line, _attainable(line, device, dtype), color=COLORS[name], label=name)
        axis.plot(shapes, _attainable(shapes, device, dtype), "o", color=COLORS[name], markersize=4)
    for samples, x in zip(SAMPLES, shapes, strict=True):
        axis.annotate(f"N {samples}", (x, 0.02), xycoords=("data", "axes fraction"), ha="center")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("flops per byte, forward + backward")
    axis.set_title("float32, as three tf32 products" if dtype == torch.float32 else "bfloat16")


def _attainable(intensities: list[float], device: Ceilings, dtype: torch.dtype) -> list[float]:
    """Return the highest rates in Tflop/s at the given numbers of flops per byte."""
    return [min(x * device.copy_bandwidth, device.gemm_rate[dtype]) / 1e12 for x in intensities]


def main() -> None:
    """Print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("roofline.png"), help="image to write (%(default)s)")
    options = parser.parse_args()
    print(table())
    draw(options.output)


if __name__ == "__main__":
    main()

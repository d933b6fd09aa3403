"""A model, not a measurement: the operator under the published ceilings of GPUs.

    python -m benchmarks.roofline --out docs/images/roofline.png

Prints a table and draws it. Bytes and flops are those of `benchmarks.ceilings.floor_seconds`;
`tests/cuda/test_traffic.py` counts in the emulator that the kernels read X and Y once and write the gradient once. What
a kernel reaches of a ceiling is not modeled, and no GPU has been measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import FuncFormatter

from benchmarks.ceilings import Ceilings, floor_seconds
from benchmarks.plots import STYLE
from icsd.ops.regimes import sample_flops

# NVIDIA's data sheets (SXM modules; dense rates). float32 goes through three tf32 products.
DEVICES = {
    "A100": Ceilings(2.04e12, {torch.float32: 156e12 / 3, torch.bfloat16: 312e12}),
    "H100": Ceilings(3.35e12, {torch.float32: 495e12 / 3, torch.bfloat16: 989e12}),
    "B200": Ceilings(8.0e12, {torch.float32: 1.1e15 / 3, torch.bfloat16: 2.25e15}),
}
COLORS = {"A100": "#0072B2", "H100": "#D55E00", "B200": "#009E73"}
SAMPLES = (8, 16, 32, 64, 128, 256, 512)
FEATURES = 65536


def intensity(samples: int, dtype: torch.dtype) -> float:
    """Flops per byte of forward + backward with student and teacher of the same width."""
    return sample_flops(samples, [FEATURES, FEATURES]) / (4 * dtype.itemsize * samples * FEATURES)


def table() -> str:
    """Model times of forward + backward of `kl` in Markdown, `*` where flops bind and not bytes."""
    lines = ["| N x D | dtype | flops / byte | " + " | ".join(DEVICES) + " |", "|---|---|---|" + "---|" * len(DEVICES)]
    for dtype in (torch.float32, torch.bfloat16):
        for samples in SAMPLES:
            cells = []
            for device in DEVICES.values():
                seconds = floor_seconds(samples, FEATURES, FEATURES, dtype, "kl", device)
                bound = "*" if intensity(samples, dtype) > device.gemm_rate[dtype] / device.copy_bandwidth else ""
                cells.append(f"{seconds * 1e6:.0f} µs{bound}")
            name = str(dtype).removeprefix("torch.")
            row = [f"{samples} x {FEATURES:,}", name, f"{intensity(samples, dtype):.0f}", *cells]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Draw the rooflines of both dtypes with the operator's shapes on them."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, layout="constrained")
        for axis, dtype in zip(axes, (torch.float32, torch.bfloat16), strict=True):
            ends = (0.7 * intensity(SAMPLES[0], dtype), 1.4 * intensity(SAMPLES[-1], dtype))
            for name, device in DEVICES.items():
                ridge = device.gemm_rate[dtype] / device.copy_bandwidth
                points = [ends[0], min(max(ridge, ends[0]), ends[1]), ends[1]]
                attainable = [min(x * device.copy_bandwidth, device.gemm_rate[dtype]) / 1e12 for x in points]
                axis.plot(points, attainable, color=COLORS[name], label=name)
                shapes = [intensity(samples, dtype) for samples in SAMPLES]
                axis.plot(
                    shapes,
                    [min(x * device.copy_bandwidth, device.gemm_rate[dtype]) / 1e12 for x in shapes],
                    "o",
                    color=COLORS[name],
                    markersize=4,
                )
            for samples in SAMPLES:
                axis.annotate(
                    f"N {samples}", (intensity(samples, dtype), 0.02), xycoords=("data", "axes fraction"), ha="center"
                )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_xlabel("flops per byte, forward + backward")
            axis.set_title("float32, as three tf32 products" if dtype == torch.float32 else "bfloat16")
        axes[0].set_ylabel("attainable Tflop/s (model)")
        axes[0].legend(loc="upper left")
        figure.suptitle("A model from published ceilings, not a measurement")
        figure.savefig(path)
        plt.close(figure)


def main() -> None:
    """Print the table and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("roofline.png"), help="image to write")
    options = parser.parse_args()
    print(table())
    draw(options.out)


if __name__ == "__main__":
    main()

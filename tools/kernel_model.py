"""Print a model of the CUDA C++ kernels' time on an H100, made from their machine code.

    python -m tools.kernel_model

Nothing is measured. For sample space, with a student and its teacher of the same dim, it takes for each pass over the
features the longest of three times:

* memory: each feature is read once, and each gradient written once, at 90 % of the peak bandwidth;
* tensor cores: the matrix instructions of `tests/cuda/loops.csv` at the peak rate of their type;
* issue: the instructions of the inner loop, and COPY for each asynchronous copy of 16 bytes by a warp, at one a clock
  for each of the four parts of a multiprocessor.

To these it adds LAUNCH for each kernel. The time of the kernels on N x N matrices beyond that, cache misses of tiles
that are read again, and waiting for latencies are not modeled; expect the truth to be up to twice as long.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import NamedTuple

LOOPS = Path(__file__).parents[1] / "tests" / "cuda" / "loops.csv"

# NVIDIA's data sheet of the H100 SXM.
BANDWIDTH = 0.9 * 3.35e12
MULTIPROCESSORS, CLOCK = 132, 1.755e9
WARPS_PER_CLOCK = 4 * MULTIPROCESSORS * CLOCK  # instructions a second
# Clocks of a matrix instruction on a part of a multiprocessor: 1,024 and 2,048 products of tf32 and 16-bit numbers.
MATRIX_CLOCKS = 4

COPY = 20  # instructions, assumed: addresses, bounds and the copy
LAUNCH = 1.5e-6  # seconds, assumed
LAUNCHES = 4  # forward + backward

SHAPES = ((16, 8192), (16, 65536), (64, 131072), (128, 65536), (256, 65536))


class Product(NamedTuple):
    """A pass of a kernel.

    Attributes:
        steps: The products of 32 x 32 elements of a warp, 8 features deep in float32 and 16 in bfloat16.
        copies: Asynchronous copies of 16 bytes, by whole warps.
        bytes: Moved from and to memory.
        kernel: The row of loops.csv.
        matrix: Matrix instructions of a step.
    """

    steps: float
    copies: float
    bytes: float
    kernel: str
    matrix: int

    def seconds(self) -> dict[str, float]:
        """Return the time that each resource takes."""
        of = _loops()[self.kernel]
        instructions = self.steps * self.matrix * of["instructions"] / of["matrix"] + self.copies * COPY
        return {
            "memory": self.bytes / BANDWIDTH,
            "tensor cores": self.steps * self.matrix * MATRIX_CLOCKS / WARPS_PER_CLOCK,
            "issue": instructions / WARPS_PER_CLOCK,
        }


def gram(samples: int, dim: int, itemsize: int) -> Product:
    """Return the Gram matrices of two stages."""
    largest = 128 if samples <= 128 else 96
    tiles = math.ceil(samples / largest)
    tile = math.ceil(samples / tiles / 32) * 32
    along, diagonal, others = tile // 32, tiles, tiles * (tiles - 1) // 2
    warp_tiles = diagonal * along * (along + 1) / 2 + others * along**2
    lines = 2 * dim * itemsize / 128
    rows = diagonal * tile + others * 2 * tile
    element = "float" if itemsize == 4 else "bfloat16"
    kernel = f"gram_tensor<{element}, 2, {4 if tile == 32 else 1}>"
    matrix = 24 if itemsize == 4 else 8
    return Product(warp_tiles * lines * 4, rows * lines * 8 / 32, 2 * samples * dim * itemsize, kernel, matrix)


def combine(samples: int, dim: int, itemsize: int) -> Product:
    """Return the gradient of the student."""
    rows, chunks, columns = math.ceil(samples / 32), math.ceil(samples / 32), dim / 32
    depth, blocks = (8 if itemsize == 4 else 16), math.ceil(samples / 128)
    copies = blocks * samples * dim * itemsize / 16 / 32
    element = "float" if itemsize == 4 else "bfloat16"
    return Product(
        rows * columns * chunks * 32 / depth,
        copies,
        2 * samples * dim * itemsize,
        f"combine_tensor<{element}>",
        24 if itemsize == 4 else 16,
    )


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| N x D | dtype | Gram | gradient | forward + backward |", "|---|---|---|---|---|"]
    for samples, dim in SHAPES:
        for name, itemsize in (("float32", 4), ("bfloat16", 2)):
            cells, total = [], LAUNCHES * LAUNCH
            for product in (gram(samples, dim, itemsize), combine(samples, dim, itemsize)):
                bound, seconds = max(product.seconds().items(), key=lambda item: item[1])
                cells.append(f"{seconds * 1e6:.1f} µs ({bound})")
                total += seconds
            lines.append(f"| {samples} x {dim:,} | {name} | {' | '.join(cells)} | {total * 1e6:.0f} µs |")
    return "\n".join(lines)


def _loops() -> dict[str, dict[str, int]]:
    with LOOPS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["architecture"] == "90"]
    return {row["kernel"]: {key: int(row[key]) for key in ("instructions", "matrix")} for row in rows}


if __name__ == "__main__":
    print(table())

"""Print a model of the CUDA C++ kernels' time on an H100, made from their machine code.

    python -m tools.kernel_model

Nothing is measured. For a student and its teacher of the same dim, it takes for each pass the longest of three times:

* memory: each feature is read once and each gradient written once, and so is each N x N matrix that a kernel reads or
  writes, at 90 % of the peak bandwidth;
* tensor cores: the matrix instructions of `tests/cuda/loops.csv` at the peak rate of their type;
* issue: the instructions of the inner loop, and those assumed below for copies and conversions, at one a clock for each
  of the four parts of a multiprocessor.

To these it adds LAUNCH for each kernel. Cache misses of tiles that are read again, waiting for latencies and, below
WHOLE samples, the kernels on N x N matrices are not modeled; expect the truth to be up to twice as long.
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

COPY = 20  # instructions of an asynchronous copy of 16 bytes by a warp, assumed: addresses, bounds and the copy
FLUSH = 32  # instructions that add the short sums of a warp's tile of 32 x 32
CONVERT = 8  # instructions for each element that a thread loads, converts or stores, assumed
LAUNCH = 1.5e-6  # seconds, assumed
WHOLE = 1000  # samples from which on the Gram kernel writes whole matrices
RESIDENT = 300  # samples up to which the matrix of a gradient stays in shared memory

SHAPES = ((16, 8192), (16, 65536), (64, 131072), (128, 65536), (256, 65536))
LARGE = (4096, 512)  # kl
TALL = (8192, 128)  # mse in feature space


class Pass(NamedTuple):
    """A pass of a kernel.

    Attributes:
        bytes: Moved from and to memory.
        matrix: Matrix instructions of all warps.
        instructions: All instructions of all warps.
        idle: The part of the multiprocessors' time in which they have no block.
    """

    bytes: float
    matrix: float = 0
    instructions: float = 0
    idle: float = 0

    def seconds(self) -> dict[str, float]:
        """Return the time that each resource takes."""
        busy = WARPS_PER_CLOCK * (1 - self.idle)
        return {
            "memory": self.bytes / BANDWIDTH,
            "tensor cores": self.matrix * MATRIX_CLOCKS / busy,
            "issue": self.instructions / busy,
        }

    def bound(self) -> tuple[str, float]:
        """Return the resource that takes longest, and its time."""
        return max(self.seconds().items(), key=lambda item: item[1])


def gram(samples: int, dim: int, itemsize: int) -> Pass:
    """Return the Gram matrices of two stages."""
    largest = 128 if samples <= 128 else 96
    tiles = math.ceil(samples / largest)
    tile = math.ceil(samples / tiles / 32) * 32
    along, diagonal, others = tile // 32, tiles, tiles * (tiles - 1) // 2
    warp_tiles = diagonal * along * (along + 1) / 2 + others * along**2
    lines = 2 * dim * itemsize / 128
    copies = (diagonal * tile + others * 2 * tile) * lines * 8 / 32
    single = warp_tiles == 1  # four warps share the steps of a line, and leave out what is above the diagonal
    kernel = f"gram_tensor<{_element(itemsize)}, 2, {4 if single else 1}>"
    matrix = (14 if single else 24) if itemsize == 4 else 6 if single else 8
    steps = warp_tiles * lines * 4
    flushes = warp_tiles * lines * (1 if itemsize == 4 else 1 / 4)
    written = 0.0
    if samples >= WHOLE:
        written = 2 * samples**2
    instructions = steps * _step(kernel, matrix) + flushes * FLUSH + copies * COPY + written / 32 * CONVERT
    return Pass(2 * samples * dim * itemsize + 4 * written, steps * matrix, instructions)


def combine(samples: int, dim: int, itemsize: int) -> Pass:
    """Return the gradient of the student."""
    rows, chunks, columns = math.ceil(samples / 32), math.ceil(samples / 32), dim / 32
    depth, blocks = (8 if itemsize == 4 else 16), math.ceil(samples / 128)
    steps, matrix = rows * columns * chunks * 32 / depth, 24 if itemsize == 4 else 16
    copies = blocks * samples * dim * itemsize / 16 / 32
    conversions = 0.0
    if samples > RESIDENT:  # the matrix is copied for each 128 features, and becomes two bfloat16 terms
        elements = math.ceil(dim / 128) * samples**2
        copies += elements * 4 / 16 / 32
        conversions = elements / 32 if itemsize == 2 else 0
    instructions = steps * _step(f"combine_tensor<{_element(itemsize)}>", matrix) + copies * COPY
    instructions += rows * columns * chunks * FLUSH + conversions * CONVERT
    read = 4 * samples**2 if samples >= WHOLE else 0
    return Pass(2 * samples * dim * itemsize + read, steps * matrix, instructions)


def rows(samples: int) -> Pass:
    """Return both kernels on the rows of whole matrices: they read K of both stages, the second one writes A."""
    return Pass(5 * 4 * samples**2)


def feature_space(samples: int, dim: int, itemsize: int, multiprocessors: int = MULTIPROCESSORS) -> dict[str, Pass]:
    """Return the passes of `mse` in feature space, whose float64 kernels find nothing to do."""
    along, chunks = math.ceil(dim / 64), math.ceil(samples / 32)
    symmetric = along * (along + 1) // 2
    tiles, diagonal = 2 * symmetric + along**2, 2 * along
    splits = _splits(tiles, samples, multiprocessors)
    element, matrix = _element(itemsize), 24 if itemsize == 4 else 16
    copy = 32 * 64 * itemsize / 16 / 32  # of a chunk of 32 samples x 64 features, by warps
    conversions = 4 * 16 * CONVERT  # of such a chunk, by the four warps of a block: 16 elements a thread
    steps = tiles * chunks * 4 * 4
    covariances = steps * _step(f"covariance_tensor<{element}>", matrix) + tiles * chunks * (4 * FLUSH + conversions)
    covariances += (2 * tiles - diagonal) * chunks * copy * COPY
    features, partials = 2 * samples * dim * itemsize, splits * 3 * dim**2 * 4
    blocks = math.ceil(samples / 64)
    # Chunks of 64 samples x 32 features, and of 32 x 128 elements of the matrix.
    of_blocks = blocks * math.ceil(dim / 128) * 2 * math.ceil(dim / 32)
    backward = of_blocks * (32 * _step(f"feature_backward_tensor<{element}>", 24) + 8 * FLUSH)
    backward += of_blocks * ((copy + 32 * 128 * 4 / 16 / 32) * COPY + conversions)  # samples are scaled
    return {
        "norms": Pass(features),
        "matrices": Pass(features, steps * matrix, covariances, _idle(splits * tiles, multiprocessors)),
        "sums": Pass(2 * partials),
        "gradient": Pass(1.5 * features, of_blocks * 32 * 24, backward, _idle(blocks, multiprocessors)),
    }


def _splits(tiles: int, samples: int, multiprocessors: int) -> int:
    """Return the splits of the samples, chosen as in csrc/cuda/kernels/covariance.cu."""
    chunks = math.ceil(samples / 64)

    def cost(splits: int) -> int:
        return 64 * math.ceil(tiles * splits / multiprocessors) * math.ceil(chunks / splits) + tiles * splits

    most = min(math.ceil(2 * multiprocessors / tiles), math.ceil(samples / 256))
    best = min(range(1, most + 1), key=cost)
    return math.ceil(chunks / math.ceil(chunks / best))


def launches(samples: int) -> int:
    """Return the launches of sample space, forward + backward."""
    return 4 + (samples >= WHOLE)


FEATURE_LAUNCHES = 5


def table() -> str:
    """Return the tables in Markdown."""
    lines = ["| N x D | dtype | Gram | gradient | forward + backward |", "|---|---|---|---|---|"]
    for shape in SHAPES:
        for name, itemsize in (("float32", 4), ("bfloat16", 2)):
            passes = [gram(*shape, itemsize), combine(*shape, itemsize)]
            lines.append(_line(shape, name, passes, launches(shape[0])))
    lines += ["", "| N x D | dtype | Gram | rows | gradient | forward + backward |", "|---|---|---|---|---|---|"]
    for name, itemsize in (("float32", 4), ("bfloat16", 2)):
        passes = [gram(*LARGE, itemsize), rows(LARGE[0]), combine(*LARGE, itemsize)]
        lines.append(_line(LARGE, f"{name}, `kl`", passes, launches(LARGE[0])))
    lines += ["", "| N x D | dtype | norms | D x D matrices | their sums | gradient | forward + backward |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, itemsize in (("float32", 4), ("bfloat16", 2)):
        passes = [*feature_space(*TALL, itemsize).values()]
        lines.append(_line(TALL, f"{name}, `mse`", passes, FEATURE_LAUNCHES))
    return "\n".join(lines)


def _line(shape: tuple[int, int], name: str, passes: list[Pass], kernels: int) -> str:
    bounds = [of.bound() for of in passes]
    cells = [f"{seconds * 1e6:.1f} µs ({bound})" for bound, seconds in bounds]
    total = kernels * LAUNCH + sum(seconds for _, seconds in bounds)
    return f"| {shape[0]:,} x {shape[1]:,} | {name} | {' | '.join(cells)} | {total * 1e6:.0f} µs |"


def _element(itemsize: int) -> str:
    return "float" if itemsize == 4 else "bfloat16"


def _idle(blocks: int, multiprocessors: int) -> float:
    return 1 - blocks / (math.ceil(blocks / multiprocessors) * multiprocessors)


def _step(kernel: str, matrix: int) -> float:
    """Return the instructions of a step, which has some matrix instructions."""
    of = _loops()[kernel]
    return of["instructions"] / of["matrix"] * matrix


def _loops() -> dict[str, dict[str, int]]:
    with LOOPS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["architecture"] == "90"]
    return {row["kernel"]: {key: int(row[key]) for key in ("instructions", "matrix")} for row in rows}


if __name__ == "__main__":
    print(table())

"""The table of docs/kernels.md: what the CUDA C++ and the Triton kernels take of a device, side by side.

python -m benchmarks.kernels                          prints it, from tables that the tests hold the kernels to
python -m benchmarks.kernels --write docs/kernels.md  puts it there
python -m benchmarks.kernels --pin                    makes those tables anew first: compiles every kernel and counts
                                                      what it reads and writes; needs nvcc and triton, but no GPU
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.occupancy import MULTIPROCESSORS, occupancy, reserved

ROOT = Path(__file__).parents[1]
CUDA, TRITON = ROOT / "tests" / "cuda", ROOT / "tests" / "triton"
MARKS = "<!-- python -m benchmarks.kernels --write docs/kernels.md -->\n", "<!-- end -->\n"
AMD = ["gfx90a", "gfx942", "gfx950", "gfx1100"]


class Case(NamedTuple):
    """A distillation of one student: N samples of D features, as the teacher has."""

    regime: str
    loss: str
    dtype: str
    samples: int
    features: int


CASES = [
    Case("sample", "kl", "float32", 64, 2048),
    Case("sample", "kl", "bfloat16", 64, 2048),
    Case("feature", "mse", "float32", 512, 256),
    Case("streamed", "kl", "float32", 512, 256),
]
PASSES = ("forward", "backward")
TEMPERATURES = [0.1, 0.1, 1.0]  # of kl, and whether the diagonal takes part


class Row(NamedTuple):
    """A kernel of one pass.

    Attributes:
        kernel: Its name.
        bytes: Of features and gradients, read and written, for each feature of the stages it touches.
        instructions: The matrix instruction, by architecture; "" for none.
        needs: Registers of a thread, bytes of shared memory of a block, occupancy; by architecture.
    """

    kernel: str
    bytes: float
    instructions: dict[str, str]
    needs: dict[str, tuple[int, int, float]]

    def cells(self, architectures: list[str]) -> list[str]:
        """As Markdown."""
        present = [name for name in architectures if name in self.needs]
        groups: dict[str, list[str]] = {}
        for name in present:
            groups.setdefault(self.instructions[name], []).append(name)
        instructions = [
            instruction + (f" ({', '.join(names)})" if len(groups) > 1 else "")
            for instruction, names in groups.items()
            if instruction
        ]
        moved = f"{self.bytes:g}" if self.bytes else "–"
        return [f"`{self.kernel}`", moved, "; ".join(instructions) or "–", *map(self._cell, architectures)]

    def _cell(self, architecture: str) -> str:
        if architecture not in self.needs:
            return ""
        registers, shared, filled = self.needs[architecture]
        return f"{registers} · {round(shared / 1024, 1):g} · {filled:.0%}"


def cuda_rows(case: Case, name: str) -> list[Row]:
    """Of the CUDA C++ kernels, which are others where there are no tensor cores for them."""
    with (CUDA / "launches.csv").open() as file:
        launches = [row for row in csv.DictReader(file) if _is_of(row, case, name)]
    with (CUDA / "resources.csv").open() as file:
        resources = {row["kernel"]: row for row in csv.DictReader(file)}
    rows = []
    for launch in launches:
        tensor_cores = launch["architecture"] != "75"
        usage = resources[launch["kernel"]]
        # The table has the most of all architectures, with what the system takes on some.
        shared = max(0, int(usage["shared"]) - reserved(90)) + int(launch["shared"])
        needs = {}
        for capability in MULTIPROCESSORS:
            if (capability >= 80) == tensor_cores:
                registers = int(usage[f"sm_{capability}"])
                filled = occupancy(capability, registers, shared, int(launch["threads"]) // 32)
                needs[str(capability)] = registers, shared, filled
        instructions = dict.fromkeys(needs, launch["instruction"])
        twin = next((row for row in rows if row.kernel == launch["kernel"]), None)
        if twin is None:
            rows.append(Row(launch["kernel"], float(launch["bytes"]), instructions, needs))
        else:
            twin.needs.update(needs)
            twin.instructions.update(instructions)
    return rows


def triton_rows(case: Case, name: str) -> list[Row]:
    """Of the Triton kernels."""
    with (TRITON / "launches.csv").open() as file:
        launches = [row for row in csv.DictReader(file) if _is_of(row, case, name)]
    _, *resources = json.loads((TRITON / "resources.json").read_text())
    rows = []
    for launch in launches:
        of_kernel = {
            row["architecture"]: row
            for row in resources
            if (row["regime"], row["dtype"], row["kernel"]) == (case.regime, case.dtype, launch["kernel"])
        }
        instructions = {architecture: row["instruction"] for architecture, row in of_kernel.items()}
        needs = {name: (row["registers"], row["shared"], row["occupancy"]) for name, row in of_kernel.items()}
        rows.append(Row(launch["kernel"], float(launch["bytes"]), instructions, needs))
    return rows


def _is_of(row: dict[str, str], case: Case, name: str) -> bool:
    return [row[field] for field in Case._fields] == [str(value) for value in case] and row["pass"] == name


def table(architectures: list[str], languages: dict) -> Iterator[str]:
    """Lines of Markdown: by regime, pass and language, a row for each kernel, of those that differ by the dtype."""
    names = [f"sm_{name}" if name.isdigit() else name for name in architectures]
    head = ["pass", "", "kernel", "bytes", "matrix instruction", *names]
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    seen = set()
    for case in CASES:
        for name in PASSES:
            label = f"{case.regime}, {case.dtype}, {name}"
            for language, rows_of in languages.items():
                beginning = language
                for row in rows_of(case, name):
                    cells = row.cells(architectures)
                    if (case.regime, name, *cells) not in seen:
                        seen.add((case.regime, name, *cells))
                        yield f"| {' | '.join([label, beginning, *cells])} |"
                        label = beginning = ""


def page() -> str:
    """The generated part of docs/kernels.md."""
    nvidia = table([str(capability) for capability in MULTIPROCESSORS], {"CUDA C++": cuda_rows, "Triton": triton_rows})
    amd = table(AMD, {"Triton": triton_rows})
    return "\n".join([*nvidia, "", "AMD:", "", *amd, ""])


def write(path: Path) -> None:
    """Put the table between the marks of a page."""
    before, rest = path.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(before + MARKS[0] + page() + MARKS[1] + after)


def pin() -> None:
    """Make the tables that all this is read from anew."""
    from benchmarks import machine_code

    scripts = {CUDA / "resources.py": "0", CUDA / "launches.py": "0", TRITON / "launches.py": "1"}
    for script, interpret in scripts.items():
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": interpret}
        subprocess.run([sys.executable, script], env=environment, check=True)
    machine_code.pin(TRITON / "resources.json")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pin", action="store_true", help="make the tables it is read from anew")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put it between the marks of a page")
    options = parser.parse_args()
    if options.pin:
        pin()
    if options.write:
        write(options.write)
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()

"""Write the tables of docs/kernels.md: what the CUDA C++ and the Triton kernels need of a device, side by side.

python -m tools.kernel_table                          print the tables
python -m tools.kernel_table --write docs/kernels.md  write them into the page
python -m tools.kernel_table --pin                    first renew the files that the tables are made from: compile all
                                                      kernels and count their reads and writes (needs nvcc and triton,
                                                      but no GPU)

Those files lie beside the tests that hold the kernels to them: `resources.*` and `launches.csv` in `tests/cuda` and
`tests/triton`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tools.kernel_cases import CASES, PASSES, Case
from tools.occupancy import MULTIPROCESSORS, occupancy, reserved

ROOT = Path(__file__).parents[1]
CUDA, TRITON = ROOT / "tests" / "cuda", ROOT / "tests" / "triton"
MARKS = "<!-- python -m tools.kernel_table --write docs/kernels.md -->\n", "<!-- end -->\n"
NVIDIA = [str(capability) for capability in MULTIPROCESSORS]
FAST_DOUBLE = ("80", "86", "89", "90", "100")  # have matrix instructions in float64; 86 and 89 share the code of 80
TITLES = {"sample": "Sample space", "feature": "Feature space", "streamed": "Streamed"}  # of the regimes
AMD = ["gfx90a", "gfx942", "gfx950", "gfx1100"]
# The scripts that renew the files, and the value of TRITON_INTERPRET that each of them needs.
SCRIPTS = {
    CUDA / "resources.py": "0",
    CUDA / "launches.py": "0",
    TRITON / "machine_code.py": "0",
    TRITON / "interpreted_launches.py": "1",
}


class Row(NamedTuple):
    """A kernel of one pass.

    Attributes:
        kernel: The name.
        bytes: Bytes of features and gradients that are read and written, per feature of the tensors that are touched.
        instructions: The matrix instruction by architecture; "" for none.
        needs: Registers of a thread, bytes of shared memory of a block, and occupancy, by architecture.
    """

    kernel: str
    bytes: float
    instructions: dict[str, str]
    needs: dict[str, tuple[int, int, float]]

    def cells(self, architectures: list[str]) -> list[str]:
        """Return the cells of a line of the table."""
        moved = f"{self.bytes:g}" if self.bytes else "–"
        return [f"`{self.kernel}`", moved, self._instruction_cell(architectures), *map(self._cell, architectures)]

    def _instruction_cell(self, architectures: list[str]) -> str:
        groups: dict[str, list[str]] = {}
        for name in architectures:
            if name in self.needs:
                groups.setdefault(self.instructions[name], []).append(name)
        instructions = [
            instruction + (f" ({', '.join(names)})" if len(groups) > 1 else "")
            for instruction, names in groups.items()
            if instruction
        ]
        return "; ".join(instructions) or "–"

    def _cell(self, architecture: str) -> str:
        if architecture not in self.needs:
            return ""
        registers, shared, filled = self.needs[architecture]
        return f"{registers} · {round(shared / 1024, 1):g} · {filled:.0%}"


RowsOf = Callable[[Case, str], list[Row]]


def cuda_rows(case: Case, pass_: str) -> list[Row]:
    """Return the CUDA C++ kernels of a pass; devices without tensor cores for them have other kernels."""
    resources = {row["kernel"]: row for row in _read_csv(CUDA / "resources.csv")}
    rows: dict[str, Row] = {}
    for launch in _launches(CUDA, case, pass_):
        needs = _cuda_needs(launch, resources[launch["kernel"]])
        everywhere = not launch["instruction"].startswith("DMMA")
        instructions = {name: launch["instruction"] if everywhere or name in FAST_DOUBLE else "" for name in needs}
        row = rows.setdefault(launch["kernel"], Row(launch["kernel"], float(launch["bytes"]), {}, {}))
        row.needs.update(needs)
        row.instructions.update(instructions)
    return list(rows.values())


def triton_rows(case: Case, pass_: str) -> list[Row]:
    """Return the Triton kernels of a pass."""
    _, *resources = json.loads((TRITON / "resources.json").read_text())
    rows = []
    for launch in _launches(TRITON, case, pass_):
        key = case.regime, case.dtype, launch["kernel"]
        usage = {row["architecture"]: row for row in resources if (row["regime"], row["dtype"], row["kernel"]) == key}
        instructions = {architecture: row["instruction"] for architecture, row in usage.items()}
        needs = {
            architecture: (row["registers"], row["shared"], row["occupancy"]) for architecture, row in usage.items()
        }
        rows.append(Row(launch["kernel"], float(launch["bytes"]), instructions, needs))
    return rows


def tables(architectures: list[str], languages: dict[str, RowsOf]) -> dict[str, list[str]]:
    """Return the lines of a table in Markdown for each pass, by the title of the pass.

    The kernels of another dtype are left out where all their cells are the same.
    """
    names = [f"sm_{name}" if name.isdigit() else name for name in architectures]
    head = ["backend", "kernel", "bytes", "matrix instruction", *names]
    found, seen = {}, set()
    for case in CASES:
        for pass_ in PASSES:
            lines = found[f"{TITLES[case.regime]}, {case.dtype}, {pass_}"] = [_line(head), "|---" * len(head) + "|"]
            for language, rows_of in languages.items():
                for row in rows_of(case, pass_):
                    cells = row.cells(architectures)
                    if (case.regime, pass_, *cells) not in seen:
                        seen.add((case.regime, pass_, *cells))
                        lines.append(_line([language, *cells]))
    return found


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def page() -> str:
    """Return the generated part of docs/kernels.md: for each pass a table of NVIDIA's devices and one of AMD's."""
    amd = tables(AMD, {"Triton": triton_rows})
    lines = []
    for title, nvidia in tables(NVIDIA, {"CUDA C++": cuda_rows, "Triton": triton_rows}).items():
        lines += [f"### {title}", "", *nvidia, "", *amd[title], ""]
    return "\n".join(lines)


def write(path: Path) -> None:
    """Replace the text between the marks of a page by the tables."""
    before, rest = path.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(before + MARKS[0] + page() + MARKS[1] + after)


def pin() -> None:
    """Renew the files that the tables are made from."""
    for script, interpret in SCRIPTS.items():
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": interpret}
        subprocess.run([sys.executable, script], env=environment, check=True)


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _launches(folder: Path, case: Case, pass_: str) -> list[dict[str, str]]:
    wanted = [*map(str, case), pass_]
    return [
        row for row in _read_csv(folder / "launches.csv") if [row[key] for key in (*Case._fields, "pass")] == wanted
    ]


def _cuda_needs(launch: dict[str, str], usage: dict[str, str]) -> dict[str, tuple[int, int, float]]:
    """Return the needs by architecture of those that run this kernel: with tensor cores, or sm_75."""
    tensor_cores = launch["architecture"] != "75"
    # The file has the largest value of all architectures, with the memory that the system reserves on some of them.
    shared = max(0, int(usage["shared"]) - reserved(90)) + int(launch["shared"])
    needs = {}
    for capability in MULTIPROCESSORS:
        if (capability >= 80) == tensor_cores:
            registers = int(usage[f"sm_{capability}"])
            filled = occupancy(capability, registers, shared, int(launch["threads"]) // 32)
            needs[str(capability)] = registers, shared, filled
    return needs


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pin", action="store_true", help="first renew the files that the tables are made from")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables into this page")
    options = parser.parse_args()
    if options.pin:
        pin()
    if options.write:
        write(options.write)
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()

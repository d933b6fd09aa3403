"""The resources that the native module's kernels take, and their inner loops, read from its machine code.

`python tests/cuda/resources.py` writes resources.csv and loops.csv anew: after a change that is meant to change them.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

from icsd import _native

TABLE = Path(__file__).with_name("resources.csv")
LOOPS = Path(__file__).with_name("loops.csv")
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
LOOP_ARCHITECTURES = ("80", "90", "100", "120")  # whose machine code is read


class Loop(NamedTuple):
    """The instructions of a warp in a kernel's largest block of matrix instructions: some steps of a product.

    Attributes:
        instructions: All of them.
        matrix: Those of tensor cores.
        ldmatrix: Loads of matrices from shared memory.
        shared: Other loads from shared memory.
        generic: Loads through generic addresses.
    """

    instructions: int
    matrix: int
    ldmatrix: int
    shared: int
    generic: int


class Usage(NamedTuple):
    """The resources of a kernel on an architecture: a thread's registers and stack bytes, static shared memory."""

    registers: int
    stack: int
    shared: int


def find_cuobjdump() -> str | None:
    """NVIDIA's reader of machine code: of the toolkit, or of triton's wheel."""
    path = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if path is None and spec is not None:
        bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        path = str(bundled) if bundled.exists() else None
    return path


def dump(*options: str) -> str:
    """Return the output of cuobjdump for the native module, with demangled names."""
    command = [find_cuobjdump(), *options, _native.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def short(name: str) -> str:
    """`icsd::cuda::f<__half, 2>(icsd::cuda::Arguments<__half>)` as `f<half, 2>`."""
    name = re.sub(r"^void |icsd::(cuda::)?", "", name)
    return re.sub(r"__(nv_)?", "", name[: name.index(">(") + 1]).replace(" >", ">")


def usage() -> dict[tuple[str, str], Usage]:
    """By (kernel, architecture)."""
    found = {}
    architecture = kernel = ""
    for line in dump("-res-usage").splitlines():
        if match := re.match(r"arch = sm_(\d+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (.*):$", line):
            kernel = short(match[1])
        elif match := re.match(r"  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:0 ", line):
            found[kernel, architecture] = Usage(*map(int, match.groups()))
    return found


@cache
def instructions(architecture: str) -> dict[str, str]:
    """The machine code of every kernel."""
    parts = re.split(r"\n\s*Function : (.*)\n", dump("-sass", "-arch", f"sm_{architecture}"))
    return {short(name): code for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def loop(code: str) -> Loop | None:
    """Return the largest block of a kernel's machine code, or None if it has no matrix instructions.

    A block ends at a branch or a barrier, or where a branch leads to.
    """
    lines = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", code)]
    jumps = (re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text) for _, text in lines)
    targets = {int(jump[1], 16) for jump in jumps if jump}
    blocks: list[list[str]] = [[]]
    for at, text in lines:
        if at in targets:
            blocks.append([])
        name = re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]
        blocks[-1].append(name)
        if name.split(".")[0] in {"BRA", "EXIT", "RET", "BAR"}:
            blocks.append([])

    def count(block: list[str], *names: str) -> int:
        return sum(name.split(".")[0] in names for name in block)

    largest = max(blocks, key=lambda block: count(block, "HMMA", "DMMA"))
    if not count(largest, "HMMA", "DMMA"):
        return None
    kinds = (("HMMA", "DMMA"), ("LDSM",), ("LDS",), ("LD",))
    return Loop(len(largest), *(count(largest, *names) for names in kinds))


def loops(architecture: str) -> dict[str, Loop]:
    """Return the inner loop of every kernel that has matrix instructions."""
    found = {kernel: loop(code) for kernel, code in instructions(architecture).items()}
    return {kernel: of for kernel, of in sorted(found.items()) if of}


def pinned_loops() -> dict[tuple[str, str], Loop]:
    """The table's, by (kernel, architecture)."""
    with LOOPS.open() as file:
        rows = list(csv.DictReader(file))
    return {(row["kernel"], row["architecture"]): Loop(*(int(row[name]) for name in Loop._fields)) for row in rows}


def pinned() -> dict[tuple[str, str], Usage]:
    """The table's."""
    with TABLE.open() as file:
        return {
            (row["kernel"], architecture): Usage(int(row[f"sm_{architecture}"]), 0, int(row["shared"]))
            for row in csv.DictReader(file)
            for architecture in ARCHITECTURES
        }


def main() -> None:
    """Write the tables."""
    found = usage()
    if missing := set(ARCHITECTURES) - {architecture for _, architecture in found}:
        raise SystemExit(f"error: the native module is not built for sm_{', sm_'.join(sorted(missing))}; build it anew")
    kernels = sorted({kernel for kernel, _ in found})
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", "shared", *(f"sm_{architecture}" for architecture in ARCHITECTURES)])
        for kernel in kernels:
            rows = [found[kernel, architecture] for architecture in ARCHITECTURES]
            writer.writerow([kernel, max(row.shared for row in rows), *(row.registers for row in rows)])
    with LOOPS.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["kernel", "architecture", *Loop._fields])
        for architecture in LOOP_ARCHITECTURES:
            for kernel, of in loops(architecture).items():
                writer.writerow([kernel, architecture, *of])


if __name__ == "__main__":
    main()

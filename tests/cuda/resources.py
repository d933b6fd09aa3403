"""The resources that the native module's kernels take, read from its machine code.

`python tests/cuda/resources.py` writes resources.csv anew: after a change that is meant to change it.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from icsd import _native

TABLE = Path(__file__).with_name("resources.csv")
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")


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


def instructions(architecture: str) -> dict[str, str]:
    """The machine code of every kernel."""
    parts = re.split(r"\n\s*Function : (.*)\n", dump("-sass", "-arch", f"sm_{architecture}"))
    return {short(name): code for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def pinned() -> dict[tuple[str, str], Usage]:
    """The table's."""
    with TABLE.open() as file:
        return {
            (row["kernel"], architecture): Usage(int(row[f"sm_{architecture}"]), 0, int(row["shared"]))
            for row in csv.DictReader(file)
            for architecture in ARCHITECTURES
        }


def main() -> None:
    """Write the table."""
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


if __name__ == "__main__":
    main()

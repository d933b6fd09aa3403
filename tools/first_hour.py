"""Try the kernels out on a machine with an NVIDIA GPU: `python -m tools.first_hour`, from a checkout.

It builds for that GPU, checks every kernel, measures, and runs the tests of a GPU and compute-sanitizer, within nine
minutes; each step has its own time limit. It needs torch, numpy, pytest, pybind11, ninja and nvcc, but no network.
Results are appended to a file of JSON lines, which `python -m benchmarks gpu FILE` shows as tables, failures first.

With `ICSD_EMULATED=1` it does the same in the emulator of tests/cuda, with few cases.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchmarks import records
from tools.gpu_device import EMULATED, ROOT

SECONDS = 540  # of all steps
GRACE = 10  # for a step that is told to stop


class Step(NamedTuple):
    """A command with a time limit.

    Attributes:
        name: Its name.
        seconds: Its limit.
        command: The program and its arguments.
        variables: Environment variables.
    """

    name: str
    seconds: float
    command: Sequence[str]
    variables: Mapping[str, str] = MappingProxyType({})


def phases(file: Path) -> list[list[Step]]:
    """Return the steps. Those of one phase run at the same time; nothing runs beside the measurements."""
    python, record = sys.executable, ["--record", str(file)]
    checks = [python, "-m", "tools.gpu_checks", str(file)]
    tests = [python, "-m", "pytest", "-p", "tools.pytest_records", "-p", "no:cacheprovider", *record]
    if EMULATED:
        build = [python, "-c", "import sys; sys.path.insert(0, 'tests/cuda'); import harness; harness.build_native()"]
        some = ["tests/cuda/test_emulated_accuracy.py", "-k", "zero_rows and 16"]
        return [
            [Step("build", 300, build)],
            [Step("checks", 100, checks)],
            [Step("measurements", 100, [python, "-m", "benchmarks.gpu", str(file)])],
            [Step("tests", 100, [*tests, *some]), Step("memcheck", 100, [*checks, "--one-of-each"])],
        ]
    build = [python, "setup.py", "build_ext", "--inplace"]
    triton = ["tests/triton/test_gpu.py", "tests/gpu/test_offloaded_accuracy.py", "-k", "not cuda and not autotuned"]
    return [
        [Step("build", 150, build)],
        [Step("checks", 60, checks)],
        [Step("measurements", 150, [python, "-m", "benchmarks.gpu", str(file)])],
        [
            Step("tests of streams, graphs and memory", 160, [*tests, "tests/gpu/test_device.py"]),
            *(
                Step(f"tests of {name}", 160, [*tests, f"tests/gpu/test_offloaded_{name}.py", "-k", "cuda"])
                for name in ("accuracy", "autograd", "family", "irregular", "lazy_tensors", "regimes")
            ),
            Step("tests of Triton", 160, [*tests, *triton]),
            *(Step(tool, 160, sanitized(tool, [*checks, "--one-of-each"]), UNCACHED) for tool in SANITIZERS),
        ],
    ]


SANITIZERS = ("memcheck", "racecheck")
# compute-sanitizer sees the bounds of allocations, and PyTorch's caching allocator puts many tensors into one.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def sanitized(tool: str, command: Sequence[str]) -> list[str]:
    """Return the command under a tool of compute-sanitizer."""
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all", *command]


def run(step: Step, file: Path, deadline: float) -> bool:
    """Run a step, append its record and return whether it succeeded."""
    limit = min(step.seconds, deadline - time.monotonic())
    begin = time.monotonic()
    status, output = _run(step, limit) if limit > 0 else ("out of time", "")
    seconds = time.monotonic() - begin
    print(f"{step.name}: {status}, {seconds:.0f} s", flush=True)
    tail = output[-2000:] if status != "passed" else output.strip().rpartition("\n")[2]
    records.append(file, "step", name=step.name, status=status, seconds=round(seconds, 1), output=tail)
    return status == "passed"


def _run(step: Step, limit: float) -> tuple[str, str]:
    if shutil.which(step.command[0]) is None:
        return "missing", f"{step.command[0]} is not on PATH"
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        | step.variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
        return "passed" if process.returncode == 0 else "failed", output
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then says how far it came
    try:
        output, _ = process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return "out of time", output


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/gpu.jsonl"), help="the file (%(default)s)")
    file = parser.parse_args(arguments).results.resolve()
    deadline = time.monotonic() + SECONDS
    records.append(file, "start", date=time.strftime("%Y-%m-%d %H:%M", time.gmtime()))
    passed = []
    for phase in phases(file):
        with ThreadPoolExecutor(len(phase)) as pool:
            passed += pool.map(lambda step: run(step, file, deadline), phase)
        if len(passed) == 1:
            if not passed[0]:
                break  # nothing was built
            records.append(file, "machine", **machine())
    print(f"written: {file}\nshow it by: python -m benchmarks gpu {file}")
    return int(not all(passed))


def machine() -> records.Record:
    """Return the names of device and software, found in a process of its own: this one does not touch the device."""
    script = (
        "import json, torch; from tools.gpu_device import open_device; "
        "print(json.dumps({'torch': torch.__version__, **open_device().describe()}))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"device": "unknown", "error": done.stderr[-500:]}
    return json.loads(done.stdout)


if __name__ == "__main__":
    sys.exit(main())

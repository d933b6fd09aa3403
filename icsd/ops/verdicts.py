"""The verdicts of `icsd.ops.tuning`: which backend is the fastest for a class of calls.

There is one JSON file for each environment, that is, for each device and the versions of what runs on it:

    {"environment": {"device": "...", "torch": "2.14.1", ...},
     "verdicts": {"mse, training, 2 x float32, 1 x 64 x 65536": {"backend": "cpu", "seconds": {"cpu": 0.002, ...}}}}

A file that cannot be read counts as absent. It is written as a whole, by the one process that holds its lock.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

from icsd.outputs import cache_folder, replacing


class Verdict(NamedTuple):
    """The result of one measurement.

    Attributes:
        backend: The name of the fastest backend.
        seconds: The time of a call by backend.
        refused: The reason for leaving a backend out, by backend.
    """

    backend: str
    seconds: dict[str, float]
    refused: dict[str, str]

    def __str__(self) -> str:
        times = [f"{name} {1e3 * time:.3g} ms" for name, time in self.seconds.items()]
        return "; ".join([f"{self.backend} ({', '.join(times)})", *(f"{k}: {v}" for k, v in self.refused.items())])


class Verdicts(dict[str, Verdict]):
    """The verdicts of one environment by class of calls, and their file.

    Attributes:
        path: The file.
        environment: All that a verdict depends on beside the call.
        tried: The classes that this process has tried to measure.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        super().__init__()
        self.environment = environment
        self.tried: set[str] = set()
        digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
        self.path = cache_folder() / "tuning" / f"{digest}.json"
        self.read()

    def read(self) -> None:
        """Take over what the file holds."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["environment"] == self.environment:
                self.update({key: _verdict(entry) for key, entry in content["verdicts"].items()})
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            _warn(f"{self.path} holds no verdicts that can be read ({one_line(error)}); `icsd tune` writes it anew")

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold the lock of the file if no other process does; yields whether a measurement may be made.

        In a folder that cannot be written to, measurements are made for this process alone.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.path.with_suffix(".lock"), timeout=0)
        held = True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            held = False
        except (OSError, NotImplementedError) as error:
            _warn(f"{self.path.parent} keeps no verdicts ({one_line(error)}); they are lost when this process ends")
        try:
            yield held
        finally:
            lock.release()

    def keep(self, key: str, verdict: Verdict) -> None:
        """Add a verdict and write all to the file. The lock must be held, and the file be read."""
        self[key] = verdict
        content = {"environment": self.environment, "verdicts": {k: v._asdict() for k, v in sorted(self.items())}}
        with suppress(OSError), replacing(self.path) as file:  # `locked` has told why a folder keeps nothing
            file.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _verdict(entry: dict) -> Verdict:
    verdict = Verdict(str(entry["backend"]), dict(entry["seconds"]), dict(entry["refused"]))
    if not all(isinstance(time, float) for time in verdict.seconds.values()):
        raise ValueError(f"times must be numbers, got {verdict.seconds}")
    return verdict


@lru_cache
def verdicts_of(device: torch.device, threads: int) -> Verdicts:
    """Return the verdicts of a device, on the CPU for a number of threads, as they were when first asked for."""
    return Verdicts(_environment(device, threads))


def _environment(device: torch.device, threads: int) -> dict[str, str]:
    """Describe a device and the versions of what runs on it."""
    found = {"torch": str(torch.__version__)} | {name: _version(name) for name in ("icsd", "triton")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.major}.{properties.minor}"
        found["runtime"] = str(torch.version.cuda or torch.version.hip)
        return found
    settings = [f"{name}={os.environ[name]}" for name in ("ICSD_CPU_ISA",) if name in os.environ]
    found["device"] = ", ".join([_processor(), torch.backends.cpu.get_cpu_capability(), *settings])
    return found | {"threads": str(threads)}


@lru_cache
def _processor() -> str:
    with suppress(OSError):
        if model := re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return model[1]
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


@lru_cache(maxsize=1024)
def call_class(loss: str, training: bool, center: bool, shapes: Sequence, dtypes: Sequence) -> str:
    """Name the class of a call: the calls that share a verdict.

    Groups, samples from 16 on, and the sum of the dims of all stages from 1,024 on, are rounded up to powers of four.
    So the smaller last batch of an epoch is at most one class more.

    Args:
        loss: The name of the loss.
        training: True if a backward pass follows.
        center: True if the mean sample is subtracted.
        shapes: The shape of each stage.
        dtypes: The dtype of each stage.
    """
    *groups, samples, _ = shapes[-1]
    kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    sizes = (math.prod(groups), max(16, samples), max(1024, sum(shape[-1] for shape in shapes)))
    return ", ".join(
        [
            f"{loss}{' centered' * center}",
            "training" if training else "inference",
            " + ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)),
            " x ".join(str(4 ** (((size - 1).bit_length() + 1) // 2)) for size in sizes),
        ]
    )


def one_line(error: Exception) -> str:
    """Return an error as a part of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)

"""The choice of the fastest backend by measurement.

The registry's order decides unless a verdict says otherwise. `icsd tune` measures classes of calls and keeps verdicts
on disk (`icsd.ops.verdicts`); calls follow those of their class. With `ICSD_TUNE=1` the first call of a class without
a verdict measures, too; with `ICSD_TUNE=0` no verdict is followed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from icsd.losses import BUILT_IN, Loss
from icsd.ops import registry
from icsd.ops.library import is_ordinary, is_transformed
from icsd.ops.regimes import KEPT_BYTES
from icsd.ops.verdicts import Verdict, Verdicts, call_class, one_line, verdicts_of
from icsd.outputs import cache_folder

FEWEST_SAMPLES = 4  # the losses of fewer are 0 or nearly so, and rounding decides about them
ROUNDS = 7
FAIR_ROUNDS = 3  # after these, what is hopeless is timed no more; before, another process may have been in the way
ROUND_SECONDS = 2e-3  # a round repeats short calls for so long
MOST_REPEATS = 50
HOPELESS = 2.0  # times as long as the fastest
GAIN = 0.95  # a backend replaces the one that the order prefers if it takes at most this part of its time


@cache
def setting() -> str:
    """Return the value of `ICSD_TUNE`: "0", "1", or "" if it is not set.

    Raises:
        ValueError: It has another value.
    """
    value = os.environ.get("ICSD_TUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(
            f"ICSD_TUNE is {value!r}: set 1 to measure calls, 0 to ignore measurements, or unset it to follow those "
            "that `icsd tune` has made"
        )
    return value


def is_idle() -> bool:
    """Return whether no call has to look for a verdict: none is wanted, or none is kept on disk."""
    value = os.environ.get("ICSD_TUNE", "")
    return value == "0" or (value == "" and not os.path.isdir(cache_folder() / "tuning"))


idle = is_idle()  # found out once, so that calls take no time for it


class Call(NamedTuple):
    """The arguments of `Backend.distill`."""

    stages: Sequence[Tensor]
    weights: Sequence[float]
    loss: Loss
    eps: float
    center: bool

    @property
    def training(self) -> bool:
        """True if a backward pass may follow."""
        return torch.is_grad_enabled() and any(stage.requires_grad for stage in self.stages)

    @property
    def key(self) -> str:
        """The class of the call."""
        shapes, dtypes = (tuple(getattr(stage, name) for stage in self.stages) for name in ("shape", "dtype"))
        return call_class(self.loss.name, self.training, self.center, shapes, dtypes)


def fastest(preferred: registry.Backend, requested: str | None, call: Call) -> registry.Backend:
    """Return the backend for a call: the one of its verdict if none is asked for by name, or else the preferred one."""
    if torch.compiler.is_compiling() or registry.name_of(requested) is not None or setting() == "0":
        return preferred
    if type(call.loss) not in BUILT_IN:  # code of the user, which may draw random numbers or count its calls
        return preferred
    *_, teacher = stages = call.stages
    if teacher.device.type not in ("cpu", "cuda") or teacher.shape[-2] < FEWEST_SAMPLES:
        return preferred
    verdicts = verdicts_of(teacher.device, torch.get_num_threads())
    if not verdicts and setting() != "1":
        return preferred
    if torch.are_deterministic_algorithms_enabled() or not is_ordinary(*stages) or is_transformed(stages):
        return preferred
    key = call.key
    if setting() == "1" and key not in verdicts and key not in verdicts.tried and not _is_capturing(teacher.device):
        tune(verdicts, call)
    name = verdicts[key].backend if key in verdicts else preferred.name
    if name == preferred.name:
        return preferred
    return next((backend for backend in candidates(call) if backend.name == name), preferred)


def tune(verdicts: Verdicts, call: Call, again: bool = False) -> bool:
    """Measure a call and keep the verdict, unless there is one already.

    Args:
        verdicts: The verdicts of the device of the call.
        call: The call. Its tensors are not touched: random ones of the same shapes take their place.
        again: True if an earlier verdict is replaced.

    Returns:
        True, or False if another process is measuring: two would disturb each other.
    """
    global idle
    idle = False
    key = call.key
    verdicts.tried.add(key)
    with verdicts.locked() as held:
        if held:
            verdicts.read()
            if again or key not in verdicts:
                # A thread of its own has no hooks for saved tensors, modes or streams of the caller.
                with ThreadPoolExecutor(1) as thread:
                    verdict = thread.submit(measure, call, call.training).result()
                if verdict is not None:
                    verdicts.keep(key, verdict)
    return held


def measure(call: Call, training: bool) -> Verdict | None:
    """Time the candidates that agree, the forward pass and in training the backward pass. None if no candidate runs."""
    device = call.stages[-1].device
    refused, runs, expected = {}, {}, None
    with torch.set_grad_enabled(training):
        try:
            call = call._replace(stages=_stand_ins(call.stages))
        except RuntimeError:  # memory does not suffice
            return None
        for backend in sorted(candidates(call), key=lambda backend: backend.name != "reference"):
            run = partial(_run, backend, call, training)
            try:
                found = run()
            except Exception as error:  # of any compiler, driver or kernel
                refused[backend.name] = f"fails ({one_line(error)})"
                continue
            expected = expected or found  # by the definition, where it is a candidate
            if _agree(found, expected):
                runs[backend.name] = run
            else:
                refused[backend.name] = "gives another result"
        seconds = _time(runs, device)
    names = [backend.name for backend in candidates(call) if backend.name in seconds]
    if not names:
        return None
    best = min(names, key=seconds.__getitem__)
    chosen = best if seconds[best] <= GAIN * seconds[names[0]] else names[0]
    return Verdict(chosen, {name: seconds[name] for name in names}, refused)


def candidates(call: Call) -> list[registry.Backend]:
    """Return the backends that apply. Where N x N matrices would take much memory, they must not be kept."""
    *groups, samples, _ = call.stages[-1].shape
    large = 8 * len(call.stages) * math.prod(groups) * samples * (samples + 1) > KEPT_BYTES
    return [
        backend
        for backend in registry.applicable(call.stages)
        if not large or "streamed" in getattr(backend, "regimes", {}).get(call.loss.name, ())
    ]


def now(device: torch.device) -> float:
    """Return the time in seconds at which the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _time(runs: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Return the least time of each function over rounds that take turns."""
    seconds, repeats = {}, dict.fromkeys(runs, 1)
    for number in range(ROUNDS):
        for name, run in runs.items():
            if number >= FAIR_ROUNDS and seconds[name] > HOPELESS * min(seconds.values()):
                continue
            start = now(device)
            for _ in range(repeats[name]):
                run()
            took = (now(device) - start) / repeats[name]
            seconds[name] = min(took, seconds.get(name, took))
            repeats[name] = max(1, min(MOST_REPEATS, int(ROUND_SECONDS / max(took, 1e-9))))
    return seconds


def _run(backend: registry.Backend, call: Call, training: bool) -> list[Tensor]:
    """Return the loss of each group and the gradients."""
    value = backend.distill(*call)
    wanted = [stage for stage in call.stages if training and stage.requires_grad]
    return [value.detach(), *(torch.autograd.grad(value.sum(), wanted) if wanted else ())]


def _stand_ins(stages: Sequence[Tensor]) -> list[Tensor]:
    """Return random features like the stages, without drawing from the user's random numbers.

    They are eight numbers over and over, and a little noise: the similarities are as far apart as those of eight
    features, so a loss loses few digits by cancellation, and every feature counts.
    """
    device = stages[-1].device
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)

    def stand_in(stage: Tensor) -> Tensor:
        *others, dim = stage.shape
        x = normal(stage.shape, dtype=stage.dtype).mul_(0.5)
        x[..., : dim // 8 * 8].unflatten(-1, (-1, 8)).add_(normal((*others, 1, 8), dtype=stage.dtype))
        return x.requires_grad_(stage.requires_grad)

    return [stand_in(stage) for stage in stages]


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether results differ by rounding alone, that of their dtype."""
    for a, b in zip(found, expected, strict=True):
        tolerance = 1e-4 if b.dtype in (torch.float32, torch.float64) else 2**-6
        if not (a.float() - b.float()).norm() <= tolerance * b.float().norm():
            return False
    return True


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

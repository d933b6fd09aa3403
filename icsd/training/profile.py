"""Where the time of a training step goes, part by part.

The methods of the parts carry labels while the profiler looks. Autograd numbers every operation, and its backward node
carries the number, so the time of the backward pass goes to the part that the operation was in.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from icsd.training.memory import peak_memory
from icsd.training.trainer import Trainer

_MARK, _BACKWARD, _OPTIMIZER = "icsd: ", "autograd::engine::evaluate_function", "Optimizer."
_DATA, _REST = "data", "losses and the rest"


@dataclass(frozen=True)
class Profile:
    """What was found."""

    seconds: float
    """Of a step, data included, without the profiler."""
    images: int
    """Per step."""
    shares: dict[str, float]
    """By part, of the time of a step; they sum to 1."""
    peak_memory: int
    """In bytes; see `icsd.training.memory.peak_memory`."""

    def table(self) -> str:
        """The shares, one a line, and the step as a whole."""
        width = max(map(len, self.shares))
        lines = [f"{name:<{width}}  {share:>7.2%}" for name, share in self.shares.items()]
        rate = self.images / self.seconds
        whole = f"a step: {self.seconds:.3f} s, {rate:.3g} images/s, at most {self.peak_memory / 2**20:,.0f} MiB"
        return "\n".join([*lines, "", whole])


def profile_training(trainer: Trainer, batches: Iterator[Any], steps: int) -> Profile:
    """Take one step to warm up, some to time, and as many to look into.

    Args:
        trainer: Trains meanwhile.
        batches: The batches of each step, enough for 2 * steps + 1 of them.
        steps: How many are timed.

    Returns:
        Shares of time and peak memory.
    """
    on_gpu = trainer.device.type == "cuda"
    trainer.step(next(batches))
    start = time.perf_counter()
    for _ in range(steps):
        losses = trainer.step(next(batches))
    torch.stack(list(losses.values())).sum().item()  # waits for the GPU
    seconds = (time.perf_counter() - start) / steps
    with _labels(trainer), profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as record:
        for _ in range(steps):
            with record_function(_MARK + _DATA):
                step_batches = next(batches)
            trainer.step(step_batches)
    times = _time_by_part(record.events(), on_gpu)
    order = [*dict.fromkeys(part for part, *_ in _parts(trainer)), "optimizers", _DATA]
    shares = {part: times[part] / sum(times.values()) for part in sorted(times, key=order.index)}
    images = trainer.config.batch_size * trainer.config.accumulate
    return Profile(seconds, images, shares, peak_memory(trainer.device))


def _parts(trainer: Trainer) -> list[tuple[str, Any, str]]:
    """Each part's name, and an object with a method that does its work; the innermost one counts."""
    parts = [("text encoder", trainer.model.text_encoder, "forward"), ("generator", trainer.model.generator, "forward")]
    for side, discriminator in zip(trainer.resolutions, trainer.discriminators, strict=True):
        parts += [
            (f"discriminator {side}", discriminator, method) for method in ("features", "conditional", "unconditional")
        ]
    blocks = (trainer.generator_distillation, trainer.discriminator_distillation)
    parts += [("distillation", block, "forward") for block in blocks if block]
    parts += [("matching", trainer, "_matching")] if trainer.damsm is None else [("DAMSM", trainer.damsm, "forward")]
    parts += [("average", trainer.ema, "update_parameters")]
    return [*parts, (_REST, trainer, "step")]


@contextmanager
def _labels(trainer: Trainer) -> Iterator[None]:
    """Labels the parts' methods on their objects, where they hide those of the classes."""
    parts = _parts(trainer)
    hidden = [(owner, method, vars(owner).get(method)) for _, owner, method in parts]
    for part, owner, method in parts:
        setattr(owner, method, _labeled(part, getattr(owner, method)))
    try:
        yield
    finally:
        for owner, method, before in hidden:
            if before is None:
                delattr(owner, method)
            else:
                setattr(owner, method, before)


def _labeled(part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(_MARK + part):
            return method(*arguments, **options)

    return call


def _time_by_part(events: Iterable[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """Each event's own time goes to the part it is in, and a backward node's to that of its forward operation."""
    times: dict[str, float] = defaultdict(float)
    part_of: dict[int, str] = {}  # by the id of an event
    numbered: dict[int, str] = {}  # by autograd's number
    latest = _REST
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        part = part_of.get(event.cpu_parent.id) if event.cpu_parent else None
        if event.name.startswith(_MARK):
            part = event.name.removeprefix(_MARK)
        elif event.name.startswith(_OPTIMIZER):
            part = "optimizers"
        elif event.name.startswith(_BACKWARD):
            part = latest = numbered.get(event.sequence_nr, latest)  # gradients are stored right after they are made
        elif part and event.sequence_nr >= 0:
            numbered[event.sequence_nr] = part
        if part:
            part_of[event.id] = part
            times[part] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return times

"""The share of each part in the time of a training step.

The step marks its parts (see `icsd.training.parts`). Autograd numbers every operation, and its backward node carries
the number, so the time of the backward pass goes to the part that the operation belongs to.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from icsd.training.memory import peak_memory
from icsd.training.parts import DATA, MARK, OPTIMIZERS, REST, part
from icsd.training.trainer import Trainer

_BACKWARD, _OPTIMIZER = "autograd::engine::evaluate_function", "Optimizer."


@dataclass(frozen=True)
class Profile:
    """The time and the memory of a training step."""

    seconds: float
    """Time of a step, data included, without the profiler."""
    images: int
    """Images per step."""
    operations: int
    """Floating-point operations of the convolutions and matrix products of the first step; 0 if networks are compiled,
    which hides them."""
    shares: dict[str, float]
    """Share of each part in the time of a step; they sum to 1."""
    peak_memory: int
    """Peak memory in bytes; see `icsd.training.memory.peak_memory`."""

    def table(self) -> str:
        """Return the shares, one a line, and the step as a whole."""
        width = max(map(len, self.shares))
        lines = [f"{name:<{width}}  {share:>7.2%}" for name, share in self.shares.items()]
        rate = self.images / self.seconds
        whole = f"a step: {self.seconds:.3f} s, {rate:.3g} images/s, at most {self.peak_memory / 2**20:,.0f} MiB"
        return "\n".join([*lines, "", whole, *self._arithmetic()])

    def _arithmetic(self) -> list[str]:
        """Return the line about floating-point operations."""
        giga = self.operations / 1e9
        rate = f"{giga:,.3g} GFLOP a step, {giga / self.seconds:,.3g} GFLOP/s"
        return [f"convolutions and matrix products: {rate}"] if self.operations else []


def profile_training(trainer: Trainer, batches: Iterator[Any], steps: int) -> Profile:
    """Take one step to warm up and to count operations, some steps to time, and as many under the profiler.

    Args:
        trainer: The trainer, which trains meanwhile.
        batches: The batches of each step, enough for 2 * steps + 1 of them.
        steps: Number of steps that are timed.

    Returns:
        Shares of time and peak memory.
    """
    on_gpu = trainer.device.type == "cuda"
    with FlopCounterMode(display=False) as counter:
        trainer.step(next(batches))
    start = time.perf_counter()
    for _ in range(steps):
        losses = trainer.step(next(batches))
    torch.stack(list(losses.values())).sum().item()  # waits for the GPU
    seconds = (time.perf_counter() - start) / steps
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as record:
        for _ in range(steps):
            with part(DATA):
                step_batches = next(batches)
            trainer.step(step_batches)
    times = _time_by_part(record.events(), on_gpu)
    order = [*trainer.parts(), REST, OPTIMIZERS, DATA]
    shares = {name: times[name] / sum(times.values()) for name in sorted(times, key=order.index)}
    images = trainer.config.batch_size * trainer.config.accumulate
    operations = 0 if trainer.config.compile else counter.get_total_flops()
    return Profile(seconds, images, operations, shares, peak_memory(trainer.device))


def _time_by_part(events: Iterable[FunctionEvent], on_gpu: bool) -> dict[str, float]:
    """Add the own time of each event to its part, and that of a backward node to the part of its forward operation."""
    times: dict[str, float] = defaultdict(float)
    part_of: dict[int, str] = {}  # by the id of an event
    numbered: dict[int, str] = {}  # by autograd's number
    latest = REST
    for event in sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end)):
        name = part_of.get(event.cpu_parent.id) if event.cpu_parent else None
        if event.name.startswith(MARK):
            name = event.name.removeprefix(MARK)
        elif event.name.startswith(_OPTIMIZER):
            name = OPTIMIZERS
        elif event.name.startswith(_BACKWARD):
            name = latest = numbered.get(event.sequence_nr, latest)  # gradients are stored right after they are made
        elif name and event.sequence_nr >= 0:
            numbered[event.sequence_nr] = name
        if name:
            part_of[event.id] = name
            times[name] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    return times

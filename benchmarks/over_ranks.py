"""Time a training step on several ranks beside the same step on one, and measure the memory of the loss over ranks.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.over_ranks step --config configs/birds.yaml --batch-size 8
    torchrun --standalone --nproc-per-node 4 -m benchmarks.over_ranks memory

`step` takes the step of a configuration with the same batch in turns: on the first rank alone while the others wait,
and on all ranks together. Without --config, the networks are the default ones, those of the emoji demo. Every process
computes on one thread. The ratio of the times is that of a pair of turns, every second pair in reverse order. It says
something only where every rank has a core of its own. The ratio of the processor times, of the busiest rank, says how
much work the ranks do beyond an even part, on a busy machine, too.

`memory` gives the peak of the busiest rank in a forward and backward pass beyond its features and its gradient, by
schedule. Linux reports it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

import torch

import icsd
from icsd.cli.configuration import add_configuration
from icsd.cli.parser import Parser
from icsd.models import build_text_encoder
from icsd.ops.distributed import force_schedule
from icsd.team import Team, joined
from icsd.training.batches import Batch
from icsd.training.config import TrainConfig
from icsd.training.trainer import Trainer

CAPTION = "a woman with dark skin, firefighter"
PROCESS = Path("/proc/self")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = Parser(prog="python -m benchmarks.over_ranks", description=__doc__)
    add = parser.add_argument
    add("what", type=Literal["step", "memory"], help="what to measure")
    add("--turn", type=int, default=5, help="steps of a turn")
    add("--turns", type=int, default=8, help="pairs of turns")
    add("--shape", type=str, default="64x524288", help="samples of all ranks x dim")
    add_configuration(parser, arguments, TrainConfig, resume=None)
    parser.use_dashes()
    options = parser.instantiate(parser.parse_args(arguments))
    what, turn, turns, shape = (options.pop(name) for name in ("what", "turn", "turns", "shape"))
    options.pop("config")
    config = TrainConfig(**{**options, "device": "cpu", "log_every": 1000})
    torch.set_num_threads(1)
    with joined() as team:
        if what == "step":
            time_steps(team, config, turn, turns)
        else:
            measure_memory(team, *map(int, shape.split("x")))


def time_steps(team: Team, config: TrainConfig, steps: int, turns: int) -> None:
    """Print the times of a step on one rank and on all."""
    together = step_of(config, team)
    alone = step_of(config, Team()) if team.leads else lambda: None
    for step in (alone, together):
        step()  # the first one warms up
    pairs = []
    for turn in range(turns):
        order = (alone, together)[:: 1 if turn % 2 == 0 else -1]
        taken = {step: timed(team, step, steps) for step in order}
        pairs.append((taken[alone], taken[together]))
    print(f"{team.size} ranks, a step of {config.batch_size} images, {turns} pairs of turns of {steps} steps, medians")
    for clock, name in enumerate(("time", "processor time of the busiest rank")):
        one, all_ranks = (1e3 * median(pair[k][clock] for pair in pairs) / steps for k in range(2))
        ratios = sorted(pair[0][clock] / pair[1][clock] for pair in pairs)
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(f"{name}: {one:.1f} ms on one, {all_ranks:.1f} ms on {team.size}, ratio {spread}")


def step_of(config: TrainConfig, team: Team) -> Callable[[], object]:
    """Return a function that takes a training step on the part of this rank in a batch."""
    torch.manual_seed(0)
    trainer = Trainer(config, build_text_encoder(config.text, [CAPTION]), team=team)
    batch_size, side = config.batch_size, config.generator.resolutions[-1]
    images = torch.rand(batch_size, 3, side, side).mul_(2).sub_(1)
    captions = [f"{CAPTION} {word}" for word in range(batch_size)]
    tokens = trainer.model.text_encoder.tokenizer(captions)
    batch = Batch.of(images, captions, list(range(batch_size)), tokens)
    batch.images = images[team.own(batch_size)]
    return lambda: trainer.step([batch])


def timed(team: Team, step: Callable[[], object], steps: int) -> tuple[float, float]:
    """Return the time of some steps until all ranks have taken them, and the processor time of the busiest rank."""
    team.any(False)  # waits for all ranks
    since, busy = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    busy = time.process_time() - busy
    team.any(False)
    return time.perf_counter() - since, max(team.gather(busy))


def measure_memory(team: Team, samples: int, dim: int) -> None:
    """Print the peak of the loss of the samples of all ranks by schedule."""
    batch = samples * dim * 4
    print(f"{team.size} ranks, {samples} x {dim} in float32, which is {batch / 2**20:,.0f} MiB for each stage")
    peaks = {schedule: peak_bytes(team, schedule, samples, dim) for schedule in ("gather", "slices")}
    for schedule, peak in peaks.items():
        print(f"{schedule}: {peak / 2**20:,.0f} MiB, {peak / peaks['gather']:.2f} of gather's")


def peak_bytes(team: Team, schedule: str, samples: int, dim: int) -> int:
    """Return the most bytes that a rank takes beyond features and gradient."""
    student, teacher = (torch.randn(samples // team.size, dim) for _ in range(2))
    student.requires_grad_().grad = torch.zeros_like(student)
    icsd.ops.empty_cache()
    team.any(False)
    (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    with force_schedule(schedule):
        icsd.similarity_distillation_loss(student, teacher, process_group=team.process_group).backward()
    return max(team.gather(resident("VmHWM") - before))


def resident(field: str) -> int:
    """Return a field of the status of this process in bytes."""
    lines = (PROCESS / "status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


if __name__ == "__main__":
    main()

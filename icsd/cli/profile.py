"""``icsd profile``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from icsd.cli.configuration import add_configuration
from icsd.cli.parser import Parser
from icsd.errors import InputError
from icsd.training.config import TrainConfig

DESCRIPTION = """Train for a few steps and say where their time goes: the share of each network, forward and backward,
of distillation, matching, optimizers, the averaged model and data, and the peak memory. Writes nothing. A configuration
file may hold every key of `icsd train`; those that say how long to train and what to write have no effect here.

Examples:

  icsd profile --config configs/emoji.yaml

  icsd profile --config configs/birds.yaml --data.name procedural-birds --data.root null --batch-size 4
      the networks of AttnGAN's resolutions (64, 128 and 256 pixels), on drawn birds"""


UNUSED = (
    *("steps", "output", "name", "loggers", "evaluate", "evaluate_every"),
    *("log_every", "sample_every", "checkpoint_every", "optimizer.schedule", "optimizer.warmup"),
)
"""Keys that a profile cannot heed: refused as options, accepted in files."""


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = "icsd profile [--config FILE] [--profile-steps N] [--KEY VALUE ...]"
    parser.description = DESCRIPTION
    parser.add_argument("--profile-steps", type=int, default=3, help="steps to time, and as many to look into")
    add_configuration(parser, arguments, TrainConfig, resume=None)
    for option in arguments:
        if option.startswith("--") and option[2:].split("=")[0].replace("-", "_") in UNUSED:
            raise InputError(
                f"`icsd profile` takes no {option.split('=')[0]}: it trains for --profile-steps steps only"
            )


def run(options: Namespace) -> int:
    """Profile."""
    from icsd.training.train import profile

    options.pop("config")
    steps = options.pop("profile_steps")
    if steps < 1:
        raise InputError(f"--profile-steps is {steps}: give at least 1")
    print(profile(TrainConfig(**options), steps).table())
    return 0

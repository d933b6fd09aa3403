"""``icsd profile``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from icsd.cli.parser import Parser
from icsd.errors import InputError
from icsd.training.config import TrainConfig

DESCRIPTION = """Train for a few steps and say where their time goes: the share of each network, forward and backward,
of distillation, matching, optimizers, the averaged model and data, and the peak memory. Writes nothing.

Examples:

  icsd profile --config configs/emoji.yaml

  icsd profile --config configs/birds.yaml --data.name procedural-birds --data.root null --batch_size 4
      the networks of the field's scale, on drawn birds"""


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = "icsd profile [--config FILE] [--profile_steps N] [--KEY VALUE ...]"
    parser.description = DESCRIPTION
    parser.add_argument("--config", action="config", metavar="FILE", help="YAML file with any of the keys below")
    parser.add_argument("--profile_steps", type=int, default=3, help="steps to time, and as many to look into")
    parser.add_class_arguments(TrainConfig)


def run(options: Namespace) -> int:
    """Profile."""
    from icsd.training.run import profile

    options.pop("config")
    steps = options.pop("profile_steps")
    if steps < 1:
        raise InputError(f"profile_steps is {steps}: give at least 1")
    print(profile(TrainConfig(**options), steps).table())
    return 0

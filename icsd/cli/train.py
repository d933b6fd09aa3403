"""``icsd train``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from icsd.cli.configuration import add_configuration
from icsd.cli.parser import Parser
from icsd.training.checkpoint import MODEL
from icsd.training.config import TrainConfig

DESCRIPTION = """Train a model: its run folder gets the resolved configuration, checkpoints, image grids, metrics and
TensorBoard curves, and at the end the attribute scores are printed.

Examples:

  icsd train --config configs/emoji.yaml
      the demo: emoji generated from sentences it has never seen

  icsd train --config configs/emoji.yaml --config configs/ablations/none.yaml
      the same without distillation between the stages

  icsd train --data.name folder --data.root photos --generator.resolutions [32,64]
      your own images, a .txt with captions beside each

  icsd train --resume runs/emoji-busts --steps 5000
      go on after Ctrl-C, or for longer

  icsd train --config configs/birds.yaml --dry-run
      what it would train, how fast and in how much memory, after two steps; writes nothing

  icsd train --config configs/flowers.yaml --config configs/ablations/none.yaml
      several files, each over those before it

  icsd train --config configs/emoji.yaml --batch-size 16 --print-config > mine.yaml
      write a configuration of your own

Every key of the configuration is an option below; the command line outranks the file, and the file the defaults."""


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = "icsd train [--config FILE] [--resume RUN] [--KEY VALUE ...]"
    parser.description = DESCRIPTION
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything, take two steps, say what a run takes; write nothing"
    )
    add_configuration(parser, arguments, TrainConfig, resume=MODEL)


def run(options: Namespace) -> int:
    """Train."""
    from icsd.training.train import dry_run, train

    resume = options.pop("resume")
    options.pop("config")
    run = dry_run if options.pop("dry_run") else train
    run(TrainConfig(**options), resume)
    return 0

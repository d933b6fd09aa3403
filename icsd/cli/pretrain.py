"""``icsd pretrain``."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from icsd.cli.configuration import add_configuration
from icsd.cli.parser import Parser
from icsd.training.checkpoint import ENCODERS
from icsd.training.config import PretrainConfig

DESCRIPTION = """Pretrain a text and an image encoder (DAMSM): each image should find its sentence among a batch's,
each sentence its image, and each word its region. The run folder gets the resolved configuration, metrics with the
R-precision of held-out pairs, and checkpoints, for `icsd train --damsm.checkpoint`.

Examples:

  icsd pretrain --config configs/pretrain/emoji.yaml
      minutes on the CPU: a small image network that learns from nothing

  icsd pretrain --data.name cub --data.root data/birds --image.weights inception_v3_google-0cc3c7bd.pth
      as published: Inception-v3 with ImageNet weights under learned projections; for a GPU

  icsd pretrain --resume runs/damsm-emoji-busts --steps 3000
      go on after Ctrl-C, or for longer

Every key of the configuration is an option below; the command line outranks the file, and the file the defaults."""


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = "icsd pretrain [--config FILE] [--resume RUN] [--KEY VALUE ...]"
    parser.description = DESCRIPTION
    add_configuration(parser, arguments, PretrainConfig, resume=ENCODERS)


def run(options: Namespace) -> int:
    """Pretrain."""
    from icsd.training.pretrain import pretrain

    resume = options.pop("resume")
    options.pop("config")
    pretrain(PretrainConfig(**options), resume)
    return 0

"""``icsd export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from icsd.cli.parser import Parser
from icsd.cli.sample import load_sampler

DESCRIPTION = """Write the generator of a trained model for other runtimes. The file takes noise and text features,
which `icsd.sampling.export.example_inputs` makes from sentences, and returns the images of every stage.

Examples:

  icsd export generator.pt2
      for torch.export.load, from the newest model below runs/

  icsd export generator.onnx --checkpoint runs/emoji-busts
      for ONNX runtimes; needs pip install -e ".[onnx]" in the checkout"""


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = "icsd export OUTPUT [options]"
    parser.description = DESCRIPTION
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="file to write, .pt2 or .onnx")
    parser.add_argument(
        "--checkpoint",
        type=Path | None,
        metavar="PATH",
        help="checkpoint, or run folder for its newest one; the newest model below runs/ by default",
    )


def run(options: Namespace) -> int:
    """Export."""
    from icsd.sampling.export import check_export, export_generator

    check_export(options.output)
    export_generator(load_sampler(options.checkpoint), options.output)
    print(options.output)
    return 0

"""``icsd export``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from icsd.cli.parser import Parser

DESCRIPTION = """Write the generator of a trained model for other runtimes. It takes noise and text features, which
`icsd.sampling.export.example_inputs` makes of sentences, and gives the images of every stage.

Examples:

  icsd export generator.pt2
      for torch.export.load, from the newest checkpoint below runs/

  icsd export generator.onnx --checkpoint runs/emoji-busts
      for ONNX runtimes; needs pip install "icsd[onnx]" """


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = "icsd export OUT [options]"
    parser.description = DESCRIPTION
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write, .pt2 or .onnx")
    parser.add_argument("--checkpoint", type=Path | None, metavar="PATH", help="or run folder; the newest in runs/")


def run(options: Namespace) -> int:
    """Export."""
    from icsd.sampling import Sampler
    from icsd.sampling.export import export_generator
    from icsd.training import checkpoint

    export_generator(Sampler.load(options.checkpoint or checkpoint.newest("runs").path), options.out)
    print(options.out)
    return 0

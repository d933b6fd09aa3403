"""Entry point of the ``icsd`` command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import icsd
from icsd.cli.parser import Parser
from icsd.errors import InputError

COMMANDS = {
    "train": "train a model from a configuration; leaves checkpoints, pictures and scores in a run folder",
    "sample": "paint sentences with a trained model",
    "doctor": "say what is installed, what was built, and what runs here",
    "data": "look at a captioned image set, or export it to a folder",
}

DESCRIPTION = """Text-to-image synthesis by a coarse-to-fine GAN with interstage cross-sample similarity distillation.

Begin with `icsd train --config configs/emoji.yaml`, then `icsd sample "a woman with dark skin, firefighter"`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command-line arguments; those of the process by default.

    Returns:
        The exit code: 0, 2 after an error that the user can correct, 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _run(arguments)
    except (InputError, OSError) as error:
        print(f"icsd: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("icsd: interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    parser = Parser(prog="icsd", description=DESCRIPTION, version=icsd.__version__)
    subcommands = parser.add_subcommands(dest="command")
    chosen = None
    for name, summary in COMMANDS.items():
        if arguments[:1] == [name]:  # the others stay unimported, and with them torch
            chosen = importlib.import_module(f"icsd.cli.{name}")
        subcommands.add_subcommand(name, chosen.parser(arguments[1:]) if arguments[:1] == [name] else Parser(), help=summary)
    if not arguments:
        parser.print_help()
        return 0
    namespace = parser.parse_args(arguments)
    return chosen.run(namespace[namespace.command])

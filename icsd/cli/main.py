"""Entry point of the ``icsd`` command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import icsd
from icsd.cli.parser import Parser
from icsd.cli.streams import lenient_streams
from icsd.errors import InputError, is_out_of_memory

COMMANDS = {
    "train": "train a model from a configuration; leaves checkpoints, images and scores in a run folder",
    "pretrain": "pretrain the encoders that measure how well an image matches its sentence (DAMSM)",
    "profile": "measure the time and the memory that each part of a training step takes",
    "sample": "generate images from sentences with a trained model",
    "evaluate": "measure the images of a trained model, stage by stage",
    "ablate": "train and evaluate the arms of an ablation, and report paired differences",
    "export": "write the generator of a trained model for other runtimes",
    "tune": "measure which backend of the operator is the fastest for calls of given sizes, and keep the result",
    "doctor": "report what is installed, what was built, and which backends work here",
    "data": "prepare a captioned image set for training, look at one, or export it to a folder",
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
    with lenient_streams():
        try:
            return _run(arguments)
        except InputError as error:
            return _fail(str(error), 2)
        except OSError as error:
            return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
        except KeyboardInterrupt as interrupt:
            return _fail(str(interrupt) or "interrupted", 130)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200] or "no more can be allocated"
            advice = "lower the batch size, the resolution or the widths of the networks"
            return _fail(f"memory does not suffice ({reason}): {advice}", 2)


def _fail(message: str, code: int) -> int:
    print(f"icsd: {'error: ' if code == 2 else ''}{message}", file=sys.stderr)
    return code


def _run(arguments: list[str]) -> int:
    parser = Parser(prog="icsd", description=DESCRIPTION, version=icsd.__version__)
    subcommands = parser.add_subcommands(dest="command")
    chosen = None
    for name, summary in COMMANDS.items():
        command = Parser()
        subcommands.add_subcommand(name, command, help=summary)
        if arguments[:1] == [name]:  # the others stay unimported, and with them what they need
            chosen = importlib.import_module(f"icsd.cli.{name}")
            chosen.configure(command, arguments[1:])
    parser.use_dashes()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.instantiate(parser.parse_args(arguments))
    return chosen.run(options[options.command])

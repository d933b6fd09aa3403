"""What the commands share: the argument parser, the defaults of a resumed run and the check of an output file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from PIL import Image

from icsd.errors import InputError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


class Parser(ArgumentParser):
    """jsonargparse's parser, raising InputError instead of printing its usage and leaving."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the problem as one line that names the key and the help page."""
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        raise InputError(f"{' '.join(message.split())} (see `{program} --help`)") from ex


def resumed_defaults(arguments: Sequence[str]) -> list[Path]:
    """The configuration of the run that ``--resume`` names, to take the place of the defaults."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--resume", type=Path, nargs="?")
    resume = early.parse_known_args(arguments)[0].resume
    return [resume / "config.yaml"] if resume else []


def check_image_file(path: Path) -> None:
    """Raise unless a path to write names an image format by its suffix."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"out is {path}: give an image file, such as image.png")

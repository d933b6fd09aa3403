"""The argument parser of every command: one-line errors."""

from __future__ import annotations

from typing import NoReturn

from jsonargparse import ArgumentParser

from icsd.errors import InputError


class Parser(ArgumentParser):
    """jsonargparse's parser, raising InputError instead of printing its usage and leaving."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the problem as one line that names the key and the help page."""
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        raise InputError(f"{' '.join(message.split())} (see `{program} --help`)") from ex

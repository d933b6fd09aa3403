"""The argument parser of all commands and the check of an output file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings
from PIL import Image

from icsd.errors import InputError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """A help formatter that keeps the lines of the description and leaves out types and defaults that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        if action.metavar or action.choices or action.nargs == 0:  # an option of a command, not a configuration key
            text = text.replace("type: %(type)s, ", "").replace("type: %(type)s", "")
            if action.default is None or action.default is False:
                text = text.replace(", default: %(default)s", "").replace("default: %(default)s", "")
        return text.replace(" ()", "").replace("(required, )", "(required)")


class Parser(ArgumentParser):
    """jsonargparse's parser with dashes in its options, which raises InputError instead of printing its usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, print_config="--print-config", **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the problem as one line that names the key and the help page."""
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        raise InputError(f"{' '.join(message.split())} (see `{program} --help`)") from ex

    def use_dashes(self) -> None:
        """Show the options of this parser and of its subcommands with dashes, and let booleans stand alone.

        jsonargparse names the option of a configuration key as the key, with underscores. The spelling with
        underscores stays accepted, so that it is not an error to type a key as the configuration file spells it.
        """
        for action in self._actions:
            action.option_strings = [option.replace("_", "-") for option in action.option_strings]
            self._option_string_actions.update(dict.fromkeys(action.option_strings, action))
            if getattr(action, "_typehint", None) is bool:
                action.nargs, action.const = "?", True
            if isinstance(action, argparse._SubParsersAction):
                for subparser in action.choices.values():
                    subparser.use_dashes()


def check_image_file(path: Path) -> None:
    """Raise unless the suffix of a path names an image format that can be written."""
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"output is {path}: give an image file, such as image.png")

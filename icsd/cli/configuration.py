"""The options that the training commands share: configuration files, and a run to resume."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from icsd.cli.parser import Parser
from icsd.errors import InputError
from icsd.training.checkpoint import Kind, find, is_unstarted, restoring, run_folder_of
from icsd.training.renamed import check_keys, leaves
from icsd.training.run_folder import RunFolder

LARGEST_FILE = 1 << 20
"""Bytes of a configuration file at most."""
LARGEST_CONTENT = 100_000
"""Values of a configuration file at most, after its aliases are resolved."""


def add_configuration(parser: Parser, arguments: Sequence[str], config: type, *, resume: Kind | None) -> None:
    """Add ``--config`` and ``--resume`` and an option for each key of a configuration.

    The configuration of a resumed run takes the place of the defaults.

    Args:
        parser: Parser of the command.
        arguments: Arguments of the command line, read early to find the files.
        config: Dataclass of the configuration.
        resume: Kind of checkpoint that ``--resume`` continues; None leaves the option out.

    Raises:
        InputError: A configuration file cannot be read, a key or option has another name now, or the run to resume
            is of another kind.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", action="append", default=[], nargs="?", type=Path)
    early.add_argument("--resume", nargs="?", type=Path)
    given, others = early.parse_known_args(arguments)
    options = [option.removeprefix("--").split("=")[0] for option in others if option.startswith("--")]
    check_keys([option.replace("-", "_") for option in options], "the command line")
    parser.add_argument(
        "--config", action=_ConfigurationFile, metavar="FILE", help="YAML file with any of the keys below"
    )
    if resume:
        parser.add_argument("--resume", type=Path | None, metavar="RUN", help="run folder to continue")
    for path in given.config:
        if path is not None:
            load_configuration(path)
    parser.add_class_arguments(config)
    if resume and given.resume:
        if taken := [f"--{option}" for option in ("name", "output") if option in options]:
            raise InputError(
                f"{' and '.join(taken)} cannot be given with --resume {given.resume}, which goes on in its own folder: "
                "leave it out"
            )
        folder = run_folder_of(given.resume)
        if folder.is_dir() and not is_unstarted(folder):
            find(folder, resume)
        _use_configuration_of(RunFolder(folder), parser)


def _use_configuration_of(folder: RunFolder, parser: Parser) -> None:
    """Have the configuration of a run take the place of the defaults. Nothing is written, not even a lost file."""
    if lost := folder.lost_config():
        config, newest = lost
        print(f"note         {folder.config_path} is missing or empty; the configuration is that of {newest}")
        with restoring(newest):
            parser.set_defaults(config)
        return
    if folder.config_path.is_file():
        load_configuration(folder.config_path)
    parser.default_config_files = [glob.escape(str(folder.config_path))]


class _ConfigurationFile(ActionConfigFile):
    """An option that takes a configuration file, which may extend another one by its key "base"."""

    def __call__(self, parser: Any, cfg: Any, values: str, option_string: str | None = None) -> None:
        self.apply_config(parser, cfg, self.dest, yaml.safe_dump(load_configuration(Path(values))))


def load_configuration(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a configuration file over the one that its key "base" names, a path from its own folder.

    Args:
        path: YAML file.
        extending: Files that extend this one, as far as they are known.

    Returns:
        Nested keys and values.

    Raises:
        InputError: A file cannot be used, has keys of an earlier version, or extends itself.
    """
    if path.resolve() in extending:
        raise InputError(f"configuration {path} extends itself: take out its key base")
    content = read_configuration(path)
    base = content.pop("base", None)
    check_keys([key for key, _ in leaves(content)], str(path))
    if base is None:
        return content
    return _merged(load_configuration(path.parent / str(base), (*extending, path.resolve())), content)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested keys and values with changes."""
    both = {
        key: _merged(base[key], changes[key]) for key in base.keys() & changes.keys() if _nested(base, changes, key)
    }
    return {**base, **changes, **both}


def _nested(base: dict[str, Any], changes: dict[str, Any], key: str) -> bool:
    return isinstance(base[key], dict) and isinstance(changes[key], dict)


def read_configuration(path: Path) -> dict[str, Any]:
    """Read a configuration file within bounds of size.

    Args:
        path: YAML file.

    Returns:
        Its nested keys and values.

    Raises:
        InputError: The file is too large, not UTF-8, not YAML, or not a mapping of keys to values.
    """
    if not path.is_file():
        raise InputError(f"there is no configuration file {path}: give a YAML file, such as configs/emoji.yaml")
    if path.stat().st_size > LARGEST_FILE:
        raise InputError(f"configuration {path} is larger than {LARGEST_FILE:,} bytes: give a YAML file of keys")
    data = path.read_bytes()
    try:
        node = yaml.compose(data.decode("utf-8-sig"), Loader=yaml.SafeLoader)
        if _count(node, {}) > LARGEST_CONTENT:
            raise InputError(f"configuration {path} holds more than {LARGEST_CONTENT:,} values through its aliases")
        content = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"configuration {path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise InputError(f"configuration {path} is nested too deeply, or contains itself") from error
    if not isinstance(content or {}, dict):
        raise InputError(f"configuration {path} is not a list of `key: value`: see configs/emoji.yaml")
    return content or {}


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Count the values below a node as if its aliases were written out; an alias shares the node that it names."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        below = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
        known[id(node)] = 1 + sum(_count(each, known) for each in below)
    return known[id(node)]

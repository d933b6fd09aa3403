"""Checkpoints: one ``.safetensors`` file each, written atomically, readable without executing anything.

A checkpoint is a nested state of dicts, lists, tensors and JSON scalars. The tensors are stored as such; everything
else (configuration, vocabulary, step, optimizer options, ...) is JSON in the file's metadata header, where each tensor
is replaced by a reference to its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import icsd
from icsd.errors import InputError

FORMAT_VERSION = 2

_HEADER = "icsd_checkpoint"
_TENSOR = "$tensor"  # {"$tensor": name}: a tensor
_PAIRS = "$pairs"  # {"$pairs": [[key, value], ...]}: a dict whose keys are not all strings
_FILE_NAME = re.compile(r"step-(\d+)\.safetensors")


class Kind(NamedTuple):
    """A kind of checkpoint."""

    entry: str
    """The top-level entry that only checkpoints of this kind have."""
    name: str
    """The name in messages."""
    command: str
    """The command that writes them."""


MODEL = Kind("ema", "a text-to-image model", "icsd train")
ENCODERS = Kind("damsm", "DAMSM encoders", "icsd pretrain")
KINDS = (MODEL, ENCODERS)
_EXAMPLES = {
    MODEL: "icsd train --config configs/emoji.yaml",
    ENCODERS: "icsd pretrain --config configs/pretrain/emoji.yaml",
}


class Found(NamedTuple):
    """The result of a search below a folder of runs."""

    path: Path
    """The newest checkpoint that can be used."""
    skipped: list[str]
    """Newer checkpoints that cannot be read: one message each."""


def save(path: Path | str, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: the file at ``path`` is the old one or the complete new one, at every moment.

    Args:
        path: File to write or replace.
        state: Dict of dicts, lists, tensors and JSON scalars. Tuples are stored as lists.

    Raises:
        OSError: The file cannot be written (full disk, permission). What was at ``path`` before is unchanged.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    header = {"format": FORMAT_VERSION, "icsd": icsd.__version__, "state": _flatten(state, "", tensors)}
    metadata = {_HEADER: json.dumps(header)}  # one entry: several would come out in a random order
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"checkpoint {path} could not be written: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def load(path: Path | str, entries: Collection[str] | None = None) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU.

    Args:
        path: File written by `save`.
        entries: Top-level entries to read; all by default. The tensors of the others are not read.

    Returns:
        The saved state, or the chosen entries of it.

    Raises:
        InputError: The file is missing, truncated, not a checkpoint of icsd, of another format version, or lacks one
            of ``entries``.
    """
    with _open(Path(path)) as (file, state):
        missing = sorted(set(entries or ()) - state.keys())
        if missing:
            raise InputError(f"checkpoint {path} has no entry {', '.join(missing)}; it holds {', '.join(state)}")
        chosen = {key: value for key, value in state.items() if entries is None or key in entries}
        return _unflatten(chosen, file)


def check_config(path: Path | str, saved: dict[str, Any], wanted: dict[str, Any], free: Collection[str] = ()) -> None:
    """Check that a checkpoint belongs to a configuration.

    Args:
        path: The checkpoint, for the message.
        saved: Configuration in the checkpoint, as nested dicts.
        wanted: Configuration of the run that wants to use it, as nested dicts.
        free: Dotted keys that may differ; a key frees all below it.

    Raises:
        InputError: Some other value differs; names the keys and both values.
    """
    old, new = dict(_leaves(saved)), dict(_leaves(wanted))
    differing = [
        f"{key} (checkpoint: {old.get(key)}, now: {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not any(f"{key}.".startswith(f"{prefix}.") for prefix in free)
    ]
    if differing:
        raise InputError(
            f"checkpoint {path} was trained with another configuration; differing: {', '.join(differing)}. "
            "Give the checkpoint's values, or start a new run"
        )


def step_path(folder: Path | str, step: int) -> Path:
    """Return where the checkpoint of a step lies in a run folder."""
    return Path(folder) / "checkpoints" / f"step-{step:08d}.safetensors"


def best_path(folder: Path | str) -> Path:
    """Return where the checkpoint with the best score lies in a run folder."""
    return Path(folder) / "checkpoints" / "best.safetensors"


def latest(folder: Path | str) -> Path:
    """Return the newest checkpoint of a run folder, or of the ``checkpoints`` folder in it.

    Raises:
        InputError: The folder is missing or holds no checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no run folder at {folder}: give the folder that `icsd train` made")
    found = _steps(folder.parent if folder.name == "checkpoints" else folder)
    if found:
        return found[-1]
    runs = sorted({path.parent.parent.name for path in folder.glob("*/checkpoints/step-*.safetensors")})
    if runs:
        raise InputError(f"{folder} holds run folders but is none: give one of them, {', '.join(runs)}")
    raise InputError(f"run folder {folder} holds no checkpoint: its training ended before the first one")


def kind_of(path: Path) -> Kind | None:
    """Return the kind of a checkpoint, or None for a kind of no command; see `load` for the errors."""
    with _open(path) as (_, state):
        return next((kind for kind in KINDS if kind.entry in state), None)


def find(place: Path | str, kind: Kind) -> Path:
    """Return the checkpoint that a user means by a path.

    Args:
        place: A checkpoint, or a run folder, which stands for its newest one.
        kind: The kind of checkpoint that is needed.

    Raises:
        InputError: There is no checkpoint, it cannot be read, or it is of another kind.
    """
    place = Path(place)
    path = latest(place) if place.is_dir() else place
    found = kind_of(path)
    if found != kind:
        what = "something else" if found is None else f"{found.name}, written by `{found.command}`"
        raise InputError(
            f"checkpoint {path} holds {what}, where {kind.name} is needed: "
            f"give a checkpoint or a run folder of `{kind.command}`"
        )
    return path


def newest(runs: Path | str, kind: Kind = MODEL) -> Found:
    """Search all run folders of ``runs`` for the checkpoint of a kind that was written last.

    Args:
        runs: Folder that holds run folders.
        kind: The kind of checkpoint that is needed; others are passed over.

    Raises:
        InputError: There is no readable checkpoint of this kind.
    """
    others, skipped = {}, []
    candidates = Path(runs).glob("*/checkpoints/step-*.safetensors")
    for path in sorted(candidates, key=lambda path: (path.stat().st_mtime_ns, path), reverse=True):
        try:
            found = kind_of(path)
        except InputError as error:
            skipped.append(str(error))
            continue
        if found == kind:
            return Found(path, skipped)
        others[path.parent.parent] = found
    what = "".join(f"; {folder} holds {found.name if found else 'something else'}" for folder, found in others.items())
    what += "".join(f"; {message}" for message in skipped)
    raise InputError(
        f"there is no checkpoint of {kind.name} in a run folder below {runs}{what}: "
        f"run `{kind.command}` first, as in `{_EXAMPLES[kind]}`, or give --checkpoint"
    )


def prune(folder: Path | str, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run folder, and what killed writes left."""
    for path in [*_steps(Path(folder))[:-keep], *(Path(folder) / "checkpoints").glob(".*.safetensors.*")]:
        path.unlink()


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("*") if _FILE_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_FILE_NAME.fullmatch(path.name)[1]))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a checkpoint: yield the safetensors file and the state with references in the place of its tensors."""
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: give a .safetensors file or a run folder of `icsd train`")
    try:
        with safe_open(path, "pt") as file:
            yield file, _read_header(path, file.metadata() or {})["state"]
    except (SafetensorError, json.JSONDecodeError) as error:
        raise InputError(
            f"checkpoint {path} is truncated or not a .safetensors file ({error}): give another one, "
            "or remove it, and its run falls back on an earlier one"
        ) from error


def _read_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _HEADER not in metadata:
        raise InputError(f"{path} is a .safetensors file but not a checkpoint of icsd: give one made by `icsd train`")
    header = json.loads(metadata[_HEADER])
    if header["format"] != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has format version {header['format']}, written by icsd {header['icsd']}; "
            f"icsd {icsd.__version__} reads version {FORMAT_VERSION}: use the icsd that wrote it"
        )
    return header


def _flatten(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the JSON form of ``value``, putting its tensors into ``tensors`` under their paths."""

    def below(key: Any, item: Any) -> Any:
        return _flatten(item, f"{name}/{key}" if name else str(key), tensors)

    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: below(key, item) for key, item in value.items()}
        return {_PAIRS: [[key, below(key, item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [below(index, item) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {name}, a {type(value).__name__}: only tensors and JSON values")


def _unflatten(value: Any, file: Any) -> Any:
    """Undo `_flatten`, reading tensors from an open safetensors file."""
    if isinstance(value, list):
        return [_unflatten(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return file.get_tensor(value[_TENSOR])
    if value.keys() == {_PAIRS}:
        return {key: _unflatten(item, file) for key, item in value[_PAIRS]}
    return {key: _unflatten(item, file) for key, item in value.items()}


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

"""Checkpoints: one ``.safetensors`` file each, written atomically, readable without executing anything.

A checkpoint is a nested state of dicts, lists, tensors and JSON scalars. The tensors are stored as such; everything
else (configuration, vocabulary, step, optimizer options, ...) is JSON in the file's metadata header, where each tensor
is replaced by a reference to its name. The header has a checksum, and so has each tensor: a damaged file is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import icsd
from icsd.errors import InputError, is_out_of_memory
from icsd.outputs import replacing
from icsd.training.renamed import leaves, new_key

FORMAT_VERSION = 3
EVENTS_DUE = "events_due"
"""The entry of a checkpoint that was saved because something after its step failed."""

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
        InputError: A tensor holds values that are not finite.
        OSError: The file cannot be written (full disk, permission). What was at ``path`` before is unchanged.
    """
    path = Path(path)
    tensors: dict[str, torch.Tensor] = {}
    header = {"format": FORMAT_VERSION, "icsd": icsd.__version__, "state": _flatten(state, "", tensors)}
    bad = next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise InputError(f"{bad} is not finite: training diverged; {path} was not written")
    header["checksums"] = {name: _checksum(tensor) for name, tensor in tensors.items()}
    text = json.dumps(header)
    metadata = {_HEADER: f"{zlib.crc32(text.encode()):08x}{text}"}  # several entries would come out in a random order
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(number and int(number[1]), f"the checkpoint could not be written: {error}") from error
        with temporary.open("rb") as file:
            os.fsync(file.fileno())


def load(path: Path | str, entries: Collection[str] | None = None) -> dict[str, Any]:
    """Read a checkpoint, its tensors on the CPU.

    Args:
        path: File written by `save`.
        entries: Top-level entries to read; all by default. The tensors of the others are not read.

    Returns:
        The saved state, or the chosen entries of it.

    Raises:
        InputError: The file is missing, truncated, damaged, not a checkpoint of icsd, of another format version, or
            lacks one of ``entries``.
    """
    with _open(Path(path)) as (file, header):
        state = header["state"]
        missing = sorted(set(entries or ()) - state.keys())
        if missing:
            raise InputError(f"checkpoint {path} has no entry {', '.join(missing)}; it holds {', '.join(state)}")
        chosen = {key: value for key, value in state.items() if entries is None or key in entries}
        return _unflatten(chosen, file, header["checksums"])


@contextlib.contextmanager
def restoring(path: Path | str) -> Iterator[None]:
    """Name the checkpoint in the errors that its contents cause while objects are made from them.

    Args:
        path: The checkpoint.

    Raises:
        InputError: In the place of the exceptions that a wrong type, name, number or shape causes.
    """
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"checkpoint {path} is damaged or was made by other code ({reason}): give another one"
        ) from error


def load_module(module: nn.Module, state: Any, name: str) -> None:
    """Load the state of a module, after a check of names, dtypes and shapes.

    Args:
        module: The module.
        state: Tensors by name.
        name: The name of the state in messages.

    Raises:
        ValueError: The state does not fit; see `restoring`.
    """
    expected = module.state_dict()
    differing = sorted(expected.keys() ^ state.keys())
    if differing:
        raise ValueError(f"{name} has other entries than expected: {', '.join(differing[:3])}")
    for key, tensor in expected.items():
        _check_like(state[key], tensor, f"{name}.{key}")
    module.load_state_dict(state)


def load_adam(optimizer: torch.optim.Adam, state: Any, name: str) -> None:
    """Load the moments of an optimizer, after a check of names, dtypes and shapes.

    Args:
        optimizer: The optimizer, whose options stay as they are.
        state: The part ``"state"`` of its state dict.
        name: The name of the state in messages.

    Raises:
        ValueError: The state does not fit; see `restoring`.
    """
    groups = optimizer.state_dict()["param_groups"]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, moments in state.items():
        expected = {"step": torch.zeros(()), "exp_avg": weights[index], "exp_avg_sq": weights[index]}
        if expected.keys() != moments.keys():
            raise ValueError(f"{name}.{index} has other entries than expected: {', '.join(moments)}")
        for key, tensor in expected.items():
            _check_like(moments[key], tensor, f"{name}.{index}.{key}")
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _check_like(found: Any, expected: torch.Tensor, name: str) -> None:
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"{name} is a {type(found).__name__}, not a tensor")
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise ValueError(
            f"{name} is {found.dtype} of shape {tuple(found.shape)}, where {expected.dtype} of shape "
            f"{tuple(expected.shape)} is expected"
        )


def check_config(
    path: Path | str,
    saved: dict[str, Any],
    wanted: dict[str, Any],
    free: Collection[str] = (),
    defaults: dict[str, Any] | None = None,
) -> None:
    """Check that a checkpoint belongs to a configuration.

    Args:
        path: The checkpoint, for the message.
        saved: Configuration in the checkpoint, as nested dicts.
        wanted: Configuration of the run that wants to use it, as nested dicts.
        free: Dotted keys that may differ; a key frees all below it.
        defaults: Values of the keys that were not there when the checkpoint was written, as nested dicts.

    Raises:
        InputError: Some other value differs; names the keys and both values.
    """
    old, new = dict(leaves(saved)), dict(leaves(wanted))
    old = {key: value for key, value in leaves(defaults or {}) if key in new} | old
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


def events_are_due(path: Path | str) -> bool:
    """Return whether what follows the step of this checkpoint, such as an evaluation, failed and has to be done again.

    Args:
        path: The checkpoint; False if there is none, or none that can be read.
    """
    try:
        with _open(Path(path)) as (_, header):
            return EVENTS_DUE in header["state"]
    except InputError:
        return False


def step_path(folder: Path | str, step: int) -> Path:
    """Return where the checkpoint of a step lies in a run folder."""
    return Path(folder) / "checkpoints" / f"step-{step:08d}.safetensors"


def best_path(folder: Path | str) -> Path:
    """Return where the checkpoint with the best score lies in a run folder."""
    return Path(folder) / "checkpoints" / "best.safetensors"


def run_folder_of(place: Path) -> Path:
    """Return the run folder that a user means by a path: itself, or the folder whose ``checkpoints`` it is."""
    return place.parent if place.name == "checkpoints" and _steps(place.parent) else place


def latest(folder: Path | str) -> Path:
    """Return the newest checkpoint of a run folder, or of the ``checkpoints`` folder in it.

    Raises:
        InputError: The folder is missing or holds no checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no run folder at {folder}: give the folder that `icsd train` made")
    found = _steps(run_folder_of(folder))
    if found:
        return found[-1]
    runs = sorted({path.parent.parent.name for path in folder.glob("*/checkpoints/step-*.safetensors")})
    if runs:
        raise InputError(f"{folder} holds run folders but is none: give one of them, {', '.join(runs)}")
    raise InputError(f"run folder {folder} holds no checkpoint: its training ended before the first one")


def kind_of(path: Path) -> Kind | None:
    """Return the kind of a checkpoint, or None for one that no command writes; see `load` for the errors."""
    with _open(path) as (_, header):
        return next((kind for kind in KINDS if kind.entry in header["state"]), None)


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
            f"checkpoint {path} holds {what}, not {kind.name}: give a checkpoint or a run folder of `{kind.command}`"
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


def is_unstarted(folder: Path) -> bool:
    """Return whether a run folder has a configuration, but no checkpoint: its training ended before the first one."""
    return (folder / "config.yaml").is_file() and not _steps(folder)


def prune(folder: Path | str, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run folder, and what killed writes left."""
    for path in [*_steps(Path(folder))[:-keep], *(Path(folder) / "checkpoints").glob(".*.safetensors*")]:
        path.unlink()


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a run folder, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("*") if _FILE_NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(_FILE_NAME.fullmatch(path.name)[1]))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a checkpoint: yield the safetensors file and the header, with references in the place of tensors."""
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: give a .safetensors file or a run folder of `icsd train`")
    path.open("rb").close()  # an unreadable file is an OSError, which says so
    try:
        with safe_open(path, "pt") as file:
            yield file, _read_header(path, file.metadata() or {})
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(
            f"checkpoint {path} is truncated or not a .safetensors file ({error}): give another one, "
            "or remove it, and its run falls back on an earlier one"
        ) from error
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"checkpoint {path} is damaged ({type(error).__name__}: {error}): give another one, "
            "or remove it, and its run falls back on an earlier one"
        ) from error


def _read_header(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if _HEADER not in metadata:
        raise InputError(f"{path} is a .safetensors file but not a checkpoint of icsd: give one made by `icsd train`")
    content = metadata[_HEADER]
    checksum, text = ("", content) if content.startswith("{") else (content[:8], content[8:])
    header = json.loads(text)
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise ValueError("its header has no format version")
    if header["format"] != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has format version {header['format']}, written by icsd {header.get('icsd')}; "
            f"icsd {icsd.__version__} reads version {FORMAT_VERSION}: use the icsd that wrote it{_renamed(header)}"
        )
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        raise ValueError("its header does not have the checksum that was written with it")
    if not isinstance(header.get("state"), dict) or not isinstance(header.get("checksums"), dict):
        raise ValueError("its header has no state")
    return header


def _renamed(header: dict[str, Any]) -> str:
    """Name the configuration keys of an older checkpoint that have other names now."""
    state = header.get("state")
    config = state.get("config") if isinstance(state, dict) else None
    keys = [key for key, _ in leaves(config)] if isinstance(config, dict) else []
    pairs = [f"{key} is now {new}" for key in keys if (new := new_key(key)) is not None]
    return f". Of its configuration keys, {'; '.join(pairs)}" if pairs else ""


def _checksum(tensor: torch.Tensor) -> str:
    """Return the checksum of a tensor's dtype, shape and values."""
    kind = f"{tensor.dtype} {list(tensor.shape)}".encode()
    values = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return f"{zlib.crc32(values, zlib.crc32(kind)):08x}"


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


def _unflatten(value: Any, file: Any, checksums: dict[str, str]) -> Any:
    """Undo `_flatten`, reading tensors from an open safetensors file."""
    if isinstance(value, list):
        return [_unflatten(item, file, checksums) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TENSOR}:
        return _read_tensor(value[_TENSOR], file, checksums)
    if value.keys() == {_PAIRS}:
        return {key: _unflatten(item, file, checksums) for key, item in value[_PAIRS]}
    return {key: _unflatten(item, file, checksums) for key, item in value.items()}


def _read_tensor(name: str, file: Any, checksums: dict[str, str]) -> torch.Tensor:
    tensor = file.get_tensor(name)
    if _checksum(tensor) != checksums[name]:
        raise ValueError(f"{name} does not have the checksum that was written with it")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds values that are not finite")
    return tensor

"""Files of tensors that save work which would be done again: each is complete or absent."""

from __future__ import annotations

import functools
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from icsd.outputs import replacing


def kept(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a complete file, or None."""
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        return None


def keep(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write tensors to a file that is either complete or absent, and return them.

    A folder that cannot be written costs time in a later run, not this result.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    except (OSError, SafetensorError):
        _note(path.parent)
    return tensors


@functools.cache
def _note(folder: Path) -> None:
    """Print once that a folder does not keep what is made."""
    tqdm.write(f"note         {folder} cannot be written to or is full: a later run makes again what it does not keep")

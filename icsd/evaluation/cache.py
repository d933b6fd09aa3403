"""Files of tensors that save work which would be done again: each is complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


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
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
    return tensors

"""Files of tensors that save work which would be done again: each is complete or absent."""

from __future__ import annotations

import contextlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    return tensors

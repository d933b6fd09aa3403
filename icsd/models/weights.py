"""Reading of published weights as tensors alone: no code in a file is run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of PyTorch that holds finite tensors by name.

    Raises:
        ValueError: It holds something else, or is broken. The message is one line.
        OSError: It cannot be opened.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch.load raises whatever its parser meets; its messages advise to run code in files
        raise ValueError("it is broken, or holds other things than tensors") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it is not a dict of tensors")
    bad = next((name for name, value in state.items() if not value.isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"{bad} is not finite")
    return state

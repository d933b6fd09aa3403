"""The state of every random generator that training may draw from."""

# ruff: noqa: NPY002 (NumPy's legacy generator is the global one, which augmentations draw from)

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch, so that equal runs write equal files."""
    first, second = np.random.SeedSequence(seed).generate_state(2).tolist()
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(seed)


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator, tensors and JSON values, for `restore_random_state`.

    Args:
        device: The device whose generator is part of the state, beside those of Python, NumPy and PyTorch on the CPU.
    """
    version, words, gauss = random.getstate()
    name, keys, *numbers = np.random.get_state()
    state = {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *numbers],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set every generator to a state of `random_state`; one that is not part of the state stays as it is."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *numbers = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *numbers))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Make draws on the CPU depend on these numbers only, and restore the generators afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first, second = np.random.SeedSequence(entropy).generate_state(2).tolist()
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(first << 32 | second)  # torch.manual_seed would seed the GPU's, too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])

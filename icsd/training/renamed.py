"""Configuration keys of earlier versions and the keys that took their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from icsd.errors import InputError

RENAMED = {
    "out": "output",
    "optimiser": "optimizer",
    "discriminator.normalisation": "discriminator.normalization",
    "adversarial.matching_penalty": "losses.discriminator.matching_penalty",
    "adversarial.r1": "losses.discriminator.r1",
    "damsm.weight": "losses.generator.damsm",
    "distillation.enabled": "losses.generator.distillation and losses.discriminator.distillation, 0 for off",
    "distillation.generator.weight": "losses.generator.distillation",
    "distillation.discriminator.weight": "losses.discriminator.distillation",
    "optimizer.kl_weight": "losses.generator.condition_kl",
    "optimizer.matching_weight": "losses.generator.matching",
}
"""The new key of each old key; a key stands for everything below it."""


def check_keys(keys: Iterable[str], source: str) -> None:
    """Refuse keys of earlier versions, all of them in one message that names the new keys.

    Args:
        keys: Dotted keys.
        source: The place where they were found, for the message.

    Raises:
        InputError: At least one key has another name now.
    """
    pairs = [(key, new) for key in keys if (new := new_key(key)) is not None]
    if pairs:
        now = "; ".join(f"{key} is now {new}" for key, new in pairs)
        raise InputError(f"{source} has configuration keys of an earlier version: {now}. Rename them")


def new_key(key: str) -> str | None:
    """Return the new name of an old key, or None where the key has kept its name."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        new = RENAMED.get(".".join(parts[:length]))
        if new is not None:
            renamed = ".".join([new, *parts[length:]])
            return new_key(renamed) or renamed
    return None


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a nested configuration with their values."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

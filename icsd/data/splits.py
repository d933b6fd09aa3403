"""Splits of a set: those that its folders, shards or lists define, or one that is drawn."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath

from icsd.data.records import Record
from icsd.errors import InputError

_HELD_OUT = r"(test(ing|s|set)?|val(id(ation)?)?|dev)"
_FOLDER = re.compile(rf"{_HELD_OUT}[-_. ]?(\d+|images?|imgs?|set|split|data)?", re.IGNORECASE)
_SHARD = re.compile(rf"test.*|(.*[-_.])?{_HELD_OUT}([-_.\d].*)?", re.IGNORECASE)


def held_out_part(path: str, shard: bool = False) -> str | None:
    """Return the part of a path below the root that says that a file is held out of training, if there is one.

    Args:
        path: The folders of the file, and its shard.
        shard: The last part is the name of a shard, such as ``cc3m-val-0001``; otherwise it is a folder.
    """
    parts = PurePosixPath(path).parts
    for number, part in enumerate(parts, start=1):
        if (_SHARD if shard and number == len(parts) else _FOLDER).fullmatch(part):
            return part
    return None


def with_held_out(records: Sequence[Record], held_out: Mapping[str, str | None]) -> tuple[list[Record], list[str]]:
    """Give the records the splits of their folders or shards.

    If some are named test, val or the like, these are the test split and all others are the train split.

    Args:
        records: The records. If a list gave any of them a split, nothing changes.
        held_out: The result of `held_out_part` for each name.

    Returns:
        The records, and notes on the splits.
    """
    counts = Counter(held_out[record.name] for record in records)
    if any(record.split for record in records) or not 0 < counts[None] < len(records):
        return list(records), []
    names = ", ".join(f"{part!r} ({count} images)" for part, count in sorted(counts.items(), key=str) if part)
    note = f"the names of folders and shards define the splits: {names} held out, {counts[None]} images to train"
    return [replace(record, split="test" if held_out[record.name] else "train") for record in records], [note]


def with_splits(records: Sequence[Record], test_fraction: float, seed: int) -> list[Record]:
    """Return the records with a split each. Where no record has one, it is drawn by a hash of the seed and the name.

    The smallest hashes form the test split, so a new image changes the split of few others.

    Raises:
        InputError: Some records have a split and others do not, or a split is empty.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"data.test_fraction={test_fraction} must lie between 0 and 1")
    unassigned = [record for record in records if record.split is None]
    if unassigned and len(unassigned) < len(records):
        raise InputError(f"{unassigned[0].image} has no split while others have one; give every image one, or none")
    ranked = sorted(unassigned, key=lambda record: hashlib.sha256(f"{seed}:{record.name}".encode()).digest())
    count = min(max(round(test_fraction * len(unassigned)), 1), len(unassigned) - 1)
    held_out = {record.name for record in ranked[:count]}
    placed = [
        replace(record, split=record.split or ("test" if record.name in held_out else "train")) for record in records
    ]
    missing = sorted({"train", "test"} - {record.split for record in placed})
    if missing:
        raise InputError(f"no image is in the {missing[0]} split; at least one to train and one to test are needed")
    return placed

"""Progress bars of evaluations."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Sequence[Item], name: str, unit: str, *, shown: bool = True) -> Iterator[Item]:
    """Iterate with a progress bar, if it is to be shown, which a log file shows twice a minute."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return iter(tqdm(items, desc=name, unit=unit, leave=False, mininterval=interval, disable=not shown))

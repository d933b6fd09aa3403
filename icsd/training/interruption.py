"""Ctrl-C between steps, never within one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


@contextmanager
def finishing_steps() -> Iterator[SimpleNamespace]:
    """Catch the first SIGINT or SIGTERM and remember it; a second one acts at once."""
    caught = SimpleNamespace(signal=None)
    previous = {}

    def handle(number: int, frame: Any) -> None:
        caught.signal = number
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        restore()

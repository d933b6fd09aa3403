"""Signals that end a run between two steps, never within one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def finishing_steps() -> Iterator[SimpleNamespace]:
    """Catch the first SIGINT, SIGTERM or SIGHUP and remember it as ``signal``; a second one acts at once.

    A signal that the process was started to ignore, as SIGHUP by ``nohup``, stays ignored.
    """
    caught = SimpleNamespace(signal=None)
    previous = {}

    def handle(number: int, frame: Any) -> None:
        caught.signal = number
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        restore()

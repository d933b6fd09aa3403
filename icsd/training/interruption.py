"""Signals: they end a run between two steps, never within one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def ends_of_children_unnoticed() -> Iterator[None]:
    """Ignore that a child process ends.

    PyTorch's data loader handles this signal with an error wherever the main thread is, even within a step. Without
    it, the loader finds out seconds later, when it waits for data of this process.
    """
    number = getattr(signal, "SIGCHLD", None)
    if number is None or signal.getsignal(number) is None:
        yield
        return
    previous = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, previous)


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

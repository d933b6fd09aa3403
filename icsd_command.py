"""The ``icsd`` command while it imports its package, which takes seconds: Ctrl-C then ends it with one line, too."""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> int:
    """Import the command line and run it; return the exit code."""
    waiting = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell may have it ignored
    if waiting:
        signal.signal(signal.SIGINT, _leave)
    from icsd.cli.main import main as run

    if waiting:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return run()


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process at once: nothing was begun, and half-imported native modules may not survive an exception."""
    os.write(2, b"icsd: interrupted\n")
    os._exit(130)

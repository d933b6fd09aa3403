"""Output streams that may be closed: a command goes on without its display."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class LenientStream:
    """A text stream whose reader may go away.

    After an error of writing, as to ``head`` that has seen enough, to a closed terminal or to a full disk, its
    descriptor is led to the null device, so that nothing that is written later fails either.

    Args:
        stream: The stream; None where the process was started without it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text as far as it can be written; return its length."""
        if self._stream is not None:
            try:
                self._stream.write(text)
                self._stream.flush()
            except UnicodeEncodeError:  # a file name or caption with bytes that are no text
                self.write(text.encode(self._stream.encoding, "backslashreplace").decode(self._stream.encoding))
            except (OSError, ValueError):
                self._give_up()
        return len(text)

    def flush(self) -> None:
        """Do nothing: each `write` flushes."""

    def isatty(self) -> bool:
        """Return whether a person reads the stream."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """Lead the descriptor to the null device; what the stream still holds goes there, too."""
        stream, self._stream = self._stream, None
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


@contextlib.contextmanager
def lenient_streams() -> Iterator[None]:
    """Replace standard output and standard error by streams whose reader may go away."""
    for number in (1, 2):
        try:
            os.fstat(number)
        except OSError:  # the process was started without it: keep its number from files that are opened later
            os.open(os.devnull, os.O_WRONLY)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(LenientStream, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

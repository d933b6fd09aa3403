"""The time that the steps of a run take, over all its parts, without evaluations, images and checkpoints."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path


class Stopwatch:
    """A clock that goes on where the metrics of an earlier part of the run end.

    Attributes:
        seconds: Time by the wall clock, up to the last `read`.
        cpu_seconds: Processor time of this process, all threads together, up to the same moment. It counts hardly
            anything of what other programs do to a busy machine.

    Args:
        metrics: The file of metrics, without lines of steps that are to be taken again; None begins at 0.
    """

    def __init__(self, metrics: Path | None) -> None:
        self.seconds, self.cpu_seconds = (0.0, 0.0) if metrics is None else _last_times(metrics)
        self._since: tuple[float, float] | None = self._now()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens meanwhile."""
        self._add()
        self._since = None
        try:
            yield
        finally:
            self._since = self._now()

    def read(self) -> dict[str, float]:
        """Return both times as metrics."""
        self._add()
        return {"seconds": round(self.seconds, 2), "cpu_seconds": round(self.cpu_seconds, 2)}

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def _add(self) -> None:
        if self._since is None:
            return
        now = self._now()
        self.seconds += now[0] - self._since[0]
        self.cpu_seconds += now[1] - self._since[1]
        self._since = now


def _last_times(metrics: Path) -> tuple[float, float]:
    if not metrics.exists():
        return 0.0, 0.0
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    times = [(line["seconds"], line["cpu_seconds"]) for line in lines if "cpu_seconds" in line]
    return times[-1] if times else (0.0, 0.0)

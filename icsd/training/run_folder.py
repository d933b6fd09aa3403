"""A run folder: configuration, metrics and checkpoints, whatever is trained in it.

A file is written beside the one that it replaces and renamed, so a killed process or a full disk loses nothing. One
process at a time writes into a folder.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from icsd.errors import InputError
from icsd.outputs import replacing
from icsd.training import checkpoint


class RunFolder:
    """A folder such as ``runs/emoji-busts``.

    Args:
        path: The folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, output: Path, name: str | None, default: str) -> RunFolder:
        """Make a new folder.

        Args:
            output: Folder to make it in.
            name: Name of the folder, which must be new.
            default: Name in the place of None; if there is such a folder, a number is appended.

        Raises:
            InputError: There is a folder of this name.
        """
        number = 1
        while True:
            path = output / (name or (default if number == 1 else f"{default}-{number}"))
            try:
                path.mkdir(parents=True)
                return cls(path)
            except FileExistsError as error:
                if name is not None:
                    raise InputError(
                        f"name is {name}, but {path} exists: give another name, or --resume {path}"
                    ) from error
                number += 1

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing into the folder; the lock ends with the process, however it ends.

        Raises:
            InputError: There is no such folder, or another process writes into it.
        """
        if not self.path.is_dir():
            raise InputError(f"no run folder at {self.path}: give the folder that `icsd train` or `icsd pretrain` made")
        lock = FileLock(self.path / ".lock", blocking=False)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(
                f"another process is training in {self.path}: wait until it ends, or train in a new run folder"
            ) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def config_path(self) -> Path:
        """File of the resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """File of metrics: a JSON object a line, each with its "step"."""
        return self.path / "metrics.jsonl"

    def begin(self, config: Any, step: int) -> list[str]:
        """Write the configuration, and drop the metrics past a step, which a resumed run writes again.

        Args:
            config: The configuration, a dataclass.
            step: Last step of the checkpoint that training goes on from, or 0.

        Returns:
            Notes about lines that could not be read and were dropped.
        """
        write_text(self.config_path, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True))
        if not self.metrics_path.exists():
            return []
        lines = self.metrics_path.read_bytes().splitlines(keepends=True)
        steps = [_step_of(line) for line in lines]
        kept = [line for line, place in zip(lines, steps, strict=True) if place is not None and place <= step]
        if len(kept) < len(lines):
            write_text(self.metrics_path, b"".join(kept).decode("utf-8"))
        torn = steps.count(None)
        return [f"dropped {torn} unreadable line(s) of {self.metrics_path}, cut off when the run ended"] if torn else []

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line of metrics."""
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def lost_config(self) -> tuple[dict[str, Any], Path] | None:
        """Return the configuration of the newest checkpoint, and its path, if the configuration file is lost.

        The file is lost if it is missing or empty. The result is None if it is not lost.
        """
        if not self.path.is_dir() or (self.config_path.is_file() and self.config_path.read_bytes().strip(b"\0 \n")):
            return None
        newest = checkpoint.latest(self.path)
        return checkpoint.load(newest, ["config"])["config"], newest

    def restore_config(self) -> str | None:
        """Write the configuration file again from the newest checkpoint where it is lost.

        Returns:
            A note about it, or None where nothing was to be done.
        """
        lost = self.lost_config()
        if lost is None:
            return None
        config, newest = lost
        write_text(self.config_path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        return f"{self.config_path} was missing or empty; it was written again from {newest}"


def check_start(resume: Path | None) -> tuple[Path | None, list[str]]:
    """Return the run folder whose newest checkpoint a run continues, and notes.

    Args:
        resume: The run folder that is to be resumed, or None for a new run.
    """
    if resume is None or not checkpoint.is_unstarted(resume):
        return resume, []
    return None, [f"{resume} holds no checkpoint, since its training ended before the first one: it starts again"]


def plain(config: Any) -> dict[str, Any]:
    """Return a configuration, a dataclass, as JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8: at every moment it is the old one or the complete new one.

    Raises:
        OSError: The file cannot be written. What was there before is unchanged.
    """
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _step_of(line: bytes) -> int | None:
    """Return the step of a line of metrics, or None for a line that is cut off or damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None

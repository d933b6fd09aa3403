"""What every run folder holds: the resolved configuration and the metrics, whatever is trained in it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml


def new_folder(out: Path, name: str) -> Path:
    """Make ``out/name``, or ``out/name-2``, ... if there is one."""
    number = 1
    while True:
        folder = Path(out) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1


def begin(folder: Path, config: Any, step: int) -> None:
    """Write the configuration, and drop the metrics past ``step``, which a resumed run writes again."""
    (folder / "config.yaml").write_text(yaml.safe_dump(plain(config), sort_keys=False))
    metrics = metrics_path(folder)
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def plain(config: Any) -> dict[str, Any]:
    """A configuration, a dataclass, as JSON values."""
    return json.loads(json.dumps(asdict(config), default=str))


def metrics_path(folder: Path) -> Path:
    """Return the file of metrics: a JSON object a line, each with its "step"."""
    return folder / "metrics.jsonl"


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    """Add a line of metrics."""
    with metrics_path(folder).open("a") as file:
        file.write(json.dumps(line) + "\n")

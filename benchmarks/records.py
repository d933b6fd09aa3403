"""A file of JSON lines, to which the steps of `tools.first_hour` append what they find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from icsd.errors import InputError

Record = dict[str, Any]


def append(path: Path, kind: str, **values: Any) -> None:
    """Append one record. Processes may append to one file at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": kind, **values}) + "\n")


def read(path: Path) -> list[Record]:
    """Return all records of a file.

    Raises:
        InputError: There is no such file, or a line of it is not a record.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist; write it by: python -m tools.first_hour")
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            records.append({"kind": record["kind"], **record})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"line {number} of {path} is no record ({error}): delete that line") from error
    return records

"""The cache folder; output files, checked before the work begins and written as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from icsd.errors import InputError


def cache_folder() -> Path:
    """Return the folder for what can be made again: `ICSD_CACHE`, or `icsd` in the user's cache folder."""
    if given := os.environ.get("ICSD_CACHE"):
        return Path(given)
    home = os.path.expanduser("~")  # unchanged for users without a home
    home = tempfile.gettempdir() if home == "~" else home
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache")) / "icsd"


def check_output(path: Path) -> None:
    """Check that a file can be written, before the work that makes its contents.

    Args:
        path: File to write or replace.

    Raises:
        InputError: The path is a folder, or its folder is missing or not writable.
    """
    if path.is_dir():
        raise InputError(f"output is {path}, which is a folder: give a file")
    folder = path.parent
    if not folder.exists():
        raise InputError(f"output is {path}, but there is no folder {folder}: make it first, as in `mkdir -p {folder}`")
    if not folder.is_dir():
        raise InputError(f"output is {path}, but {folder} is not a folder: give another path")
    if not os.access(folder, os.W_OK):
        raise InputError(f"output is {path}, but the folder {folder} cannot be written to: give another path")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file as a whole or not at all.

    Args:
        path: File to write or replace.

    Yields:
        The file to write in its place, with the same suffix; after an error it is removed and ``path`` is unchanged.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)

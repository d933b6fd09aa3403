"""Folders and archives: each lists its files, and reads some of them in stored order.

Archives are read in place; nothing is extracted. Sizes that an archive states are checked before anything is read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, Protocol

from tqdm import tqdm

from icsd.data.limits import Limits
from icsd.errors import InputError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tbz2", ".tar.bz2", ".txz", ".tar.xz")


class ByteRange(NamedTuple):
    """A range of bytes of a file on disk, so that one file of an archive can be read alone."""

    path: str
    offset: int = 0
    length: int | None = None  # None: to the end

    def open(self) -> BinaryIO:
        """Open the bytes for reading."""
        if self.length is None:
            return open(self.path, "rb")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.length))


class Source(Protocol):
    """A folder or an archive."""

    paths: list[str]
    """Paths of its files, with forward slashes."""
    problems: list[str]
    """Lines about entries that cannot be read."""

    def read(self, paths: set[str]) -> Iterator[tuple[str, bytes | InputError]]:
        """Read some files in stored order. A file that alone cannot be read comes with an error in place of bytes."""

    def byte_range(self, path: str) -> ByteRange | None:
        """Return the place of a file on disk, or None if it is compressed."""


class Folder:
    """A folder with its subfolders, symbolic links to folders included. Hidden files and folders are left out.

    Args:
        root: The folder.
        limits: The largest files that are read.

    Raises:
        InputError: The folder itself cannot be read.
    """

    def __init__(self, root: Path, limits: Limits) -> None:
        self.root = root
        self.limits = limits
        self.paths: list[str] = []
        self.problems: list[str] = []
        seen: set[tuple[int, int]] = set()
        folders, links = [str(root)], []
        while folders or links:
            # Real folders come first, so that a link to a folder below the root adds nothing.
            folder = folders.pop() if folders else links.pop()
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                if folder == str(root):
                    raise cannot_be_read(folder, error) from error
                self.problems.append(str(cannot_be_read(folder, error)))
                continue
            for entry in entries:
                self._sort(entry, folders, links)

    def read(self, paths: set[str]) -> Iterator[tuple[str, bytes | InputError]]:
        for path in sorted(paths):
            name = str(self.root / path)
            try:
                with open(name, "rb") as file:
                    self.limits.check_size(name, os.fstat(file.fileno()).st_size)
                    data = self.limits.read(name, file)
            except InputError as error:
                yield path, error
            except OSError as error:
                yield path, cannot_be_read(name, error)
            else:
                yield path, data

    def byte_range(self, path: str) -> ByteRange:
        return ByteRange(str(self.root / path))

    def _sort(self, entry: os.DirEntry[str], folders: list[str], links: list[str]) -> None:
        """Put an entry of a folder where it belongs."""
        if entry.name.startswith("."):
            return
        try:
            kind = entry.stat().st_mode
        except OSError as error:
            reason = "is a link that leads nowhere" if entry.is_symlink() else f"cannot be read ({error.strerror})"
            self.problems.append(f"{entry.path} {reason}; correct it or remove it")
            return
        if stat.S_ISDIR(kind):
            (links if entry.is_symlink() else folders).append(entry.path)
        elif stat.S_ISREG(kind):
            self.paths.append(os.path.relpath(entry.path, self.root))
        else:
            self.problems.append(f"{entry.path} is a pipe, a socket or a device and is not read; remove it")


class Tar:
    """A tar file, compressed or not.

    Args:
        name: Its name in messages.
        file: Its path, or its bytes.
        limits: The largest files that are read.

    Raises:
        InputError: A file in it is larger than the limit.
        Exception: The file is broken.
    """

    def __init__(self, name: str, file: Path | io.BytesIO, limits: Limits) -> None:
        self.name, self.file, self.limits = name, file, limits
        self.problems: list[str] = []
        with self._open() as (tar, stream):
            self.compressed = stream.compressed
            members = list(self._members(tar))
            end = max((member.offset_data + -(-member.size // 512) * 512 for member in members), default=0)
            # tarfile takes a header that is cut short for the end, but at the end of every tar file there are zeros.
            if stream.tell() + stream.skip_rest() - end < 512:
                raise EOFError("unexpected end of data")
        self.paths = [relative(member.name) for member in members]
        self.members = dict(zip(self.paths, members, strict=True))

    def read(self, paths: set[str]) -> Iterator[tuple[str, bytes | InputError]]:
        with self._open() as (tar, _):
            for path in sorted(paths, key=lambda path: self.members[path].offset_data):
                yield path, tar.extractfile(self.members[path]).read()

    def byte_range(self, path: str) -> ByteRange | None:
        member = self.members[path]
        if self.compressed or member.issparse() or not isinstance(self.file, Path):
            return None
        return ByteRange(str(self.file), member.offset_data, member.size)

    def _members(self, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        last = -1
        for member in tqdm(tar, desc=f"listing {self.name}", unit="file", leave=False, delay=2, disable=None):
            if member.offset <= last or member.size < 0:  # a negative size leads tarfile round in circles
                raise tarfile.ReadError("a member has a negative size")
            last = member.offset
            if member.isfile():
                self.limits.check_size(f"{self.name}/{member.name}", member.size)
                yield member
            elif not member.isdir():
                self.problems.append(f"{self.name}/{member.name} is a link or a device and is not read; pack the file")

    @contextmanager
    def _open(self) -> Iterator[tuple[tarfile.TarFile, _Stream]]:
        with _Stream(self.file, self.limits) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            yield tar, stream


class _Stream:
    """The decompressed bytes of a tar file, with a limit on what is read at once."""

    _OPENERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))

    def __init__(self, file: Path | io.BytesIO, limits: Limits) -> None:
        self.limits = limits
        self.raw = open(file, "rb") if isinstance(file, Path) else file  # noqa: SIM115
        self.raw.seek(0)
        start = self.raw.read(6)
        self.raw.seek(0)
        opener = next((opener for magic, opener in self._OPENERS if start.startswith(magic)), None)
        self.compressed = opener is not None
        self.file = opener(self.raw) if opener else self.raw
        self.seek, self.tell = self.file.seek, self.file.tell

    def read(self, size: int) -> bytes:
        if size > self.limits.max_bytes:
            raise tarfile.ReadError(f"a header has {size:,} bytes")
        return self.file.read(size)

    def skip_rest(self) -> int:
        """Read to the end, which checks the checksum of compressed files, and return the number of bytes."""
        count = 0
        while data := self.file.read(2**20):
            count += len(data)
            if count > self.limits.max_bytes:
                raise tarfile.ReadError(f"more than {self.limits.max_file_mb} MiB follow its last file")
            if not self.compressed:
                break
        return count

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.raw, io.BufferedReader):
            self.raw.close()


class Zip:
    """A zip file.

    Args:
        name: Its name in messages.
        file: Its path, or its bytes.
        limits: The largest files that are read.

    Raises:
        Exception: The file is broken.
    """

    def __init__(self, name: str, file: Path | io.BytesIO, limits: Limits) -> None:
        self.name, self.file, self.limits = name, file, limits
        self.problems: list[str] = []
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        self.paths = [relative(member.filename) for member in members]
        self.members = dict(zip(self.paths, members, strict=True))

    def read(self, paths: set[str]) -> Iterator[tuple[str, bytes | InputError]]:
        with zipfile.ZipFile(self.file) as archive:
            for path in sorted(paths, key=lambda path: self.members[path].header_offset):
                member = self.members[path]
                try:
                    self.limits.check_size(f"{self.name}/{path}", member.file_size)
                    with archive.open(member) as opened:
                        data = self.limits.read(f"{self.name}/{path}", opened)
                except InputError as error:
                    yield path, error
                except Exception as error:  # the others may still be whole
                    yield path, broken(self.name, error)
                else:
                    yield path, data

    def byte_range(self, path: str) -> None:
        return None


def relative(path: str) -> str:
    """Return the path without a leading ``./``."""
    return str(PurePosixPath(path))


def broken(name: str, error: Exception) -> InputError:
    """Return the error for an archive that cannot be read to its end."""
    if isinstance(error, OSError) and error.strerror:
        return cannot_be_read(name, error)
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{name} is truncated or broken ({reason}); download or copy it again")


def cannot_be_read(name: str, error: OSError) -> InputError:
    """Return the error for a file or folder that the system does not let us read."""
    return InputError(f"{name} cannot be read ({error.strerror or error}); correct that or remove it")

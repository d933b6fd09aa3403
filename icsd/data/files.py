"""Files in folders and archives, read in place; and new folders that are written completely or not at all."""

from __future__ import annotations

import io
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from icsd.errors import InputError

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")

_BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, RuntimeError, zlib.error, lzma.LZMAError)


class File(NamedTuple):
    """A file in a folder or an archive. Its text form is its path: ``CUB_200_2011.tgz/CUB_200_2011/images.txt``."""

    source: str
    """The folder or archive that holds it."""
    path: str
    """The path in that folder or archive, with forward slashes."""

    def __str__(self) -> str:
        return f"{self.source}/{self.path}"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def folder(self) -> str:
        """The name of the folder, or archive, that it is in."""
        return PurePosixPath(str(self)).parent.name


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


class Files:
    """A read-only view of the files in folders and archives (.zip, .tar, .tar.gz, .tgz, ...); nothing is extracted.

    An archive inside an archive counts as a folder. Hidden files and the ``__MACOSX`` folders of archives are left out.

    Args:
        paths: Folders and archives.

    Raises:
        InputError: A path is neither a folder nor an archive, or an archive is broken or holds an unsafe path.

    Attributes:
        sources: The folders and archives as given.
        all: Every file, sorted.
    """

    def __init__(self, paths: Iterable[Path | str]) -> None:
        self.sources = [str(path) for path in paths]
        self._sources: dict[str, _Folder | _Tar | _Zip] = {}
        self.all: list[File] = []
        for path in map(Path, self.sources):
            if path.is_dir():
                self._add(str(path), _Folder(path))
            elif not path.exists():
                raise InputError(f"{path} does not exist; give a folder or an archive ({', '.join(ARCHIVE_SUFFIXES)})")
            else:
                self._add_archive(str(path), path)
        self.all.sort()

    def read(self, files: Iterable[File]) -> Iterator[tuple[File, bytes]]:
        """Read some of the files, in stored order: compressed archives can only be read in that order.

        Raises:
            InputError: A file cannot be read.
        """
        wanted = defaultdict(set)
        for file in files:
            wanted[file.source].add(file.path)
        for source, paths in wanted.items():
            try:
                for path, data in self._sources[source].read(paths):
                    yield File(source, path), data
            except _BROKEN as error:
                raise _unreadable(source, error) from error

    def byte_range(self, file: File) -> ByteRange:
        """Return the place of ``file`` on disk, for reading in any order.

        Raises:
            InputError: It is in an archive that is compressed, or in another archive.
        """
        found = self._sources[file.source].byte_range(file.path)
        if found is None:
            raise InputError(
                f"{file.source} cannot be read in random order; unpack it, or run `icsd data prepare` on it"
            )
        return found

    def _add(self, name: str, source: _Folder | _Tar | _Zip) -> None:
        if name in self._sources:
            raise InputError(f"{name} is given twice; give every folder and archive once")
        self._sources[name] = source
        for path in source.paths:
            file = File(name, path)
            if not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(path).parts):
                if isinstance(source, _Folder) or not path.lower().endswith(ARCHIVE_SUFFIXES):
                    self.all.append(file)
                else:
                    ((_, data),) = self.read([file])
                    self._add_archive(str(file), io.BytesIO(data))

    def _add_archive(self, name: str, file: Path | io.BytesIO) -> None:
        try:
            source = _Zip(file) if name.lower().endswith(".zip") else _Tar(file)
        except _BROKEN as error:
            raise _unreadable(name, error) from error
        for path, count in Counter(source.paths).items():
            if count > 1:
                raise InputError(f"{name} holds {path} {count} times; make or download the archive again")
            if path.startswith("/") or ".." in PurePosixPath(path).parts or "\\" in path:
                raise InputError(f"{name} holds the unsafe path {path!r}; get the archive from its publisher again")
        self._add(name, source)


def check_new(path: Path) -> None:
    """Raise unless `new_folder` can write ``path``."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not an empty folder; choose a new one, nothing was written")
    if _partial(path).exists():
        raise InputError(f"{_partial(path)} was left by an interrupted run; remove it, unless one still writes there")


def _partial(path: Path) -> Path:
    return path.absolute().with_name(f"{path.absolute().name}.partial")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Write a folder under the name ``path.partial``. It is renamed when it is complete and removed after an error.

    Args:
        path: A missing or empty folder.

    Yields:
        The folder to write to.

    Raises:
        InputError: ``path`` is not empty, or a killed process left its partial folder.
    """
    path = Path(path)
    check_new(path)
    partial = _partial(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]

    def read(self, paths: set[str]) -> Iterator[tuple[str, bytes]]:
        return ((path, (self.root / path).read_bytes()) for path in sorted(paths))

    def byte_range(self, path: str) -> ByteRange:
        return ByteRange(str(self.root / path))


class _Tar:
    def __init__(self, file: Path | io.BytesIO) -> None:
        self.file = file
        with self._open() as tar:
            listing = tqdm(tar, desc=f"listing {tar.name}", unit="file", leave=False, delay=2, disable=None)
            members = [member for member in listing if member.isfile()]
            end = max((member.offset_data + -(-member.size // 512) * 512 for member in members), default=0)
            tar.fileobj.seek(end)
            if len(tar.fileobj.read()) < 512:  # tarfile takes a header cut short for the end, which is zeros
                raise EOFError("unexpected end of data")
            self.uncompressed = isinstance(tar.fileobj, io.BufferedReader)
        self.paths = [_relative(member.name) for member in members]
        self.members = dict(zip(self.paths, members, strict=True))

    def read(self, paths: set[str]) -> Iterator[tuple[str, bytes]]:
        with self._open() as tar:
            for path in sorted(paths, key=lambda path: self.members[path].offset_data):
                yield path, tar.extractfile(self.members[path]).read()

    def byte_range(self, path: str) -> ByteRange | None:
        member = self.members[path]
        if self.uncompressed and not member.issparse():
            return ByteRange(str(self.file), member.offset_data, member.size)
        return None

    def _open(self) -> tarfile.TarFile:
        if isinstance(self.file, Path):
            return tarfile.open(self.file)
        self.file.seek(0)
        return tarfile.open(fileobj=self.file)


class _Zip:
    def __init__(self, file: Path | io.BytesIO) -> None:
        self.file = file
        with zipfile.ZipFile(file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
        self.paths = [_relative(member.filename) for member in members]
        self.members = dict(zip(self.paths, members, strict=True))

    def read(self, paths: set[str]) -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(self.file) as archive:
            for path in sorted(paths, key=lambda path: self.members[path].header_offset):
                yield path, archive.read(self.members[path])

    def byte_range(self, path: str) -> None:
        return None


def _relative(path: str) -> str:
    """Return the path without a leading ``./``."""
    return str(PurePosixPath(path))


def _unreadable(source: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"{source} is truncated or broken ({reason}); download or copy it again")

"""Files in folders and archives, read in place; and new folders that are written completely or not at all."""

from __future__ import annotations

import io
import os.path
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from icsd.data.archives import ARCHIVE_SUFFIXES, ByteRange, Folder, Source, Tar, Zip, broken
from icsd.data.limits import Limits
from icsd.errors import InputError

_DEPTH = 3  # of archives in archives


class File(NamedTuple):
    """A file in a folder or an archive. Its text form is its path: ``CUB_200_2011.tgz/CUB_200_2011/images.txt``."""

    source: str
    """The folder or archive that holds it."""
    path: str
    """The path in that folder or archive, with forward slashes."""

    def __str__(self) -> str:
        return printable(f"{self.source}/{self.path}")

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    @property
    def folder(self) -> str:
        """The name of the folder, or archive, that it is in."""
        return PurePosixPath(f"{self.source}/{self.path}").parent.name


def printable(text: str) -> str:
    """Escape what cannot be printed on one line: line breaks, control characters, and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Files:
    """A read-only view of the files in folders and archives (.zip, .tar, .tar.gz, .tgz, ...); nothing is extracted.

    An archive inside an archive counts as a folder. Hidden files and the ``__MACOSX`` folders of archives are left out.

    Args:
        paths: Folders and archives.
        limits: The largest files that are read.

    Raises:
        InputError: A path is neither a folder nor an archive, or an archive is broken or holds an unsafe path.

    Attributes:
        sources: The folders and archives as given.
        root: The folder below which the names of shards are unique.
        all: Every file, sorted.
        problems: Lines about files and folders that cannot be read.
        limits: The limits as given.
    """

    def __init__(self, paths: Iterable[Path | str], limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.sources = [str(path) for path in paths]
        folders = [path if Path(path).is_dir() else Path(path).parent for path in self.sources]
        self.root = os.path.commonpath(map(os.path.abspath, folders)) if folders else ""
        self.problems: list[str] = []
        self._sources: dict[str, Source] = {}
        self.all: list[File] = []
        for path in map(Path, self.sources):
            if path.is_dir():
                self.add(str(path), Folder(path, self.limits))
            elif not path.exists():
                raise InputError(
                    f"{printable(str(path))} does not exist; give a folder or an archive, {', '.join(ARCHIVE_SUFFIXES)}"
                )
            elif not path.is_file():
                raise InputError(f"{printable(str(path))} is a pipe, a socket or a device; give a folder or an archive")
            else:
                self._add_archive(str(path), path)
        self.all.sort()

    def read(self, files: Iterable[File]) -> Iterator[tuple[File, bytes]]:
        """Read some of the files, in stored order: compressed archives can only be read in that order.

        Raises:
            InputError: A file cannot be read.
        """
        for file, data in self.try_read(files):
            if isinstance(data, InputError):
                raise data
            yield file, data

    def try_read(self, files: Iterable[File]) -> Iterator[tuple[File, bytes | InputError]]:
        """Read some of the files as `read` does, but return the error of a single file in place of its bytes.

        Raises:
            InputError: An archive is broken, so that the files after that place cannot be read.
        """
        wanted = defaultdict(set)
        for file in files:
            wanted[file.source].add(file.path)
        for source, paths in wanted.items():
            reading = self._sources[source].read(paths)
            while True:
                try:
                    path, data = next(reading)
                except StopIteration:
                    break
                except InputError as error:
                    raise _one_line(error) from error
                except Exception as error:  # a broken archive may raise anything
                    raise _one_line(broken(source, error)) from error
                yield File(source, path), _one_line(data) if isinstance(data, InputError) else data

    def byte_range(self, file: File) -> ByteRange:
        """Return the place of ``file`` on disk, for reading in any order.

        Raises:
            InputError: It is in an archive that is compressed, or in another archive.
        """
        found = self._sources[file.source].byte_range(file.path)
        if found is None:
            raise InputError(
                f"{printable(file.source)} cannot be read in random order; unpack it, or run `icsd data prepare` on it"
            )
        return found

    def add(self, name: str, source: Source, depth: int = 0) -> list[File]:
        """Add the files of a source, and return those that can be used."""
        if name in self._sources:
            raise InputError(f"{printable(name)} is given twice; give every folder and archive once")
        self._sources[name] = source
        self.problems += map(printable, source.problems)
        added = []
        for path in source.paths:
            file = File(name, path)
            if any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(path).parts):
                continue
            if not is_unicode(path):
                self.problems.append(f"{file} has a name that is not UTF-8; rename it")
            elif isinstance(source, Folder) or not path.lower().endswith(ARCHIVE_SUFFIXES):
                added.append(file)
            elif depth == _DEPTH:
                raise InputError(f"{file} is an archive in {_DEPTH} other archives; unpack the outer ones")
            else:
                ((_, data),) = self.read([file])
                self._add_archive(str(file), io.BytesIO(data), depth + 1)
        self.all += added
        return added

    def _add_archive(self, name: str, file: Path | io.BytesIO, depth: int = 0) -> None:
        try:
            source = (Zip if name.lower().endswith(".zip") else Tar)(name, file, self.limits)
        except InputError as error:
            raise _one_line(error) from error
        except Exception as error:  # a broken archive may raise anything
            raise _one_line(broken(name, error)) from error
        for path, count in Counter(source.paths).items():
            if count > 1:
                raise InputError(
                    f"{printable(name)} holds {printable(path)} {count} times; make or download the archive again"
                )
            if path.startswith("/") or ".." in PurePosixPath(path).parts or "\\" in path or "\0" in path:
                raise InputError(
                    f"{printable(name)} holds the unsafe path {path!r}; get the archive from its publisher again"
                )
        self.add(name, source, depth)


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


def is_unicode(text: str) -> bool:
    """Return False for text with lone surrogates: Python's form of bytes that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _one_line(error: InputError) -> InputError:
    return InputError(printable(str(error)))

"""Records of captioned images, read from the files of a set before any image is decoded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from icsd.data.captions import Vocabulary, tokenize
from icsd.data.dataset import Split
from icsd.data.files import File, Files
from icsd.errors import InputError


@dataclass(frozen=True)
class Record:
    """A captioned image."""

    name: str
    """Unique in its set: a path with suffix, such as ``001.Black_footed_Albatross/Black_Footed_Albatross_0001.jpg``."""
    image: File
    captions: list[str]
    class_name: str | None = None
    split: Split | None = None
    box: tuple[float, float, float, float] | None = None
    """Left, top, width and height of the object in the image, in pixels."""

    @property
    def label(self) -> tuple[str, bool]:
        """The class. An image without one is a class of its own, which no name of a class can equal."""
        return (self.class_name, True) if self.class_name else (self.name, False)


@dataclass
class Listing:
    """The captioned images of a set."""

    records: list[Record]
    problems: list[str] = field(default_factory=list)
    """Lines about images that are missing or broken, each with a remedy; these images are not among the records."""
    notes: list[str] = field(default_factory=list)
    """Lines about anything unusual that is kept."""
    vocabulary: Vocabulary | None = None
    """The words of the released text encoder of this set."""


def read_texts(files: Files, wanted: Iterable[File], problems: list[str] | None = None) -> dict[File, str]:
    """Read text files.

    Args:
        files: The files that hold them.
        wanted: The text files.
        problems: Gets a line for each file that cannot be read, which is left out.

    Raises:
        InputError: A file cannot be read or is not UTF-8, and ``problems`` is None.
    """
    texts = {}
    for file, data in files.try_read(wanted):
        try:
            if isinstance(data, InputError):
                raise data
            texts[file] = _decode(file, data)
        except InputError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return texts


def _decode(file: File, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} cannot be read as UTF-8 text ({error}); save it as UTF-8") from error


def clean(lines: Iterable[str]) -> list[str]:
    """Return the captions among lines of text: the lines with a word, with single spaces."""
    return [" ".join(line.split()) for line in lines if tokenize(line)]


def clean_once(lines: Iterable[str]) -> list[str]:
    """Return the captions among lines of text as `clean` does, but the same caption only once."""
    return list(dict.fromkeys(clean(lines)))


def such_as(items: list[str], what: str) -> str:
    """Return the first items, and how many more there are: ``a.png, b.png, c.png and 5 more images``."""
    more = f" and {len(items) - 3} more {what}" if len(items) > 3 else ""
    return ", ".join(items[:3]) + more

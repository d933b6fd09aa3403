"""The files of a folder or archive of captioned images, sorted by what they are."""

from __future__ import annotations

import os.path
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from icsd.data.archives import ARCHIVE_SUFFIXES
from icsd.data.files import File, Files, printable
from icsd.data.images import is_image, is_other_image
from icsd.data.lists import NAMES, SUFFIXES, is_list
from icsd.data.records import Listing, such_as
from icsd.errors import InputError

# Files that lie beside the images of many sets and hold no captions; and what a prepared set holds beside its images.
_DOCUMENTS = (
    "attribution",
    "changelog",
    "classes",
    "copying",
    "licence",
    "license",
    "notice",
    "readme",
    "requirements",
)
_PREPARED = ("ATTRIBUTION", "set.json", "captions.pickle", "filenames.pickle", "class_info.pickle")
_OTHER_ARCHIVES = (".7z", ".gz", ".lz4", ".rar", ".zst")


@dataclass
class Contents:
    """The files of one folder or archive, by their names below its root.

    Names are in composed Unicode (NFC), so that names that look the same are the same.
    """

    images: dict[str, File] = field(default_factory=dict)
    texts: dict[str, File] = field(default_factory=dict)
    """Text files that may hold the captions of one image."""
    lists: dict[str, File] = field(default_factory=dict)
    parquet: dict[str, File] = field(default_factory=dict)
    others: dict[str, File] = field(default_factory=dict)


def sort_files(files: Files) -> Contents:
    """Sort the files of one folder or archive.

    Raises:
        InputError: Several folders or archives were given, or two names differ only in their Unicode form.
    """
    if len(files.sources) != 1:
        raise InputError(f"{' and '.join(map(printable, files.sources))}: give one folder or archive, not several")
    start = len(files.sources[0].rstrip("/")) + 1
    paths = {file: f"{file.source}/{file.path}"[start:] for file in files.all}
    packed = not Path(files.sources[0]).is_dir()
    top = os.path.commonpath([os.path.dirname(path) for path in paths.values()]) if packed and paths else ""
    found = Contents()
    for file, path in paths.items():
        name = unicodedata.normalize("NFC", os.path.relpath(path, top or "."))
        kind = getattr(found, _kind(file.name))
        if name in kind:
            raise InputError(f"{kind[name]} and {file} have names that look the same (Unicode NFC and NFD); rename one")
        kind[name] = file
    return found


def _kind(name: str) -> str:
    lower = name.lower()
    if is_image(lower):
        return "images"
    if lower.endswith(".parquet"):
        return "parquet"
    if is_list(lower) and lower.endswith(SUFFIXES):
        return "lists"
    return "texts" if lower.endswith(".txt") else "others"


def is_document(file: File) -> bool:
    """Return True for a text file that is no list of captions by its name, such as README.txt."""
    return file.name.lower().startswith(_DOCUMENTS)


def report_others(found: Contents, listing: Listing) -> None:
    """Note the files that are not read: by name those that look like images, archives or lists."""
    rest = {name: file for name, file in found.others.items() if file.name not in _PREPARED}
    for belongs, remedy in (
        (is_other_image, "the format is not read; convert it to JPEG or PNG"),
        (
            lambda name: name.lower().endswith((*ARCHIVE_SUFFIXES, *_OTHER_ARCHIVES)),
            "is not read; unpack it, or move it",
        ),
        (is_list, f"not read; a list of captions ends in {', '.join(SUFFIXES)}"),
    ):
        chosen = {name: file for name, file in rest.items() if belongs(file.name)}
        if chosen:
            listing.notes.append(f"{such_as(list(map(str, chosen.values())), 'files')}: {remedy}")
        rest = {name: file for name, file in rest.items() if name not in chosen}
    if rest:
        kinds = Counter(os.path.splitext(file.name)[1].lower() or file.name for file in rest.values())
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        listing.notes.append(f"files that are neither images nor captions were not read: {printable(counted)}")


def unread_list(found: Contents) -> str:
    """Return a remark on a file that may be a list of captions under another name, or nothing."""
    suffixes = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".xlsx", ".parquet")
    lists = [file for file in found.others.values() if file.name.lower().endswith(suffixes)]
    lists += [file for file in found.texts.values() if is_list(file.name)]
    if found.lists or not lists:
        return ""
    names = " or ".join(f"{name}{SUFFIXES[0]}" for name in NAMES)
    return f" ({lists[0].name} is not read: a list must be named {names}, or end in {', '.join(SUFFIXES[1:])})"

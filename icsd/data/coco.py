"""COCO captions: images beside ``captions_train2017.json`` and the like, as published or in the same form.

A list holds ``images`` (``id``, ``file_name``) and ``annotations`` (``image_id``, ``caption``). Lists and folders named
val or test are held out of training.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.files import File, Files, printable
from icsd.data.images import is_image
from icsd.data.lists import captions_of, parse_json
from icsd.data.records import Listing, Record, clean_once, read_texts, such_as
from icsd.data.splits import held_out_part, with_held_out
from icsd.data.stored import open_listing
from icsd.errors import InputError

_LIST = re.compile(r"captions.*\.json|.*\bcoco\b.*\.json", re.IGNORECASE)


def open_coco(config: DataConfig, split: Split, side: int) -> CaptionedImages:
    """Open one split of a folder of COCO captions; see `read_coco` and `icsd.data.open_dataset`."""
    files = Files([config.root], config.limits)
    return open_listing(Path(config.root).resolve().name, read_coco(files), files, config, split, side)


def read_coco(files: Files) -> Listing:
    """List the images of COCO captions.

    Raises:
        InputError: There is no list, or one cannot be read or contradicts itself.
    """
    lists = [file for file in files.all if _LIST.fullmatch(file.name)]
    if not lists:
        raise InputError(
            f"{' and '.join(map(printable, files.sources))} hold no captions_*.json; give annotations_trainval2017.zip "
            "as well, or its folder"
        )
    images: dict[str, list[File]] = defaultdict(list)
    for file in files.all:
        if is_image(file.name):
            images[_nfc(file.name)].append(file)
    listing = Listing([], problems=list(files.problems))
    reader = _Reader(images, listing)
    for file, text in read_texts(files, lists).items():
        reader.read(file, text)
    reader.report(sum(map(len, images.values())))
    return listing


class _Reader:
    """Reader of lists that collects the records and what is missing."""

    def __init__(self, images: Mapping[str, list[File]], listing: Listing) -> None:
        self.images, self.listing = images, listing
        self.records: dict[File, Record] = {}
        self.held_out: dict[str, str | None] = {}
        self.missing: list[str] = []
        self.without_caption: list[str] = []

    def read(self, source: File, text: str) -> None:
        """Add the images of one list."""
        entries, captions = _parse(source, text)
        for number, name in entries.items():
            image = self._find(source, name)
            lines = clean_once(captions.get(number, []))
            if image is None:
                self.missing.append(f"{source} names {name!r}")
            elif not lines:
                self.without_caption.append(str(image))
            elif image in self.records:
                raise InputError(f"{source} names {image}, which another entry has named; keep one")
            else:
                name = str(PurePosixPath(PurePosixPath(image.source).name) / image.path)
                self.records[image] = Record(name, image, lines)
                part = source.name.rpartition(".")[0]
                self.held_out[name] = held_out_part(part, shard=True) or held_out_part(image.folder)

    def report(self, count: int) -> None:
        """Move the records to the listing, and add its problems and notes."""
        if self.missing:
            more = f" ({len(self.missing)} such images)" if len(self.missing) > 1 else ""
            self.listing.problems.append(f"{self.missing[0]}, which is not there{more}; give the archive that holds it")
        if self.without_caption:
            self.listing.problems.append(
                f"{such_as(self.without_caption, 'images')} has no caption in the list; add one, or remove the image"
            )
        unlisted = count - len(self.records) - len(self.without_caption)
        if unlisted > 0:
            self.listing.problems.append(f"{unlisted} images are in no list; give its captions_*.json or remove them")
        self.listing.records, notes = with_held_out(list(self.records.values()), self.held_out)
        self.listing.notes += notes

    def _find(self, source: File, name: str) -> File | None:
        """Return the image of an entry: the only one of its name, or that of the folder that the list is made for."""
        path = _nfc(PurePosixPath(name).as_posix())
        found = [
            file for file in self.images.get(PurePosixPath(path).name, []) if f"/{_nfc(file.path)}".endswith(f"/{path}")
        ]
        if len(found) > 1:
            folder = source.name.rpartition(".")[0].rpartition("_")[2]  # train2017 of captions_train2017.json
            near = [file for file in found if folder in PurePosixPath(str(file)).parts]
            near = near or [file for file in found if file.folder == source.folder]
            if len(near) != 1:
                raise InputError(f"{source} names {name!r}, which may be {found[0]} or {found[1]}; give one of the two")
            found = near
        return found[0] if found else None


def _parse(source: File, text: str) -> tuple[dict[Any, str], dict[Any, list[str]]]:
    """Return the file name and the captions of each image number of a list."""
    try:
        content = parse_json(text)
    except ValueError as error:
        raise InputError(f"{source} cannot be read as JSON ({printable(str(error))}); download it again") from error
    entries: dict[Any, str] = {}
    for place, entry in _entries(source, content, "images", {"id": (int, str), "file_name": str}):
        if entry["id"] in entries:
            raise InputError(f"{place} has the id {entry['id']!r} of an earlier image; make or download the list again")
        entries[entry["id"]] = entry["file_name"]
    captions: dict[Any, list[str]] = defaultdict(list)
    for place, entry in _entries(source, content, "annotations", {"image_id": (int, str)}):
        if entry["image_id"] not in entries:
            raise InputError(f"{place} has the image_id {entry['image_id']!r}, which no image has; correct it")
        captions[entry["image_id"]] += captions_of(place, entry)
    return entries, captions


def _entries(source: File, content: Any, key: str, types: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise InputError(f'{source} must hold a list named "{key}"; it is not a list of COCO captions')
    entries = []
    for number, row in enumerate(rows):
        place = f"{source}, {key}[{number}],"
        for name, kind in types.items():
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise InputError(f"{place} must hold {name!r}; make or download the list again")
        entries.append((place, row))
    return entries


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)

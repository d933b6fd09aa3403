"""Reader and writer of folders of images with captions."""

from __future__ import annotations

import csv
import io
import json
import os.path
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import Image

from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.files import File, Files, new_folder
from icsd.data.images import IMAGE_SUFFIXES
from icsd.data.records import Listing, Record, clean, open_records, read_text
from icsd.errors import InputError

_LISTS = ("captions.csv", "captions.jsonl")


def open_folder(config: DataConfig, split: Split, resolution: int) -> CaptionedImages:
    """Open one split of a folder, its subfolders included; see `read_folder` and `icsd.data.open_dataset`."""
    root = Path(config.root)
    if not root.is_dir():
        raise InputError(f"data.root={root} is not a folder; give the folder that holds the images")
    files = Files([root])
    return open_records(root.resolve().name, read_folder(files), files, config, split, resolution)


def read_folder(files: Files) -> Listing:
    """List the images of one folder or archive.

    Captions come from ``captions.csv`` (columns file, caption) or ``captions.jsonl`` (keys file, caption), where an
    image may have several rows, and in JSONL a caption may be a list of captions. Both may also hold the class and the
    split (train or test). Without such a list, captions come from a ``.txt`` beside each image, one per line. Lines
    without a word and hidden files are skipped.

    Raises:
        InputError: There are no images, or the captions cannot be read or contradict each other.
    """
    images = [file for file in files.all if file.name.lower().endswith(IMAGE_SUFFIXES)]
    if len(images) < 2 or len({file.source for file in files.all}) > 1:
        found = f"{' and '.join(files.sources)} holds {len(images)} images ({', '.join(IMAGE_SUFFIXES)})"
        raise InputError(f"{found}; give one folder or archive with at least 2, one to train and one to test")
    root = os.path.commonpath([os.path.dirname(file.path) for file in files.all])
    names = {os.path.relpath(file.path, root or "."): file for file in images}
    lists = [file for file in files.all if file.path in (os.path.join(root, name) for name in _LISTS)]
    if len(lists) > 1:
        raise InputError(f"{files.sources[0]} holds both {' and '.join(_LISTS)}; keep one")
    return _from_list(files, names, lists[0]) if lists else _from_texts(files, names)


def write_folder(dataset: CaptionedImages, path: Path) -> None:
    """Write every image as PNG with its captions beside it, in the form that `open_folder` reads.

    Args:
        dataset: Images to write, at their own resolution.
        path: A new or empty folder. The attribution of the images is written there too.

    Raises:
        InputError: ``path`` is not empty.
        OSError: The disk is full, for example; nothing is left behind.
    """
    with new_folder(path) as folder:
        for index, captions in enumerate(dataset.captions):
            stem = folder / f"{dataset.split}_{index:06d}"
            Image.fromarray(dataset.images[index].permute(1, 2, 0).numpy()).save(stem.with_suffix(".png"))
            stem.with_suffix(".txt").write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
        if dataset.attribution:
            (folder / "ATTRIBUTION").write_text(f"{dataset.attribution}\n", encoding="utf-8")


def _from_texts(files: Files, names: dict[str, File]) -> Listing:
    """Make records of images with a ``.txt`` beside each."""
    paths = {file.path: file for file in files.all}
    text_of = {name: paths.get(str(PurePosixPath(file.path).with_suffix(".txt"))) for name, file in names.items()}
    texts = read_text(files, {text for text in text_of.values() if text})
    captions = {name: clean(texts[text].split("\n")) if text else [] for name, text in text_of.items()}
    listing = Listing([Record(name, names[name], lines) for name, lines in captions.items() if lines])
    listing.problems += [f"{text} holds no caption; write one per line" for text in texts if not clean([texts[text]])]
    missing = [name for name, text in text_of.items() if not text]
    if missing:
        listing.problems.append(_without_caption(names, missing, f"{PurePosixPath(missing[0]).with_suffix('.txt')}"))
    return listing


def _from_list(files: Files, names: dict[str, File], source: File) -> Listing:
    """Make records of images whose captions are in a list."""
    ((_, text),) = read_text(files, [source]).items()
    captions: dict[str, list[str]] = {name: [] for name in names}
    classes: dict[str, str] = {}
    splits: dict[str, Split] = {}
    for place, row in (_csv_rows if source.name.endswith(".csv") else _jsonl_rows)(source, text):
        name = PurePosixPath(row.file).as_posix()
        if name not in captions:
            raise InputError(f"{place} names {row.file!r}, which is not an image in {files.sources[0]}; correct it")
        if row.split not in ("train", "test", None):
            raise InputError(f"{place} has the split {row.split!r}; it must be train or test")
        captions[name] += clean(row.captions)
        for known, value in ((classes, row.class_name), (splits, row.split)):
            if value is not None and known.setdefault(name, value) != value:
                raise InputError(f"{place} puts {name} into {value!r}, an earlier row into {known[name]!r}; keep one")
    rows = [(name, lines, classes.get(name), splits.get(name)) for name, lines in captions.items()]
    listing = Listing([Record(name, names[name], *rest) for name, *rest in rows if rest[0]])
    missing = [name for name, lines in captions.items() if not lines]
    if missing:
        listing.problems.append(_without_caption(names, missing, f"a row in {source.name}"))
    return listing


def _without_caption(names: dict[str, File], missing: list[str], remedy: str) -> str:
    more = f", nor have {len(missing) - 1} more" if len(missing) > 1 else ""
    return f"{names[missing[0]]} has no caption{more}; write {remedy} or take the image out of the folder"


class _Row(NamedTuple):
    file: str
    captions: list[str]
    class_name: str | None
    split: str | None


def _csv_rows(source: File, text: str) -> Iterator[tuple[str, _Row]]:
    reader = csv.DictReader(io.StringIO(text))
    try:
        if not {"file", "caption"} <= set(reader.fieldnames or ()):
            raise InputError(f"{source} has the columns {reader.fieldnames or []}; its first line must be file,caption")
        for row in reader:
            optional = (row.get(key) or None for key in ("class", "split"))
            yield f"{source}, line {reader.line_num},", _Row(row["file"] or "", [row["caption"] or ""], *optional)
    except csv.Error as error:
        raise InputError(f"{source} is not CSV after line {reader.line_num} ({error}); correct the file") from error


def _jsonl_rows(source: File, text: str) -> Iterator[tuple[str, _Row]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number},"
        try:
            row = json.loads(line)
            captions = [row["caption"]] if isinstance(row["caption"], str) else list(row["caption"])
            row = _Row(row["file"], captions, row.get("class"), row.get("split"))
            values = [row.file, *row.captions, *(value for value in row[2:] if value is not None)]
        except (ValueError, TypeError, KeyError, AttributeError):
            values = [None]
        if not all(isinstance(value, str) for value in values):
            raise InputError(f'{place} must read {{"file": "name.png", "caption": "a sentence"}}')
        yield place, row

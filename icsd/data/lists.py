"""Lists of captions: rows of CSV, TSV, JSON Lines and Parquet files.

A row names an image and holds its caption or captions, and may hold a class and a split. Columns have the names of
this package (``file``, ``caption``, ``class``, ``split``), of Hugging Face (``file_name``, ``text``) or of Flickr8k and
Flickr30k (``image``, ``image_name``, ``comment``). Other columns are not read.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from icsd.data.dataset import Split
from icsd.data.files import File, is_unicode, printable
from icsd.errors import InputError

NAMES = ("captions", "metadata")
"""The names of a list, without suffix."""

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".parquet")
"""The suffixes of a list. Files with ``.txt`` are read as CSV if they begin with its header."""

FILE_KEYS = ("file", "file_name", "filename", "image", "image_name")
CAPTION_KEYS = ("caption", "captions", "text", "comment")

_HELD_OUT = ("test", "testing", "val", "valid", "validation", "dev")
_SPLITS: dict[str, Split] = {"train": "train", "training": "train", **dict.fromkeys(_HELD_OUT, "test")}


class Row(NamedTuple):
    """A row of a list."""

    place: str
    """The file and line, for messages."""
    file: str
    captions: list[str]
    class_name: str | None
    split: Split | None


def is_list(name: str) -> bool:
    """Return True if a file of this name is a list of captions, or is called like one but has another suffix."""
    return PurePosixPath(name).name.lower().partition(".")[0] in NAMES


def read_list(source: File, text: str, images: Collection[str]) -> Iterator[Row]:
    """Read the rows of a list.

    Args:
        source: The list.
        text: Its content.
        images: Names of image files, to find a row that an open quotation mark swallowed.

    Raises:
        InputError: A row cannot be read; the message names the file, the line and the key.
    """
    if source.name.lower().endswith(".jsonl"):
        return _jsonl_rows(source, text)
    return _csv_rows(source, text, images)


def looks_like_csv(text: str) -> bool:
    """Return True if a text begins with the header of a list."""
    return _delimiter(text) is not None


def parse_json(text: str) -> Any:
    """Parse JSON strictly: a key that is there twice, and values that are nested too deeply, are errors.

    Raises:
        ValueError: The text cannot be parsed.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_repeated_keys)
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def make_row(place: str, values: Mapping[str, Any]) -> Row:
    """Make a row of the values of an object; see the module for the keys.

    Raises:
        InputError: A value is missing or of a wrong type; the message names the place and the key.
    """
    file_key, file = _one_of(place, values, FILE_KEYS)
    if not isinstance(file, str) or not file:
        raise _expected(place, file_key, file, "the name of an image file")
    return Row(place, file, captions_of(place, values), class_of(place, values), split_of(place, values))


def captions_of(place: str, values: Mapping[str, Any], required: bool = True) -> list[str]:
    """Return the captions of an object: a sentence, a list of sentences, or null for none."""
    key, content = _one_of(place, values, CAPTION_KEYS, required)
    sentences = content if isinstance(content, list) else [content]
    for sentence in sentences:
        if not isinstance(sentence, str) and sentence is not None:
            raise _expected(place, key, content if sentences == [content] else sentence, "a sentence or a list of them")
        if sentence and not is_unicode(sentence):
            raise InputError(f"{place} holds half of a character (a lone surrogate) in {key!r}; correct the caption")
    return [sentence for sentence in sentences if sentence]


def class_of(place: str, values: Mapping[str, Any]) -> str | None:
    """Return the class of an object: a name or a whole number, or null for none."""
    value = values.get("class")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _expected(place, "class", value, "a name or a whole number")
    if isinstance(value, str) and not is_unicode(value):
        raise InputError(f"{place} holds half of a character (a lone surrogate) in 'class'; correct the name")
    return str(value)


def split_of(place: str, values: Mapping[str, Any]) -> Split | None:
    """Return the split of an object: train or test (or val, which is held out as well), or null for none."""
    value = values.get("split")
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value.lower() not in _SPLITS:
        raise InputError(f"{place} has the split {value!r}; it must be train or test (val counts as test)")
    return _SPLITS[value.lower()]


def _one_of(place: str, values: Mapping[str, Any], keys: Iterable[str], required: bool = True) -> tuple[str, Any]:
    found = [key for key in keys if key in values]
    if len(found) > 1:
        raise InputError(f"{place} has both {found[0]!r} and {found[1]!r}; keep one")
    if not found and required:
        wanted = " or ".join(map(repr, keys))
        raise InputError(f"{place} must read {_EXAMPLE}: it has no {wanted}")
    return (found[0], values[found[0]]) if found else ("", None)


_EXAMPLE = '{"file": "name.png", "caption": "a sentence"}'
_KINDS = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number", str: "a text"}


def _expected(place: str, key: str, value: Any, expected: str) -> InputError:
    kind = "null" if value is None else _KINDS.get(type(value), type(value).__name__)
    return InputError(f"{place} must read {_EXAMPLE}: {key!r} must be {expected}, not {kind}")


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return values


def _jsonl_rows(source: File, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{source}, line {number},"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise InputError(f"{place} must read {_EXAMPLE}: {printable(str(error))}") from error
        if not isinstance(values, dict):
            raise InputError(f"{place} must read {_EXAMPLE}")
        yield make_row(place, values)


def _delimiter(text: str) -> str | None:
    """Return the delimiter of a CSV file: the one that makes a header of its first line."""
    header = text.lstrip("\r\n").partition("\n")[0]
    for delimiter in ",\t;|":
        names = _names(header.replace('"', "").split(delimiter))
        if set(names) & set(FILE_KEYS) and set(names) & set(CAPTION_KEYS):
            return delimiter
    return None


def _names(header: list[str]) -> list[str]:
    return [name.strip().lower() for name in header]


def _csv_rows(source: File, text: str, images: Collection[str]) -> Iterator[Row]:
    delimiter = _delimiter(text)
    if delimiter is None:
        header = printable(text.lstrip("\r\n").partition("\n")[0].strip()[:80])
        raise InputError(
            f"{source} begins with {header!r}; its first line must be file,caption (class and split may follow)"
        )
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            place = f"{source}, line {start},"
            if not any(field.strip() for field in fields):
                pass
            elif not header:
                header = _names(fields)
                if len(set(header)) < len(header):
                    raise InputError(f"{place} names a column twice: {printable(', '.join(header))}; keep one")
            else:
                _check_row(place, fields, header, delimiter)
                if reader.line_num > start:
                    _check_lines(source, text, start, reader.line_num, delimiter, images)
                yield make_row(place, dict(zip(header, fields, strict=True)))
            start = reader.line_num + 1
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            raise InputError(
                f"{source}, line {start}, opens a quotation mark that is never closed; close it"
            ) from error
        raise InputError(
            f"{source} is not CSV after line {start - 1} ({error}); put captions in quotation marks, and write a "
            'quotation mark in a caption as ""'
        ) from error


def _check_row(place: str, fields: list[str], header: list[str], delimiter: str) -> None:
    if len(fields) == len(header):
        return
    columns = printable(delimiter.join(header))
    if len(fields) > len(header):
        raise InputError(
            f"{place} has {len(fields)} fields, more than the header ({columns}); "
            f"put a caption that contains {delimiter!r} in quotation marks"
        )
    raise InputError(
        f"{place} has {len(fields)} of {len(header)} fields ({columns}): {fields[0]!r} has no caption, "
        "or a caption with a line break is not in quotation marks"
    )


def _check_lines(source: File, text: str, start: int, end: int, delimiter: str, images: Collection[str]) -> None:
    """Raise if a quoted field of several lines holds what looks like the row of another image."""
    for number, line in enumerate(text.split("\n")[start:end], start=start + 1):
        name = line.partition(delimiter)[0].strip().strip('"')
        if name in images:
            raise InputError(
                f"{source}, line {start}, opens a quotation mark that is closed only in line {end}, after the row of "
                f"{name!r} in line {number}; close it"
            )

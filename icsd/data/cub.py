"""CUB-200-2011 (Wah et al. 2011) with the captions of Reed et al. 2016, as published.

The images are ``CUB_200_2011/images/<class>/<image>.jpg`` beside ``images.txt`` (``<id> <class>/<image>.jpg``) and
``bounding_boxes.txt`` (``<id> <left> <top> <width> <height>``). The captions, ``<class>/<image>.txt``, and the classes
of each split come from one of two public archives: AttnGAN's ``birds.zip``, whose vocabulary is kept for the released
encoders, or Reed's ``text_c10`` with ``trainvalclasses.txt`` and ``testclasses.txt``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

from icsd.data.attngan import read_vocabulary
from icsd.data.files import File, Files
from icsd.data.records import Listing, read_texts, such_as
from icsd.data.zero_shot import class_key, compare_counts, read_captions
from icsd.errors import InputError

KNOWN = {"train": (8855, 150), "test": (2933, 50)}
"""The number of images and classes of each split."""


def read_cub(files: Files) -> Listing:
    """List the images, each with the box of its bird; see `icsd.data.zero_shot.read_captions`.

    Raises:
        InputError: A part of the set is missing, given twice, broken, or contradicts itself.
    """
    index = _only(files, "images.txt")
    boxes = _only(files, "bounding_boxes.txt")
    texts = read_texts(files, [index, boxes])
    paths = {number: path for number, (path,) in _rows(index, texts[index], 1).items()}
    for path, count in Counter(paths.values()).items():
        if count > 1:
            raise InputError(f"{index} lists {path} {count} times; get CUB_200_2011.tgz again")
    found = {number: _box(boxes, number, row) for number, row in _rows(boxes, texts[boxes], 4).items()}

    folder = PurePosixPath(index.path).parent / "images"
    present = set(files.all)
    images = {number: File(index.source, str(folder / path)) for number, path in paths.items()}
    lost = [image for image in images.values() if image not in present]
    unboxed = [number for number in images if number not in found]
    wanted = {
        (image.folder, image.name.rpartition(".")[0]): image
        for number, image in images.items()
        if image in present and number in found
    }
    listing = read_captions(files, wanted)
    box_of = {image: found[number] for number, image in images.items() if number in found}
    listing.records = [replace(record, box=box_of[record.image]) for record in listing.records]
    if lost:
        listing.problems.append(f"{len(lost)} of {len(paths)} images are missing, such as {lost[0]}")
    if unboxed:
        listing.problems.append(
            f"{boxes} has no box of {len(unboxed)} of {len(paths)} images, such as number {unboxed[0]}"
        )
    listing.problems += _unlisted(files, index, folder, images.values())
    compare_counts(listing, KNOWN)
    vocabularies = [file for file in files.all if file.name == "captions.pickle"]
    if vocabularies:
        vocabulary = _only(files, "captions.pickle")
        ((_, data),) = files.read([vocabulary])
        listing.vocabulary = read_vocabulary(vocabulary, data)
        captions = (caption for record in listing.records for caption in record.captions)
        unknown = sorted({word for caption in captions for word in listing.vocabulary.unknown(caption)})
        if unknown:
            listing.notes.append(f"{len(unknown)} words of captions are not in {vocabulary}, the first is {unknown[0]}")
    return listing


def _unlisted(files: Files, index: File, folder: PurePosixPath, listed: Iterable[File]) -> list[str]:
    """Return lines about images and captions of which the index says nothing."""
    images = set(listed)
    names = {(class_key(image.folder), image.name.rpartition(".")[0]) for image in images}
    classes = {class_name for class_name, _ in names}
    loose = [
        str(file)
        for file in files.all
        if file not in images and file.source == index.source and folder in PurePosixPath(file.path).parents
    ]
    texts = [
        str(file)
        for file in files.all
        if file.name.endswith(".txt")
        and class_key(file.folder) in classes
        and (class_key(file.folder), file.name.removesuffix(".txt")) not in names
    ]
    return [
        f"{such_as(found, what)} is not in {index}; get CUB_200_2011.tgz again, or remove it"
        for found, what in ((loose, "files"), (texts, "caption files"))
        if found
    ]


def _only(files: Files, name: str) -> File:
    """Return the only file of this name."""
    found = [file for file in files.all if file.name == name]
    if not found:
        raise InputError(f"{' and '.join(files.sources)} hold no {name}; give CUB_200_2011.tgz, or its folder, as well")
    if len(found) > 1:
        raise InputError(f"{found[0]} and {found[1]} are the same kind of file; give one of the two")
    return found[0]


def _rows(file: File, text: str, length: int) -> dict[str, list[str]]:
    """Return rows of ``<id> <values>`` by id; empty lines are skipped."""
    rows: dict[str, list[str]] = {}
    for line, row in enumerate(map(str.split, text.split("\n")), start=1):
        if not row:
            continue
        number, *values = row
        if len(values) != length:
            raise InputError(f"{file}, line {line}, must hold {length + 1} values; get CUB_200_2011.tgz again")
        if number in rows:
            raise InputError(f"{file}, line {line}, holds the id {number} a second time; get CUB_200_2011.tgz again")
        rows[number] = values
    return rows


def _box(file: File, number: str, row: list[str]) -> tuple[float, float, float, float]:
    try:
        left, top, width, height = map(float, row)
    except ValueError:
        width = height = math.nan
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise InputError(f"{file} has {' '.join(row)!r} where image {number} needs a box; get CUB_200_2011.tgz again")
    return left, top, width, height

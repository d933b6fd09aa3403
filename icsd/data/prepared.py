"""Prepared sets: images that were cropped and reduced once, with their captions, classes and splits.

A prepared set is a folder that `icsd.data.folder` reads: ``images/`` and a ``captions.jsonl`` with captions, classes
and splits. ``set.json`` describes the set and lists its problems; the pickles of `icsd.data.attngan` are written too.
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from tqdm import tqdm

from icsd.data.attngan import make_pickles
from icsd.data.captions import Vocabulary
from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.files import File, Files, check_new, new_folder
from icsd.data.folder import open_folder
from icsd.data.images import limit_aspect, open_image, to_rgb, to_short_side, unreadable
from icsd.data.limits import Limits
from icsd.data.lists import parse_json
from icsd.data.records import Listing, Record
from icsd.errors import InputError

FORMAT_VERSION = 1

_QUALITY = 95  # JPEG quality, with full color resolution: an image of 304 pixels takes about 45 KB
_LONGEST_NAME = 255  # bytes, in the file systems in use


def open_prepared(config: DataConfig, split: Split, resolution: int) -> CaptionedImages:
    """Open one split of what `write_prepared` wrote; see `icsd.data.open_dataset`."""
    path = Path(config.root) / "set.json"
    remedy = f"make one with `icsd data prepare {config.name} DOWNLOADS... FOLDER`"
    try:
        about = parse_json(path.read_text(encoding="utf-8"))
        found = (about["set"], about["format"])
        vocabulary = about["vocabulary"] and Vocabulary(about["vocabulary"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"data.root={config.root} is not a prepared set ({error}); {remedy}") from error
    if found != (config.name, FORMAT_VERSION):
        raise InputError(
            f"{path} is a prepared set of {found[0]}, format {found[1]}, but data.name={config.name}; {remedy}"
        )
    dataset = open_folder(config, split, resolution)
    dataset.name = config.name
    dataset.vocabulary = vocabulary
    return dataset


@dataclass
class Prepared:
    """The result of `write_prepared`."""

    left_out: list[str]
    """One line for each image that was left out."""
    size: int
    """The bytes that the images take."""


def write_prepared(
    name: str,
    listing: Listing,
    files: Files,
    out: Path,
    *,
    size: int = 304,
    workers: int = 1,
    partial: bool = False,
    dry_run: bool = False,
) -> Prepared:
    """Crop, reduce and write every image of a listing, with its captions, class and split.

    Args:
        name: The value of ``data.name`` that opens the set again.
        listing: The images, each with a split.
        files: The files that hold them.
        out: A new or empty folder. It is written completely or not at all.
        size: The largest shorter side of the images, in pixels; smaller images are not enlarged.
        workers: Number of threads that decode in parallel; 0 decodes in the calling thread.
        partial: Leave out images that cannot be read, and list them in ``set.json``.
        dry_run: Do everything but write.

    Raises:
        InputError: ``out`` is not empty, two images have the same name, or an image cannot be read.
        OSError: The disk is full, for example; nothing is left behind.
    """
    check_targets(listing)
    with _checked_folder(out) if dry_run else new_folder(out) as folder:
        sizes: list[int] = []
        broken: dict[str, str] = {}

        def write(record: Record, data: bytes | InputError) -> None:
            try:
                encoded = _encode(data, record, size, files.limits)
            except InputError as error:
                if not partial:
                    raise
                broken[record.name] = str(error)
                return
            sizes.append(len(encoded))
            if folder:
                target = folder / _target(record)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(encoded)

        _for_each_image(listing, files, workers, write)
        result = Prepared([broken[name] for name in sorted(broken)], sum(sizes))
        records = [record for record in listing.records if record.name not in broken]
        listing = replace(listing, records=records, problems=listing.problems + result.left_out)
        missing = sorted({"train", "test"} - {record.split for record in records})
        if missing:
            raise InputError(f"nothing is left of the {missing[0]} split: {result.left_out[0]}")
        if folder:
            _write_texts(folder, name, listing, size)
    return result


def check_targets(listing: Listing) -> None:
    """Raise InputError unless every image of a listing can be written under a name of its own."""
    targets: dict[str, File] = {}
    for record in listing.records:
        target = _target(record)
        other = targets.setdefault(target, record.image)
        if other is not record.image:
            raise InputError(f"{other} and {record.image} would become one file; rename one of them")
        if max(len(part.encode()) for part in PurePosixPath(target).parts) > _LONGEST_NAME:
            raise InputError(f"{record.image} has a name of more than {_LONGEST_NAME} bytes; rename it")
    for target, image in targets.items():
        for parent in PurePosixPath(target).parents:
            if str(parent) in targets:
                raise InputError(f"{targets[str(parent)]} would become a file, and a folder for {image}; rename one")


def describe(listing: Listing) -> dict[str, dict[str, int]]:
    """Count the images, classes (where every image has one) and captions of each split."""
    about = {}
    for split in ("train", "test"):
        records = [record for record in listing.records if record.split == split]
        classes = {record.class_name for record in records}
        about[split] = {
            "images": len(records),
            **({} if None in classes else {"classes": len(classes)}),
            "captions": sum(len(record.captions) for record in records),
        }
    return about


def crop_to_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Cut a square around a box, with 1.5 times the box's longer side, limited to the image (StackGAN, AttnGAN).

    Raises:
        ValueError: The box lies outside of the image.
    """
    left, top, width, height = box
    half = int(0.75 * max(width, height))
    x, y = int(left + width / 2), int(top + height / 2)
    edges = (max(0, x - half), max(0, y - half), min(image.width, x + half), min(image.height, y + half))
    if not (edges[0] < edges[2] and edges[1] < edges[3]):
        raise ValueError(f"its box {box} lies outside of its {image.width} x {image.height} pixels")
    return image.crop(edges)


@contextmanager
def _checked_folder(path: Path) -> Iterator[None]:
    """Stand in for `new_folder` in a dry run."""
    check_new(path)
    yield None


def _target(record: Record) -> str:
    return str("images" / PurePosixPath(record.name).with_suffix(".jpg"))


def _encode(data: bytes | InputError, record: Record, size: int, limits: Limits) -> bytes:
    """Return an image as it is written.

    Raises:
        InputError: It cannot be read or decoded, or its box lies outside of it.
    """
    if isinstance(data, InputError):
        raise data
    try:
        with open_image(io.BytesIO(data), limits) as image:
            if record.box:
                image = to_rgb(crop_to_box(image, record.box))
            else:
                image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a lower resolution
                image = to_rgb(limit_aspect(image))
        if min(image.size) > size:
            image = to_short_side(image, size)
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=_QUALITY, subsampling=0)
        return encoded.getvalue()
    except Exception as error:  # a broken image may raise anything
        raise unreadable(str(record.image), error) from error


def _for_each_image(
    listing: Listing, files: Files, workers: int, function: Callable[[Record, bytes | InputError], None]
) -> None:
    """Call a function with each image, in threads."""
    by_image = {record.image: record for record in listing.records}
    progress = tqdm(total=len(by_image), desc="preparing", unit="image", mininterval=0.5, disable=None)
    with progress, _Pool(workers) as pool:
        for image, data in files.try_read(by_image):
            pool.submit(function, by_image[image], data)
            progress.update()


def _write_texts(folder: Path, name: str, listing: Listing, size: int) -> None:
    """Write the captions, the description of the set and the pickles."""
    rows = [
        {"file": _target(record), "caption": record.captions, "class": record.class_name, "split": record.split}
        for record in listing.records
    ]
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    (folder / "captions.jsonl").write_text(lines, encoding="utf-8")
    about = {
        "format": FORMAT_VERSION,
        "set": name,
        "size": size,
        "splits": describe(listing),
        "problems": listing.problems,
        "notes": listing.notes,
        "vocabulary": listing.vocabulary and listing.vocabulary.words,
    }
    (folder / "set.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    vocabulary = listing.vocabulary or Vocabulary.build(
        caption for record in listing.records for caption in record.captions
    )
    splits = {split: [record for record in listing.records if record.split == split] for split in ("train", "test")}
    for path, data in make_pickles(splits, vocabulary).items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)


class _Pool:
    """A pool of threads with a short queue, so that few images are in memory; the first error ends it."""

    def __init__(self, workers: int) -> None:
        self.executor = ThreadPoolExecutor(workers) if workers else None
        self.pending: deque[Future] = deque()
        self.most = 4 * workers

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self.executor is None:
            function(*arguments)
            return
        self.pending.append(self.executor.submit(function, *arguments))
        if len(self.pending) > self.most:
            self.pending.popleft().result()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for future in self.pending:
                future.result()

"""Records of captioned images, read from the files of a set before any image is decoded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from icsd.data.captions import Vocabulary, tokenize
from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.files import File, Files
from icsd.data.images import open_images
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
    def label(self) -> str:
        """The class. An image without one is a class of its own."""
        return self.class_name or self.name


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


def read_text(files: Files, wanted: Iterable[File]) -> dict[File, str]:
    """Read text files.

    Raises:
        InputError: A file is not UTF-8.
    """
    texts = {}
    for file, data in files.read(wanted):
        try:
            texts[file] = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} cannot be read as UTF-8 text ({error}); save it as UTF-8") from error
    return texts


def clean(lines: Iterable[str]) -> list[str]:
    """Return the captions among lines of text: the lines with a word, with single spaces."""
    return [" ".join(line.split()) for line in lines if tokenize(line)]


def with_splits(records: Sequence[Record], test_fraction: float, seed: int) -> list[Record]:
    """Return the records with a split each. Where no record has one, it is drawn by a hash of the seed and the name.

    The smallest hashes form the test split, so a new image changes the split of few others.

    Raises:
        InputError: Some records have a split and others do not, or a split is empty.
    """
    if not 0 < test_fraction < 1:
        raise InputError(f"data.test_fraction={test_fraction} must lie between 0 and 1")
    silent = [record for record in records if record.split is None]
    if silent and len(silent) < len(records):
        raise InputError(f"{silent[0].image} has no split while others have one; give every image one, or none")
    ranked = sorted(silent, key=lambda record: hashlib.sha256(f"{seed}:{record.name}".encode()).digest())
    held_out = {record.name for record in ranked[: min(max(round(test_fraction * len(silent)), 1), len(silent) - 1)]}
    placed = [
        replace(record, split=record.split or ("test" if record.name in held_out else "train")) for record in records
    ]
    missing = sorted({"train", "test"} - {record.split for record in placed})
    if missing:
        raise InputError(f"no image is in the {missing[0]} split; at least one to train and one to test are needed")
    return placed


def open_records(
    name: str, listing: Listing, files: Files, config: DataConfig, split: Split, resolution: int
) -> CaptionedImages:
    """Open one split of a listing.

    Raises:
        InputError: The listing has problems, or an image cannot be read.
    """
    if listing.problems:
        more = f" (and {len(listing.problems) - 1} more problems)" if len(listing.problems) > 1 else ""
        raise InputError(listing.problems[0] + more)
    classes = sorted({record.label for record in listing.records})
    number = {name: index for index, name in enumerate(classes)}
    placed = with_splits(listing.records, config.test_fraction, config.seed)
    kept = [record for record in placed if record.split == split]
    return CaptionedImages(
        name,
        split,
        open_images(files, [record.image for record in kept], resolution, square=config.margin == 0),
        [record.captions for record in kept],
        [number[record.label] for record in kept],
        flip=config.flip,
        vocabulary=listing.vocabulary,
    )

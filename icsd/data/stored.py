"""Data sets made of listed images."""

from __future__ import annotations

from icsd.data.captions import unspaced_note
from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.files import Files
from icsd.data.images import open_images
from icsd.data.records import Listing
from icsd.data.splits import with_splits
from icsd.errors import InputError


def open_listing(
    name: str, listing: Listing, files: Files, config: DataConfig, split: Split, side: int
) -> CaptionedImages:
    """Open one split of a listing.

    Args:
        name: The name of the data set.
        listing: Its images.
        files: The files that hold them.
        config: The configuration.
        split: "train" or "test".
        side: Shorter side of the images.

    Raises:
        InputError: The listing has problems, or an image cannot be read.
    """
    if listing.problems:
        more = f" (and {len(listing.problems) - 1} more problems)" if len(listing.problems) > 1 else ""
        raise InputError(listing.problems[0] + more + "; `icsd data prepare` with --partial leaves out what is broken")
    number = {label: index for index, label in enumerate(sorted({record.label for record in listing.records}))}
    placed = with_splits(listing.records, config.test_fraction, config.seed)
    kept = [record for record in placed if record.split == split]
    captions = [record.captions for record in kept]
    return CaptionedImages(
        name,
        split,
        open_images(files, [record.image for record in kept], side, square=config.margin == 0, fit=config.fit),
        captions,
        [number[record.label] for record in kept],
        flip=config.flip,
        vocabulary=listing.vocabulary,
        notes=[*listing.notes, *unspaced_note([caption for lines in captions for caption in lines])],
        class_names=[record.class_name for record in kept],
    )

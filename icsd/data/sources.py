"""Table of the sources: the functions that open and list each of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from icsd.data.captions import unspaced_note
from icsd.data.coco import open_coco, read_coco
from icsd.data.cub import read_cub
from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.emoji import open_emoji
from icsd.data.files import Files
from icsd.data.folder import open_folder, read_folder
from icsd.data.limits import Limits
from icsd.data.oxford import read_oxford
from icsd.data.prepared import open_prepared
from icsd.data.procedural import open_procedural
from icsd.data.records import Listing
from icsd.data.webdataset import open_webdataset, read_webdataset, shards
from icsd.errors import InputError

SOURCES = {
    "emoji": open_emoji,
    "procedural-flowers": open_procedural,
    "procedural-birds": open_procedural,
    "folder": open_folder,
    "webdataset": open_webdataset,
    "coco": open_coco,
    "cub": open_prepared,
    "oxford": open_prepared,
}

STORED = ("folder", "webdataset", "coco", "cub", "oxford")
"""The sources that are read from ``data.root``."""


READERS = {
    "cub": read_cub,
    "oxford": read_oxford,
    "folder": read_folder,
    "webdataset": read_webdataset,
    "coco": read_coco,
}
"""The functions that list a set for `icsd data prepare`."""


def list_set(name: str, paths: Sequence[Path], limits: Limits | None = None) -> tuple[Files, Listing]:
    """List the captioned images of a published set or of your own images.

    Args:
        name: One of `READERS`.
        paths: Folders and archives that hold the images, captions and lists.
        limits: The largest files and images that are read.

    Returns:
        The files in them, and the images.

    Raises:
        InputError: A file cannot be read or contradicts another.
    """
    files = shards(paths, limits) if name == "webdataset" else Files(paths, limits)
    listing = READERS[name](files)
    listing.notes += unspaced_note([caption for record in listing.records for caption in record.captions])
    return files, listing


def open_dataset(config: DataConfig, split: Split, resolution: int) -> CaptionedImages:
    """Open one split of the configured images.

    Args:
        config: The configured images.
        split: "train" or "test"; no image is in both.
        resolution: Side R of the images, in pixels.

    Returns:
        The images. The same ``config`` and ``resolution`` give the same images.

    Raises:
        InputError: If the configuration, a file or a needed package cannot be used; the message says what to do.
    """
    if (config.root is None) == (config.name in STORED):
        remedy = "give its folder" if config.root is None else f"leave it out or set data.name to one of {STORED}"
        raise InputError(f"data.root={config.root} cannot be used with data.name={config.name}; {remedy}")
    dataset = SOURCES[config.name](config, split, enlarged(resolution, config.margin))
    dataset.resolution = resolution
    return dataset


def enlarged(resolution: int, margin: float) -> int:
    """Return the shorter side of images with a margin."""
    return round(resolution * (1 + margin))

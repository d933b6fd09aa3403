"""``icsd data``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from PIL import Image

from icsd.cli.parser import Parser, check_image_file
from icsd.data import CaptionedImages, DataConfig, open_dataset, write_folder
from icsd.data.files import check_new
from icsd.data.prepared import describe, write_prepared
from icsd.data.records import Listing, with_splits
from icsd.data.sources import READERS, list_set
from icsd.errors import InputError
from icsd.visualization import caption_grid

DESCRIPTION = """Prepare a captioned image set for training, preview one, or export one.

Examples:

  icsd data prepare cub CUB_200_2011.tgz birds.zip data/birds
      CUB-200-2011 as downloaded; train on it with: icsd train --config configs/birds.yaml

  icsd data preview
      the emoji that the demo trains on, as preview.png

  icsd data preview --data.name folder --data.root photos --split test
      the images of your own folder that are held out of training

  icsd data export flowers --data.name procedural-flowers --data.size 500
      a folder of drawn flowers, with a .txt of captions beside each"""

PREPARE = """Read a set from the archives or folders in which it was published, check it, and write a folder to train
from: cropped and reduced images, one captions.jsonl with captions, classes and splits, the vocabulary and AttnGAN's
pickles. A contact sheet is written beside the folder. Archives are read in place, and no code in a pickle is run.

  icsd data prepare cub CUB_200_2011.tgz birds.zip data/birds
      the 2011 images, and AttnGAN's captions (or Reed's: any archive with text_c10 and the lists of classes)

  icsd data prepare oxford 102flowers.tgz cvpr2016_flowers.tar.gz data/flowers
      Oxford-102, and Reed's captions

  icsd data prepare folder photos data/photos
      your own images, with a .txt beside each, a captions.csv (file,caption) or a captions.jsonl

  icsd data prepare webdataset shards data/photos
      WebDataset shards, .tar files

  icsd data prepare cub CUB_200_2011 text data/birds --partial --dry-run
      report what an incomplete download would give, and write nothing

The last path is the new folder. It appears when it is complete; after an error or Ctrl-C nothing is left behind."""

_CONFIGS = {"cub": "birds", "oxford": "flowers", "folder": "folder", "webdataset": "folder"}


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the actions and their options."""
    parser.usage = "icsd data {prepare,preview,export} [options]"
    parser.description = DESCRIPTION
    prepare = Parser(usage="icsd data prepare SET PATH... OUTPUT [options]", description=PREPARE)
    prepare.add_argument("set", type=Literal[tuple(READERS)], metavar="SET", help=", ".join(READERS))
    prepare.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="archives and folders that hold the set")
    prepare.add_argument("output", type=Path, metavar="OUTPUT", help="new or empty folder to write")
    prepare.add_argument(
        "--size", type=int, default=304, help="largest shorter side of the images in pixels; 304 suits training at 256"
    )
    prepare.add_argument("--partial", action="store_true", help="leave out what is missing or broken, and list it")
    prepare.add_argument("--dry-run", action="store_true", help="check everything and report; write nothing")
    prepare.add_argument("--test-fraction", type=float, default=0.1, help="fraction held out if the set has no splits")
    prepare.add_argument("--seed", type=int, default=0, help="seed of that split")
    prepare.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="number of parallel workers that decode images"
    )
    preview = Parser(
        usage="icsd data preview [options]",
        description="Write a contact sheet of images with their first captions.",
    )
    preview.add_argument("--count", type=int, default=24, help="number of images, spread evenly over the split")
    preview.add_argument("--output", type=Path, default=Path("preview.png"), help="image file to write")
    export = Parser(
        usage="icsd data export OUTPUT [options]",
        description="Write a set as a folder of PNG images with a .txt of captions beside each.",
    )
    export.add_argument("output", type=Path, metavar="OUTPUT", help="new or empty folder to write")
    for command in (preview, export):
        command.add_argument("--resolution", type=int, default=64, help="side of the images in pixels")
        command.add_argument("--split", type=Literal["train", "test"], default="train", help="split of the set")
        command.add_class_arguments(DataConfig, "data")
    subcommands = parser.add_subcommands(dest="action")
    subcommands.add_subcommand("prepare", prepare, help="check a downloaded set and write a folder to train from")
    subcommands.add_subcommand("preview", preview, help="write a contact sheet of images with captions")
    subcommands.add_subcommand("export", export, help="write images and captions to a folder")


def run(options: Namespace) -> int:
    """Run the chosen action."""
    return {"prepare": _prepare, "preview": _preview, "export": _export}[options.action](options[options.action])


def _prepare(options: Namespace) -> int:
    for key, least in (("size", 1), ("workers", 0)):
        if options[key] < least:
            raise InputError(f"--{key} is {options[key]}: give at least {least}")
    check_new(options.output)
    files, listing = list_set(options.set, options.paths)
    if listing.problems and not options.partial:
        problems = "\n  ".join(listing.problems)
        raise InputError(
            f"{options.set} is not complete; correct this, or give --partial to leave it out. "
            f"Nothing was written:\n  {problems}"
        )
    listing.records = with_splits(listing.records, options.test_fraction, options.seed)
    _summarize(options, listing)
    if options.dry_run:
        print("dry run      nothing was written")
        return 0
    left_out = write_prepared(
        options.set,
        listing,
        files,
        options.output,
        size=options.size,
        workers=options.workers,
        partial=options.partial,
    )
    for line in left_out:
        print(f"left out     {line}")
    name = options.set if options.set in ("cub", "oxford") else "folder"
    sheet = options.output.with_name(f"{options.output.name}-contact-sheet.png")
    dataset = open_dataset(DataConfig(name=name, root=options.output), "train", 128)
    _contact_sheet(dataset, 24).save(sheet)
    print(f"written      {options.output}")
    print(f"look at      {sheet}")
    root = shlex.quote(str(options.output))
    print(f"try next     icsd train --config configs/{_CONFIGS[options.set]}.yaml --data.root {root}")
    return 0


def _summarize(options: Namespace, listing: Listing) -> None:
    print(f"set          {options.set}, from {' and '.join(map(str, options.paths))}")
    for split, numbers in describe(listing).items():
        counts = ", ".join(f"{number:,} {what}" for what, number in numbers.items())
        print(f"{split:<13}{counts}")
    if listing.vocabulary:
        print(f"vocabulary   {len(listing.vocabulary.words):,} words from captions.pickle")
    boxed = sum(record.box is not None for record in listing.records)
    crop = f"{boxed:,} cropped to their boxes, " if boxed else ""
    print(f"images       {crop}shorter side at most {options.size} pixels")
    for what, lines in (("problem", listing.problems), ("note", listing.notes)):
        for line in lines:
            print(f"{what:<13}{line}")


def _preview(options: Namespace) -> int:
    dataset = _open(options)
    if options.count < 1:
        raise InputError(f"--count is {options.count}: give at least 1")
    check_image_file(options.output)
    _contact_sheet(dataset, options.count).save(options.output)
    print(options.output)
    return 0


def _export(options: Namespace) -> int:
    dataset = _open(options)
    write_folder(dataset, options.output)
    print(f"{options.output}: {len(dataset)} images of {dataset.name}, split {dataset.split}")
    return 0


def _open(options: Namespace) -> CaptionedImages:
    if options.resolution < 1:
        raise InputError(f"--resolution is {options.resolution}: give at least 1")
    return open_dataset(options.data, options.split, options.resolution)


def _contact_sheet(dataset: CaptionedImages, count: int) -> Image.Image:
    count = min(count, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]
    return caption_grid(
        [torch.stack([dataset[index]["image"] for index in chosen])],
        [dataset.captions[index][0] for index in chosen],
        title=f"{dataset.name}, split {dataset.split}: {len(dataset)} images",
        footer=dataset.attribution,
    )

"""``icsd data``."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace
from PIL import Image

from icsd.cli.parser import Parser, check_image_file
from icsd.data import CaptionedImages, DataConfig, open_dataset, write_folder
from icsd.data.dataset import Split
from icsd.data.files import check_new, printable
from icsd.data.limits import Limits
from icsd.data.prepared import describe, write_prepared
from icsd.data.records import Listing
from icsd.data.sources import READERS, enlarged, list_set
from icsd.data.splits import with_splits
from icsd.errors import InputError
from icsd.outputs import check_output, replacing
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
      a folder of drawn flowers, with their captions in captions.jsonl"""

PREPARE = """Read a set from the archives or folders in which it was published, check it, and write a folder to train
from: cropped and reduced images, one captions.jsonl with captions, classes and splits, the vocabulary and AttnGAN's
pickles. A contact sheet is written beside the folder. Archives are read in place, and no code in a pickle is run.

  icsd data prepare cub CUB_200_2011.tgz birds.zip data/birds
      the 2011 images, and AttnGAN's captions (or Reed's: any archive with text_c10 and the lists of classes)

  icsd data prepare oxford 102flowers.tgz cvpr2016_flowers.tar.gz data/flowers
      Oxford-102, and Reed's captions

  icsd data prepare folder photos data/photos
      your own images, with a .txt beside each, a captions.csv (file,caption), a captions.jsonl or a Hugging Face
      metadata.csv, metadata.jsonl or metadata.parquet (file_name,text)

  icsd data prepare webdataset shards data/photos
      WebDataset shards, .tar files

  icsd data prepare coco train2017.zip val2017.zip annotations_trainval2017.zip data/coco
      COCO captions; images named val are held out of training

  icsd data prepare cub CUB_200_2011 text data/birds --partial --dry-run
      report what an incomplete download would give, and write nothing

The last path is the new folder. It appears when it is complete; after an error or Ctrl-C nothing is left behind."""

LARGEST_WORKERS = 256
_CONFIGS = {"cub": "birds", "oxford": "flowers", "folder": "folder", "webdataset": "folder", "coco": "folder"}


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
        "--workers",
        type=int,
        default=min(os.cpu_count() or 1, LARGEST_WORKERS),
        help="number of parallel workers that decode images",
    )
    prepare.add_class_arguments(Limits)
    preview = Parser(
        usage="icsd data preview [options]",
        description="Write a contact sheet of images with their first captions.",
    )
    preview.add_argument("--count", type=int, default=24, help="number of images, spread evenly over the split")
    preview.add_argument("--output", type=Path, default=Path("preview.png"), help="image file to write")
    export = Parser(
        usage="icsd data export OUTPUT [options]",
        description="Write a set as a folder of PNG images, with a captions.jsonl of captions, classes and splits.",
    )
    export.add_argument("output", type=Path, metavar="OUTPUT", help="new or empty folder to write")
    for command in (preview, export):
        command.add_argument(
            "--resolution", type=int, default=64, help="side of the images in pixels, before the margin"
        )
        command.add_class_arguments(DataConfig, "data")
    preview.add_argument("--split", type=Literal["train", "test"], default="train", help="split of the set")
    export.add_argument(
        "--split", type=Literal["all", "train", "test"], default="all", help="split of the set, or both"
    )
    subcommands = parser.add_subcommands(dest="action")
    subcommands.add_subcommand("prepare", prepare, help="check a downloaded set and write a folder to train from")
    subcommands.add_subcommand("preview", preview, help="write a contact sheet of images with captions")
    subcommands.add_subcommand("export", export, help="write images and captions to a folder")


def run(options: Namespace) -> int:
    """Run the chosen action."""
    return {"prepare": _prepare, "preview": _preview, "export": _export}[options.action](options[options.action])


def _prepare(options: Namespace) -> int:
    for key, least, most in (("size", 1, 1 << 16), ("workers", 0, LARGEST_WORKERS)):
        if not least <= options[key] <= most:
            raise InputError(f"--{key} is {options[key]}: give a number from {least} to {most}")
    sheet = options.output.absolute().with_name(f"{options.output.absolute().name}-contact-sheet.png")
    _check_places(options.output, sheet)
    limits = Limits(options.max_file_mb, options.max_pixels)
    files, listing = list_set(options.set, options.paths, limits)
    if listing.problems and not options.partial:
        problems = "\n  ".join(listing.problems)
        raise InputError(
            f"{options.set} is not complete; correct this, or give --partial to leave it out. "
            f"Nothing was written:\n  {problems}"
        )
    try:
        listing.records = with_splits(listing.records, options.test_fraction, options.seed)
    except InputError as error:
        problems = "".join(f"\n  {problem}" for problem in listing.problems)
        raise InputError(f"{error}{problems and '. What was left out:'}{problems}") from error
    _summarize(options, listing)
    prepared = write_prepared(
        options.set,
        listing,
        files,
        options.output,
        size=options.size,
        workers=options.workers,
        partial=options.partial,
        dry_run=options.dry_run,
    )
    for line in prepared.left_out:
        print(f"left out     {line}")
    if options.dry_run:
        _report_space(options.output, prepared.size)
        print("dry run      every image was read; nothing was written")
        return 0
    name = options.set if options.set in ("cub", "oxford") else "folder"
    dataset = open_dataset(DataConfig(name=name, root=options.output), "train", 128)
    _contact_sheet(dataset, 24).save(sheet)
    print(f"written      {printable(str(options.output))}")
    print(f"look at      {printable(os.path.relpath(sheet))}")
    root = shlex.quote(str(options.output))
    print(f"try next     icsd train --config configs/{_CONFIGS[options.set]}.yaml --data.root {printable(root)}")
    return 0


def _check_places(output: Path, sheet: Path) -> None:
    """Raise unless a prepared set and its contact sheet can be written."""
    check_new(output)
    if sheet.exists():
        raise InputError(f"{printable(str(sheet))} exists and would be overwritten; move it, or choose another output")
    parent = sheet.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{printable(str(parent))} is not a folder that can be written to; choose another output")


def _report_space(output: Path, size: int) -> None:
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    print(f"space        {size / 2**20:,.1f} MiB of images, {free / 2**20:,.0f} MiB free")
    if free < size:
        raise InputError(f"{printable(str(parent))} has too little free space; choose another output")


def _summarize(options: Namespace, listing: Listing) -> None:
    print(f"set          {options.set}, from {' and '.join(printable(str(path)) for path in options.paths)}")
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
    if options.count < 1:
        raise InputError(f"--count is {options.count}: give at least 1")
    check_image_file(options.output)
    check_output(options.output)
    sheet = _contact_sheet(_open(options, options.split), options.count)
    with replacing(options.output) as temporary:
        sheet.save(temporary)
    print(options.output)
    return 0


def _export(options: Namespace) -> int:
    check_new(options.output)
    splits = ("train", "test") if options.split == "all" else (options.split,)
    datasets = [_open(options, split) for split in splits]
    write_folder(datasets, options.output)
    count = " and ".join(f"{len(dataset)} images of the {dataset.split} split" for dataset in datasets)
    side = enlarged(options.resolution, options.data.margin)
    print(f"{options.output}: {count} of {datasets[0].name}, shorter side {side} pixels")
    return 0


def _open(options: Namespace, split: Split) -> CaptionedImages:
    if options.resolution < 1:
        raise InputError(f"--resolution is {options.resolution}: give at least 1")
    dataset = open_dataset(options.data, split, options.resolution)
    for note in dataset.notes:
        print(f"note: {note}", file=sys.stderr)
    return dataset


def _contact_sheet(dataset: CaptionedImages, count: int) -> Image.Image:
    count = min(count, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]
    return caption_grid(
        [torch.stack([dataset[index]["image"] for index in chosen])],
        [dataset.captions[index][0] for index in chosen],
        title=f"{dataset.name}, split {dataset.split}: {len(dataset)} images",
        footer=dataset.attribution,
    )

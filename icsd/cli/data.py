"""``icsd data``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace

from icsd.cli.parser import Parser, check_picture_file
from icsd.data import DataConfig, open_dataset
from icsd.data.folder import write_folder
from icsd.errors import InputError
from icsd.pictures import caption_grid

DESCRIPTION = """Look at a captioned image set, or export one.

Examples:

  icsd data preview
      the emoji that the demo trains on, in preview.png

  icsd data preview --data.name folder --data.root photos --split test
      your own images, those held out of training

  icsd data export flowers --data.name procedural-flowers --data.size 500
      a folder of drawn flowers, a .txt with captions beside each"""


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the actions and their options."""
    parser.usage = "icsd data {preview,export} [options]"
    parser.description = DESCRIPTION
    preview = Parser(
        usage="icsd data preview [options]",
        description="Write a contact sheet: pictures of a set with their first captions.",
    )
    preview.add_argument("--count", type=int, default=24, help="pictures to show, spread evenly over the split")
    preview.add_argument("--out", type=Path, default=Path("preview.png"), help="picture to write")
    export = Parser(
        usage="icsd data export FOLDER [options]",
        description="Write a set as a folder of PNG images with a .txt of captions beside each.",
    )
    export.add_argument("folder", type=Path, metavar="FOLDER", help="new or empty folder to write to")
    for command in (preview, export):
        command.add_argument("--resolution", type=int, default=64, help="side of the pictures in pixels")
        command.add_argument("--split", type=Literal["train", "test"], default="train", help="which part of the set")
        command.add_class_arguments(DataConfig, "data")
    subcommands = parser.add_subcommands(dest="action")
    subcommands.add_subcommand("preview", preview, help="write a contact sheet of pictures and captions")
    subcommands.add_subcommand("export", export, help="write pictures and captions to a folder")


def run(options: Namespace) -> int:
    """Preview or export."""
    action = options[options.action]
    if action.resolution < 1:
        raise InputError(f"resolution is {action.resolution}: give at least 1")
    dataset = open_dataset(action.data, action.split, action.resolution)
    if options.action == "export":
        write_folder(dataset, action.folder)
        print(f"{action.folder}: {len(dataset)} pictures of {dataset.name}, split {action.split}")
        return 0
    if action.count < 1:
        raise InputError(f"count is {action.count}: give at least 1")
    check_picture_file(action.out)
    count = min(action.count, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]
    grid = caption_grid(
        [torch.stack([dataset[index]["image"] for index in chosen])],
        [dataset.captions[index][0] for index in chosen],
        title=f"{dataset.name}, split {action.split}: {len(dataset)} pictures",
        footer=dataset.attribution,
    )
    grid.save(action.out)
    print(action.out)
    return 0

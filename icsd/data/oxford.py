"""Oxford-102 flowers (Nilsback and Zisserman 2008) with the captions of Reed et al. 2016, as published.

The images are ``jpg/image_00001.jpg``, ...; the folders of the captions, such as
``text_c10/class_00001/image_06734.txt``, are the classes, and ``trainvalclasses.txt`` and ``testclasses.txt`` list the
classes of each split. There are no boxes.
"""

from __future__ import annotations

import re

from icsd.data.files import File, Files
from icsd.data.records import Listing
from icsd.data.zero_shot import compare_counts, read_captions
from icsd.errors import InputError

KNOWN = {"train": (7034, 82), "test": (1155, 20)}
"""The number of images and classes of each split."""


def read_oxford(files: Files) -> Listing:
    """List the images; see `icsd.data.zero_shot.read_captions`.

    Raises:
        InputError: A part of the set is missing, given twice, broken, or contradicts itself.
    """
    images: dict[str, File] = {}
    for file in files.all:
        if re.fullmatch(r"image_\d+\.jpg", file.name):
            name = file.name.removesuffix(".jpg")
            if name in images:
                raise InputError(f"{images[name]} and {file} are the same image; give one of the two")
            images[name] = file
    if not images:
        raise InputError(f"{' and '.join(files.sources)} hold no image_00001.jpg; give 102flowers.tgz as well")
    classes: dict[str, str] = {}
    for file in files.all:
        if re.fullmatch(r"class_\d+", file.folder) and re.fullmatch(r"image_\d+\.txt", file.name):
            name = file.name.removesuffix(".txt")
            if classes.setdefault(name, file.folder) != file.folder:
                raise InputError(f"{name} is in {classes[name]} and in {file.folder} ({file}); it can have one class")
    listing = read_captions(files, {(classes[name], name): images[name] for name in images if name in classes})
    for ours, theirs, what in ((images, classes, "captions"), (classes, images, "image")):
        lost = [name for name in ours if name not in theirs]
        if lost:
            listing.problems.append(f"{len(lost)} of {len(ours)} images have no {what}, such as {lost[0]}")
    compare_counts(listing, KNOWN)
    return listing

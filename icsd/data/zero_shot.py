"""What CUB-200-2011 and Oxford-102 share as sets of text-to-image synthesis: test classes that training never sees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from icsd.data.attngan import read_filenames
from icsd.data.dataset import Split
from icsd.data.files import File, Files
from icsd.data.records import Listing, Record, clean, read_text
from icsd.errors import InputError

_LISTS: dict[str, Split] = {
    "trainvalclasses.txt": "train",
    "trainclasses.txt": "train",
    "valclasses.txt": "train",
    "testclasses.txt": "test",
}


def class_splits(files: Files) -> dict[str, Split]:
    """Split of each class, as AttnGAN's ``train|test/filenames.pickle`` or the lists of the caption archives tell it.

    Returns:
        Split by `class_key`.

    Raises:
        InputError: Neither is there, one side is missing, or a class is on both.
    """
    pickles = [file for file in files.all if file.name == "filenames.pickle" and file.folder in ("train", "test")]
    lists = [file for file in files.all if file.name in _LISTS]
    told = []
    if pickles:
        for file, data in files.read(pickles):
            told += [(file, name.partition("/")[0], file.folder) for name in read_filenames(file, data)]
    else:
        for file, text in read_text(files, lists).items():
            told += [(file, name, _LISTS[file.name]) for name in text.split()]
    splits: dict[str, Split] = {}
    for file, class_name, split in told:
        key = class_key(class_name)
        if splits.setdefault(key, split) != split:
            raise InputError(f"{file} puts {class_name} into {split}, another list into {splits[key]}; keep one")
    if set(splits.values()) != {"train", "test"}:
        raise InputError(
            f"{' and '.join(files.sources)} do not tell both train and test classes; give the archive that holds "
            "trainvalclasses.txt and testclasses.txt, or train/filenames.pickle and test/filenames.pickle"
        )
    return splits


def class_key(class_name: str) -> str:
    """What tells a class: ``009`` of ``009.Brewer_Blackbird``, which Reed's lists spell ``009.Brewers_Blackbird``."""
    return class_name.partition(".")[0]


def read_captions(files: Files, wanted: Mapping[tuple[str, str], File]) -> Listing:
    """List images with the captions of ``<class>/<image>.txt``, one per line, and the splits of their classes.

    Args:
        files: Everything that was given.
        wanted: Image files by class and name without suffix.

    Returns:
        The images that have captions and a split, in order.

    Raises:
        InputError: The captions of a image are there twice; or see `class_splits`.
    """
    splits = class_splits(files)
    keys = {(class_key(class_name), name) for class_name, name in wanted}
    texts: dict[tuple[str, str], File] = {}
    for file in files.all:
        key = (class_key(file.folder), file.name.removesuffix(".txt"))
        if file.name.endswith(".txt") and key in keys:
            if key in texts:
                raise InputError(f"{texts[key]} and {file} are captions of the same image; give one of the two")
            texts[key] = file
    data = dict(files.read(texts.values()))
    captions = {key: clean(_decode(data[file]).split("\n")) for key, file in texts.items()}

    listing = Listing([])
    bare = []
    strays: dict[str, int] = defaultdict(int)
    for (class_name, name), image in wanted.items():
        lines = captions.get((class_key(class_name), name))
        if not lines:
            bare.append(f"{class_name}/{name}.txt")
        elif class_key(class_name) not in splits:
            strays[class_name] += 1
        else:
            split = splits[class_key(class_name)]
            listing.records.append(Record(f"{class_name}/{image.name}", image, lines, class_name, split))
    if bare:
        listing.problems.append(
            f"{len(bare)} of {len(wanted)} images have no captions, such as {bare[0]}; "
            "give the caption archive too (AttnGAN's text.zip, or text_c10)"
        )
    listing.problems += [f"class {name} ({count} images) is in no split" for name, count in strays.items()]
    few = sum(len(record.captions) < 10 for record in listing.records)
    if few:
        listing.notes.append(f"{few} of {len(listing.records)} images have fewer than 10 captions; all are kept")
    return listing


def compare_counts(listing: Listing, known: dict[Split, tuple[int, int]]) -> None:
    """Add a problem for each split whose images or classes are not as many as the set is known for.

    Args:
        listing: The set as found.
        known: Numbers of images and classes.
    """
    for split, expected in known.items():
        found = counts(listing.records, split)
        if found != expected:
            listing.problems.append(
                "the {} split has {:,} images of {:,} classes".format(split, *found)
                + ", the set is known for {:,} of {:,}".format(*expected)
            )


def counts(records: Iterable[Record], split: Split) -> tuple[int, int]:
    """Numbers of images and classes of a split."""
    classes = [record.class_name for record in records if record.split == split]
    return len(classes), len(set(classes))


def _decode(data: bytes) -> str:
    """The text of a caption file; what is no UTF-8 in it becomes white space, as AttnGAN has it."""
    return data.decode("utf-8-sig", errors="replace").replace("\N{REPLACEMENT CHARACTER}", " ")

"""Captions and splits of CUB-200-2011 and Oxford-102, whose test classes are never seen in training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from icsd.data.attngan import read_filenames
from icsd.data.dataset import Split
from icsd.data.files import File, Files
from icsd.data.records import Listing, Record, clean, read_texts
from icsd.errors import InputError

_LISTS: dict[str, Split] = {
    "trainvalclasses.txt": "train",
    "trainclasses.txt": "train",
    "valclasses.txt": "train",
    "testclasses.txt": "test",
}


def class_splits(files: Files) -> dict[str, Split]:
    """Read the split of each class from AttnGAN's ``train|test/filenames.pickle`` or the lists beside the captions.

    Returns:
        The split of each `class_key`.

    Raises:
        InputError: Both are missing, one split is missing, or a class is in both splits.
    """
    pickles = [file for file in files.all if file.name == "filenames.pickle" and file.folder in ("train", "test")]
    lists = [file for file in files.all if file.name in _LISTS]
    listed = []
    if pickles:
        for file, data in files.read(pickles):
            listed += [(file, name.partition("/")[0], file.folder) for name in read_filenames(file, data)]
    else:
        for file, text in read_texts(files, lists).items():
            listed += [(file, name, _LISTS[file.name]) for name in text.split()]
    splits: dict[str, Split] = {}
    for file, class_name, split in listed:
        key = class_key(class_name)
        if splits.setdefault(key, split) != split:
            raise InputError(f"{file} puts {class_name} into {split}, another list into {splits[key]}; keep one")
    if set(splits.values()) != {"train", "test"}:
        raise InputError(
            f"{' and '.join(files.sources)} do not list both train and test classes; give the archive that holds "
            "trainvalclasses.txt and testclasses.txt, or train/filenames.pickle and test/filenames.pickle"
        )
    return splits


def class_key(class_name: str) -> str:
    """Return the number of a class: ``009`` of ``009.Brewer_Blackbird`` (``009.Brewers_Blackbird`` in Reed's lists)."""
    return class_name.partition(".")[0]


def read_captions(files: Files, wanted: Mapping[tuple[str, str], File]) -> Listing:
    """List images with the captions of ``<class>/<image>.txt``, one per line, and the splits of their classes.

    Args:
        files: All files of the set.
        wanted: Image files by class and name without suffix.

    Returns:
        The images that have captions and a split, in order.

    Raises:
        InputError: The captions of an image are given twice; see also `class_splits`.
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
    listing = Listing([], problems=list(files.problems))
    data = dict(files.try_read(texts.values()))
    listing.problems += [str(error) for error in data.values() if isinstance(error, InputError)]
    captions = {
        key: clean(_decode(data[file]).split("\n")) for key, file in texts.items() if isinstance(data[file], bytes)
    }
    without_captions = []
    strays: dict[str, int] = defaultdict(int)
    for (class_name, name), image in wanted.items():
        lines = captions.get((class_key(class_name), name))
        if not lines:
            without_captions.append(f"{class_name}/{name}.txt")
        elif class_key(class_name) not in splits:
            strays[class_name] += 1
        else:
            split = splits[class_key(class_name)]
            listing.records.append(Record(f"{class_name}/{image.name}", image, lines, class_name, split))
    if without_captions:
        listing.problems.append(
            f"{len(without_captions)} of {len(wanted)} images have no captions, such as {without_captions[0]}; "
            "give the caption archive too (AttnGAN's text.zip, or text_c10)"
        )
    listing.problems += [f"class {name} ({count} images) is in no split" for name, count in strays.items()]
    few = sum(len(record.captions) < 10 for record in listing.records)
    if few:
        listing.notes.append(f"{few} of {len(listing.records)} images have fewer than 10 captions; all are kept")
    return listing


def compare_counts(listing: Listing, known: dict[Split, tuple[int, int]]) -> None:
    """Add a problem for each split with another number of images or classes than the set is known for.

    Args:
        listing: The listed set.
        known: The numbers of images and classes of each split.
    """
    for split, expected in known.items():
        found = counts(listing.records, split)
        if found != expected:
            listing.problems.append(
                "the {} split has {:,} images of {:,} classes".format(split, *found)
                + ", the set is known for {:,} of {:,}".format(*expected)
            )


def counts(records: Iterable[Record], split: Split) -> tuple[int, int]:
    """Return the numbers of images and classes of a split."""
    classes = [record.class_name for record in records if record.split == split]
    return len(classes), len(set(classes))


def _decode(data: bytes) -> str:
    """Decode a caption file. Bytes that are not UTF-8 become white space, as in AttnGAN."""
    return data.decode("utf-8-sig", errors="replace").replace("\N{REPLACEMENT CHARACTER}", " ")

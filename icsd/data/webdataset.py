"""WebDataset shards: tar files in which the members of one sample have the same name up to the first dot.

A sample is an image with its captions in ``<key>.txt``, one per line, or in ``<key>.json`` as ``{"caption": ...}``, a
sentence or a list of sentences. Its class is the ``"class"`` of the ``.json`` or the content of ``<key>.cls``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.files import ARCHIVE_SUFFIXES, File, Files
from icsd.data.images import IMAGE_SUFFIXES
from icsd.data.records import Listing, Record, clean, open_records, read_text
from icsd.errors import InputError

_TEXTS = (".txt", ".json", ".cls")


def open_webdataset(config: DataConfig, split: Split, resolution: int) -> CaptionedImages:
    """Open one split of a folder of uncompressed shards; see `read_webdataset` and `icsd.data.open_dataset`."""
    files = shards([config.root])
    return open_records(Path(config.root).resolve().name, read_webdataset(files), files, config, split, resolution)


def shards(paths: Sequence[Path | str]) -> Files:
    """Open the members of shards.

    Args:
        paths: Shards, or folders of them.

    Raises:
        InputError: There are no shards.
    """
    found = []
    for path in map(Path, paths):
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [file for file in below if file.name.lower().endswith(ARCHIVE_SUFFIXES)]
    if not found:
        raise InputError(f"{' and '.join(map(str, paths))} holds no .tar; give shards, or a folder of them")
    return Files(found)


def read_webdataset(files: Files) -> Listing:
    """List the samples. Where shards are named ``test...``, these are the test split and all others the train split.

    Raises:
        InputError: Two members of one sample contradict each other, or a member cannot be read.
    """
    members: dict[tuple[str, str], dict[str, File]] = defaultdict(dict)
    for file in files.all:
        name, dot, suffix = file.name.partition(".")
        members[file.source, str(PurePosixPath(file.path).with_name(name))][dot + suffix.lower()] = file
    held_out = {source for source, _ in members if Path(source).name.startswith("test")}
    texts_wanted = [file for sample in members.values() for suffix, file in sample.items() if suffix in _TEXTS]
    texts = read_text(files, texts_wanted)

    listing = Listing([])
    without_caption = []
    for (source, _), sample in members.items():
        images = [file for suffix, file in sample.items() if suffix.endswith(IMAGE_SUFFIXES)]
        if len(images) != 1:
            if images:
                raise InputError(f"{images[0]} and {images[1]} belong to one sample; it can have one image")
            continue
        captions, class_name = _captions_and_class(
            {suffix: sample[suffix] for suffix in _TEXTS if suffix in sample}, texts
        )
        if not captions:
            without_caption.append(images[0])
            continue
        split = None if not held_out else "test" if source in held_out else "train"
        name = f"{Path(source).name.partition('.')[0]}/{images[0].path}"
        listing.records.append(Record(name, images[0], captions, class_name, split))
    if without_caption:
        more = f", nor have {len(without_caption) - 1} more" if len(without_caption) > 1 else ""
        listing.problems.append(
            f"{without_caption[0]} has no caption{more}; add a .txt or .json of the same name to the shard"
        )
    return listing


def _captions_and_class(members: dict[str, File], texts: dict[File, str]) -> tuple[list[str], str | None]:
    """Return the captions and the class of a sample."""
    captions, class_name = [], None
    if ".txt" in members:
        captions += clean(texts[members[".txt"]].split("\n"))
    if ".cls" in members:
        class_name = texts[members[".cls"]].strip()
    if ".json" in members:
        try:
            content = json.loads(texts[members[".json"]])
            sentences = content.get("caption", [])
            captions += clean([sentences] if isinstance(sentences, str) else sentences)
            class_name = content.get("class", class_name)
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(f'{members[".json"]} must read {{"caption": "a sentence"}} ({error})') from error
    return captions, None if class_name is None else str(class_name)

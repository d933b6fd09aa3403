"""WebDataset shards: tar files in which the members of one sample have the same name up to the first dot.

A sample is an image with its captions in ``<key>.txt``, one per line, or in ``<key>.json`` as ``{"caption": ...}``, a
sentence or a list of sentences. Its class is the ``"class"`` of the ``.json`` or the content of ``<key>.cls``.
"""

from __future__ import annotations

import os.path
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from icsd.data.archives import ARCHIVE_SUFFIXES, Folder
from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.files import File, Files, printable
from icsd.data.images import is_image
from icsd.data.limits import Limits
from icsd.data.lists import captions_of, class_of, parse_json
from icsd.data.records import Listing, Record, clean_once, read_texts, such_as
from icsd.data.splits import held_out_part, with_held_out
from icsd.data.stored import open_listing
from icsd.errors import InputError

_TEXTS = (".txt", ".json", ".cls")
_OTHER_ARCHIVES = (".7z", ".rar", ".tar.lz4", ".tar.zst", ".tar.z")


def open_webdataset(config: DataConfig, split: Split, side: int) -> CaptionedImages:
    """Open one split of a folder of uncompressed shards; see `read_webdataset` and `icsd.data.open_dataset`."""
    files = shards([config.root], config.limits)
    return open_listing(Path(config.root).resolve().name, read_webdataset(files), files, config, split, side)


def shards(paths: Sequence[Path | str], limits: Limits | None = None) -> Files:
    """Open the members of shards.

    Args:
        paths: Shards, or folders of them.
        limits: The largest files that are read.

    Raises:
        InputError: There are no shards.
    """
    found: list[Path] = []
    problems: list[str] = []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        folder = Folder(path, limits or Limits())
        problems += folder.problems
        names = sorted(folder.paths)
        found += [path / name for name in names if name.lower().endswith(ARCHIVE_SUFFIXES)]
        others = [str(path / name) for name in names if name.lower().endswith(_OTHER_ARCHIVES)]
        if others:
            problems.append(f"{such_as(others, 'archives')} is not read; pack it as .tar or .tar.gz")
    if not found:
        because = f" ({problems[0]})" if problems else ""
        names = " and ".join(printable(str(path)) for path in paths)
        raise InputError(f"{names} holds no .tar{because}; give shards, or a folder of them")
    files = Files(found, limits)
    files.problems += map(printable, problems)
    files.root = os.path.commonpath(
        [os.path.abspath(path if os.path.isdir(path) else os.path.dirname(path)) for path in paths]
    )
    return files


def read_webdataset(files: Files) -> Listing:
    """List the samples. Shards and folders named test, val or the like are held out; see `icsd.data.splits`.

    Raises:
        InputError: Samples cannot be told apart, or have several images.
    """
    listing = Listing([], problems=list(files.problems))
    samples = _samples(files)
    members = [file for sample in samples.values() for suffix, file in sample.items() if suffix in _TEXTS]
    texts = read_texts(files, members, listing.problems)
    reader = _SampleReader(files.root, texts, listing)
    for sample in samples.values():
        reader.read(sample)
    reader.report()
    return listing


def _samples(files: Files) -> dict[tuple[str, str], dict[str, File]]:
    """Return the members of each sample by their suffixes."""
    samples: dict[tuple[str, str], dict[str, File]] = defaultdict(dict)
    for file in files.all:
        key, dot, suffix = file.name.partition(".")
        samples[file.source, str(PurePosixPath(file.path).with_name(key))][dot + suffix.lower()] = file
    return samples


class _SampleReader:
    """Reader of samples that collects what is missing."""

    def __init__(self, root: str, texts: Mapping[File, str], listing: Listing) -> None:
        self.root, self.texts, self.listing = root, texts, listing
        self.records: dict[str, Record] = {}
        self.held_out: dict[str, str | None] = {}
        self.without_caption: list[str] = []
        self.without_image: list[str] = []

    def read(self, sample: dict[str, File]) -> None:
        """Add the record of a sample, or note what it lacks."""
        images = [file for suffix, file in sample.items() if is_image(suffix)]
        if len(images) > 1:
            raise InputError(f"{images[0]} and {images[1]} belong to one sample; it can have one image")
        if not images:
            self.without_image.append(str(next(iter(sample.values()))))
            return
        members = {suffix: sample[suffix] for suffix in _TEXTS if suffix in sample}
        if any(file not in self.texts for file in members.values()):
            return  # its problem has been reported
        try:
            captions, class_name = self._captions_and_class(members)
        except InputError as error:
            self.listing.problems.append(str(error))
            return
        if captions:
            self._add(images[0], captions, class_name)
        else:
            self.without_caption.append(str(images[0]))

    def report(self) -> None:
        """Move the records to the listing, and add its problems and notes."""
        if self.without_caption:
            more = f", nor have {len(self.without_caption) - 1} more" if len(self.without_caption) > 1 else ""
            self.listing.problems.append(
                f"{self.without_caption[0]} has no caption{more}; add a .txt or .json of the same name to the shard"
            )
        if self.without_image:
            self.listing.problems.append(
                f"{such_as(self.without_image, 'members')} has no image of the same name that can be read; add it to "
                "the shard as JPEG or PNG"
            )
        self.listing.records, notes = with_held_out(list(self.records.values()), self.held_out)
        self.listing.notes += notes

    def _add(self, image: File, captions: list[str], class_name: str | None) -> None:
        shard = _without_suffix(os.path.relpath(image.source, self.root))
        name = f"{shard}/{image.path}"
        record = Record(name, image, captions, class_name)
        if name in self.records:
            raise InputError(f"{self.records[name].image} and {image} have one name below {self.root}; rename a shard")
        self.records[name] = record
        self.held_out[name] = held_out_part(shard, shard=True) or held_out_part(os.path.dirname(image.path))

    def _captions_and_class(self, members: Mapping[str, File]) -> tuple[list[str], str | None]:
        lines: list[str] = []
        classes: list[str] = []
        if ".txt" in members:
            lines += self.texts[members[".txt"]].split("\n")
        if ".cls" in members:
            classes.append(self.texts[members[".cls"]].strip())
        if ".json" in members:
            place = str(members[".json"])
            try:
                content = parse_json(self.texts[members[".json"]])
            except ValueError as error:
                raise InputError(f'{place} must read {{"caption": "a sentence"}} ({printable(str(error))})') from error
            if not isinstance(content, dict):
                raise InputError(f'{place} must read {{"caption": "a sentence"}}')
            lines += captions_of(place, content, required=False)
            classes.append(class_of(place, content) or "")
        classes = list(dict.fromkeys(filter(None, classes)))
        if len(classes) > 1:
            raise InputError(f"{members['.json']} has the class {classes[1]!r}, its .cls {classes[0]!r}; keep one")
        return clean_once(lines), classes[0] if classes else None


def _without_suffix(name: str) -> str:
    suffix = max((suffix for suffix in ARCHIVE_SUFFIXES if name.lower().endswith(suffix)), key=len, default="")
    return name[: len(name) - len(suffix)]

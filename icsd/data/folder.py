"""Reader and writer of folders of images with captions."""

from __future__ import annotations

import io
import json
import os.path
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from icsd.data.contents import Contents, is_document, report_others, sort_files, unread_list
from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.files import File, Files, new_folder, printable
from icsd.data.images import is_other_image
from icsd.data.lists import Row, is_list, looks_like_csv, make_row, read_list
from icsd.data.parquet import ParquetFile
from icsd.data.records import Listing, Record, clean_once, read_texts, such_as
from icsd.data.splits import held_out_part, with_held_out
from icsd.data.stored import open_listing
from icsd.errors import InputError


def open_folder(config: DataConfig, split: Split, side: int) -> CaptionedImages:
    """Open one split of a folder, its subfolders included; see `read_folder` and `icsd.data.open_dataset`."""
    root = Path(config.root)
    if not root.is_dir():
        raise InputError(f"data.root={printable(str(root))} is not a folder; give the folder that holds the images")
    files = Files([root], config.limits)
    return open_listing(root.resolve().name, read_folder(files), files, config, split, side)


def read_folder(files: Files) -> Listing:
    """List the images of one folder or archive, such as an ``imagefolder`` of Hugging Face.

    Captions come from a ``.txt`` beside each image, one per line, and from lists: ``captions`` or ``metadata`` as
    ``.csv``, ``.tsv``, ``.jsonl`` or ``.parquet`` in any folder (see `icsd.data.lists`), whose file names are relative
    to their folder or to the root. Parquet files may also hold the images themselves. An image may have several rows.
    Lines without a word and hidden files are skipped.

    Raises:
        InputError: There are no images, or a list cannot be read or contradicts itself.
    """
    return _FolderReader(files).read()


def write_folder(datasets: Sequence[CaptionedImages], path: Path) -> None:
    """Write images as PNG files, with a ``captions.jsonl`` of their captions, classes and splits.

    `open_folder` reads the folder. Splits are written if there are two, since a set needs both.

    Args:
        datasets: Splits of one set. Their images are written at their own size.
        path: A new or empty folder. The attribution of the images is written there too.

    Raises:
        InputError: ``path`` is not empty.
        OSError: The disk is full, for example; nothing is left behind.
    """
    with new_folder(path) as folder:
        lines = []
        for dataset in datasets:
            for index, captions in enumerate(dataset.captions):
                name = f"{dataset.split}_{index:06d}.png"
                Image.fromarray(dataset.images[index].permute(1, 2, 0).numpy()).save(folder / name)
                row = {"file": name, "caption": captions, "class": dataset.class_name(index)}
                row |= {"split": dataset.split} if len(datasets) > 1 else {}
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
        if datasets[0].attribution:
            (folder / "ATTRIBUTION").write_text(f"{datasets[0].attribution}\n", encoding="utf-8")


@dataclass
class _Found:
    """The captions, class and split that were found for an image."""

    captions: list[str] = field(default_factory=list)
    class_name: str | None = None
    split: Split | None = None


class _FolderReader:
    """The steps of `read_folder`."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.listing = Listing([], problems=list(files.problems))
        self.contents: Contents = sort_files(files)
        self.tables: set[str] = set()  # names of images in Parquet files
        self.read_lists: dict[str, File] = {}  # by folder
        self.found: dict[str, _Found] = {}
        self.unreadable: set[str] = set()  # names of images whose text file cannot be read

    def read(self) -> Listing:
        """Read the lists and the text files, and report what does not fit."""
        contents = self.contents
        opened = {name: self._open_parquet(file) for name, file in contents.parquet.items()}
        self.found = {name: _Found() for name in contents.images}
        for name, file in contents.lists.items():
            self._read_list(name, file)
        for name, file in opened.items():
            self._read_parquet(name, file)
        if self.read_lists or self.tables:
            self._note_unread_texts()
        else:
            self._read_texts()
        report_others(contents, self.listing)
        if len(contents.images) < 2:
            raise InputError(self._too_few())
        self._report_images_without_caption()
        self._make_records()
        return self.listing

    def _make_records(self) -> None:
        for name, found in self.found.items():
            captions = clean_once(found.captions)
            if captions:
                image = self.contents.images[name]
                self.listing.records.append(Record(name, image, captions, found.class_name, found.split))
        parts = {name: held_out_part(os.path.dirname(name), shard=name in self.tables) for name in self.found}
        self.listing.records, notes = with_held_out(self.listing.records, parts)
        self.listing.notes += notes

    def _read_list(self, name: str, file: File) -> None:
        text = read_texts(self.files, [file])[file]
        if file.name.lower().endswith(".txt") and not looks_like_csv(text):
            self.contents.texts[name] = file
            return
        self._add_rows(name, file, read_list(file, text, self.found))

    def _open_parquet(self, file: File) -> ParquetFile:
        try:
            source: Path | io.BytesIO = Path(self.files.byte_range(file).path)
        except InputError:  # it is in an archive
            ((_, data),) = self.files.read([file])
            source = io.BytesIO(data)
        return ParquetFile(str(file), source, self.files.limits)

    def _read_parquet(self, name: str, opened: ParquetFile) -> None:
        file = self.contents.parquet[name]
        if opened.image_key:
            images = self.files.add(f"{file.source}/{file.path}", opened)
            names = [f"{name.removesuffix('.parquet')}/{image.path}" for image in images]
            self.contents.images |= dict(zip(names, images, strict=True))
            self.tables |= set(names)
            for image, (place, values) in zip(names, opened.rows(), strict=True):
                self.found[image] = _Found()
                self._add_row(image, make_row(place, {**values, "file": image}))
        elif opened.is_list and is_list(file.name):
            self._add_rows(name, file, (make_row(place, values) for place, values in opened.rows()))
        else:
            self.contents.others[name] = file

    def _add_rows(self, name: str, file: File, rows: Iterable[Row]) -> None:
        folder = os.path.dirname(name)
        if folder in self.read_lists:
            raise InputError(f"{self.read_lists[folder]} and {file} are two lists of captions in one folder; keep one")
        self.read_lists[folder] = file
        missing = []
        for row in rows:
            image = self._find(row.file, folder)
            if image is None:
                missing.append(f"{row.place} names {row.file!r}, which is not an image in {printable(file.source)}")
            else:
                self._add_row(image, row)
        if missing:
            self.listing.problems.append(f"{such_as(missing, 'such rows')}; correct the list or add the image")

    def _find(self, file: str, folder: str) -> str | None:
        """Return the name of the image that a row means: below the folder of its list, or below the root."""
        for path in (file, file.replace("\\", "/")):
            for base in (folder, ""):
                name = unicodedata.normalize("NFC", os.path.normpath(os.path.join(base, path)))
                if name in self.found:
                    return name
        return None

    def _add_row(self, image: str, row: Row) -> None:
        found = self.found[image]
        found.captions += row.captions
        for key, value in (("class_name", row.class_name), ("split", row.split)):
            known = getattr(found, key)
            if None not in (value, known) and known != value:
                raise InputError(f"{row.place} puts {image} into {value!r}, an earlier row into {known!r}; keep one")
            setattr(found, key, known if value is None else value)

    def _read_texts(self) -> None:
        stems: dict[str, list[str]] = {}
        for name in self.contents.images:
            for stem in (os.path.splitext(name)[0], name):
                stems.setdefault(stem, []).append(name)
        images = {file: stems.get(name[:-4]) for name, file in self.contents.texts.items()}
        used = [file for file, names in images.items() if names]
        texts = read_texts(self.files, used, self.listing.problems)
        self.unreadable = {name for file in used if file not in texts for name in images[file]}
        for file, text in texts.items():
            for name in images[file]:
                self.found[name].captions += text.split("\n")
        unused = [file for file, names in images.items() if not names]
        self.contents.others |= {str(file): file for file in unused if is_document(file)}
        # An image in a format that is not read is named itself, rather than its captions.
        others = {os.path.splitext(name)[0] for name, file in self.contents.others.items() if is_other_image(file.name)}
        orphans = [
            str(file)
            for name, file in self.contents.texts.items()
            if file in unused and not is_document(file) and name[:-4] not in others
        ]
        if orphans:
            self.listing.notes.append(f"{such_as(orphans, 'text files')}: not read, as there is no image of that name")

    def _note_unread_texts(self) -> None:
        stems = {stem for name in self.contents.images for stem in (os.path.splitext(name)[0], name)}
        count = sum(name[:-4] in stems for name in self.contents.texts)
        if count:
            source = next(iter(self.read_lists.values()), None) or next(iter(self.contents.parquet.values()))
            self.listing.notes.append(f"{count} .txt files beside images were not read: {source} holds the captions")
        others = {name: file for name, file in self.contents.texts.items() if name[:-4] not in stems}
        self.contents.others |= others
        self.contents.texts = {}

    def _report_images_without_caption(self) -> None:
        missing = [
            name for name, found in self.found.items() if name not in self.unreadable and not clean_once(found.captions)
        ]
        texts = {name[:-4]: file for name, file in self.contents.texts.items()}
        empty = [name for name in missing if {name, os.path.splitext(name)[0]} & set(texts)]
        for name in empty:
            file = texts.get(name) or texts[os.path.splitext(name)[0]]
            self.listing.problems.append(f"{file} holds no caption{self._wordless(name)}; write one per line")
        missing = [name for name in missing if name not in empty]
        if missing:
            more = f", nor have {len(missing) - 1} more" if len(missing) > 1 else ""
            lists = list(self.read_lists.values())
            remedy = f"a row in {lists[0].name}" if lists else f"{os.path.splitext(missing[0])[0]}.txt"
            self.listing.problems.append(
                f"{self.contents.images[missing[0]]} has no caption{self._wordless(missing[0])}{more}; write {remedy} "
                f"or take the image out of the folder{unread_list(self.contents)}"
            )

    def _wordless(self, name: str) -> str:
        lines = [line.strip() for line in self.found[name].captions if line.strip()]
        return f" with a word (only {printable(lines[0][:40])!r})" if lines else ""

    def _too_few(self) -> str:
        lines = self.listing.problems + self.listing.notes
        because = f" ({lines[0]})" if lines else ""
        source = printable(self.files.sources[0])
        return (
            f"{source} holds {len(self.contents.images)} images{because}; give one folder or archive with at least 2, "
            "one to train and one to test"
        )

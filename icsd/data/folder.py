"""Any folder of images with captions: read, split and written."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from icsd.data.captions import tokenise
from icsd.data.dataset import CaptionedImages, DataConfig, Split, to_picture
from icsd.errors import InputError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")

_LISTS = ("captions.csv", "captions.jsonl")
_MEMORY = 256 * 2**20  # bytes of decoded pictures kept in memory; a larger split is decoded picture by picture


def open_folder(config: DataConfig, split: Split, resolution: int) -> CaptionedImages:
    """Open one split of a folder, its subfolders included; see `icsd.data.open_dataset`.

    Captions come from ``captions.csv`` (columns file, caption) or ``captions.jsonl`` (keys file, caption), where an
    image may have several rows; without either, from a ``.txt`` beside each image, one caption per line. Lines without
    a word do not count, nor do hidden files. The images with the smallest hashes of seed and name form the test split,
    so a new image moves few others.
    """
    root = Path(config.root)
    if not root.is_dir():
        raise InputError(f"data.root={root} is not a folder; give the folder that holds the images")
    if not 0 < config.test_fraction < 1:
        raise InputError(f"data.test_fraction={config.test_fraction} must lie between 0 and 1")
    files = sorted(
        file
        for file in root.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if len(files) < 2:
        found = f"holds {len(files)} images ({', '.join(IMAGE_SUFFIXES)})"
        raise InputError(f"data.root={root} {found}; at least 2 are needed, one to train and one to test")
    captions = _read_captions(root, files)

    names = [file.relative_to(root).as_posix() for file in files]
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{config.seed}:{name}".encode()).digest())
    held_out = set(ranked[: min(max(round(config.test_fraction * len(files)), 1), len(files) - 1)])
    kept = [index for index, name in enumerate(names) if (name in held_out) == (split == "test")]
    pictures = _Pictures([files[index] for index in kept], resolution)
    return CaptionedImages(
        root.resolve().name,
        split,
        pictures.in_memory() if len(kept) * 3 * resolution**2 <= _MEMORY else pictures.checked(),
        [captions[names[index]] for index in kept],
        kept,
        flip=config.flip,
    )


def write_folder(dataset: CaptionedImages, path: Path) -> None:
    """Write every picture as PNG with its captions beside it, in the form that `open_folder` reads.

    Args:
        dataset: Images to write, at their own resolution.
        path: A new or empty folder. The attribution that the pictures ask for is written there too.

    Raises:
        InputError: If ``path`` holds anything already.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not an empty folder; choose a new one, nothing was written")
    path.mkdir(parents=True, exist_ok=True)
    for index, captions in enumerate(dataset.captions):
        stem = path / f"{dataset.split}_{index:06d}"
        Image.fromarray(dataset.pictures[index].permute(1, 2, 0).numpy()).save(stem.with_suffix(".png"))
        stem.with_suffix(".txt").write_text("".join(f"{caption}\n" for caption in captions), encoding="utf-8")
    if dataset.attribution:
        (path / "ATTRIBUTION").write_text(f"{dataset.attribution}\n", encoding="utf-8")


class _Pictures:
    """Pictures decoded on demand."""

    def __init__(self, files: list[Path], resolution: int):
        self.files = files
        self.resolution = resolution

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        file = self.files[index]
        try:
            with Image.open(file) as image:
                image.draft("RGB", (2 * self.resolution, 2 * self.resolution))  # a large JPEG is decoded smaller
                return to_picture(image, self.resolution)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(file, error) from error

    def in_memory(self) -> Tensor:
        """Decode every picture."""
        indices = tqdm(range(len(self)), desc="reading images", unit="image", leave=False, delay=2)
        return torch.stack([self[index] for index in indices])

    def checked(self) -> _Pictures:
        """Open every file, so that most unreadable ones are found now rather than in the middle of a run."""
        for file in self.files:
            try:
                Image.open(file).close()
            except OSError as error:
                raise _unreadable(file, error) from error
        return self


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} cannot be read as an image ({error}); replace it or take it out of the folder")


def _read_captions(root: Path, files: list[Path]) -> dict[str, list[str]]:
    """Captions by name below ``root``; every image has at least one."""
    captions = {file.relative_to(root).as_posix(): [] for file in files}
    lists = [root / name for name in _LISTS if (root / name).exists()]
    if len(lists) > 1:
        raise InputError(f"{root} holds both {' and '.join(_LISTS)}; keep one")
    for source in lists:
        for place, name, caption in (_csv_rows if source.suffix == ".csv" else _jsonl_rows)(source):
            listed = captions.get(PurePosixPath(name).as_posix())
            if listed is None:
                raise InputError(f"{place} names {name!r}, which is not an image in {root}; correct or remove the row")
            listed.append(caption)
    if not lists:
        for name, lines in captions.items():
            beside = (root / name).with_suffix(".txt")
            if beside.exists():
                lines += _read(beside).split("\n")
                if not any(map(tokenise, lines)):
                    raise InputError(f"{beside} holds no caption; write one per line")
    captions = {name: [" ".join(line.split()) for line in lines if tokenise(line)] for name, lines in captions.items()}
    bare = [name for name, lines in captions.items() if not lines]
    if bare:
        place = f"a row in {lists[0].name}" if lists else f"{Path(bare[0]).with_suffix('.txt')}"
        more = f", nor have {len(bare) - 1} more" if len(bare) > 1 else ""
        raise InputError(f"{root / bare[0]} has no caption{more}; write {place} or take the image out of the folder")
    return captions


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text ({error}); save it as UTF-8") from error


def _csv_rows(source: Path) -> Iterator[tuple[str, str, str]]:
    reader = csv.DictReader(io.StringIO(_read(source)))
    try:
        if not {"file", "caption"} <= set(reader.fieldnames or ()):
            raise InputError(f"{source} has the columns {reader.fieldnames or []}; its first line must be file,caption")
        for row in reader:
            yield f"{source}, line {reader.line_num},", row["file"] or "", row["caption"] or ""
    except csv.Error as error:
        raise InputError(f"{source} is not CSV after line {reader.line_num} ({error}); correct the file") from error


def _jsonl_rows(source: Path) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(_read(source).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file"], row["caption"]
        except (ValueError, TypeError, KeyError):
            name = caption = None
        if not (isinstance(name, str) and isinstance(caption, str)):
            raise InputError(f'{source}, line {number}, must read {{"file": "name.png", "caption": "a sentence"}}')
        yield f"{source}, line {number},", name, caption

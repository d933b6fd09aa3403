"""Captioned images and their configuration."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from icsd.data.captions import Vocabulary
from icsd.errors import InputError

Split = Literal["train", "test"]


@dataclass
class DataConfig:
    """Which captioned images to use, and what is held out of training."""

    name: Literal["emoji", "procedural-flowers", "procedural-birds", "folder", "webdataset", "cub", "oxford"] = "emoji"
    """Source: real emoji art, drawn flowers or birds, your own folder of images with captions, WebDataset shards, or
    what `icsd data prepare` made of CUB-200-2011 or Oxford-102."""

    root: Path | None = None
    """Folder with the images and captions, shards or prepared set; for folder, webdataset, cub and oxford."""

    subset: Literal["busts", "people", "all"] = "busts"
    """Emoji: 828 head-and-shoulders images, all 1,368 people, or every named emoji (3,944)."""

    holdout: Literal["composition", "unseen-class"] = "composition"
    """Test split of emoji and procedural sets: unseen combinations of attributes each seen, or unseen classes."""

    test_fraction: float = 0.1
    """Share of a folder's or shards' images that goes to the test split, chosen by a hash of the file name, where they
    do not tell it themselves."""

    size: int = 2000
    """Number of images of a procedural set, both splits together."""

    seed: int = 0
    """Seed of the images of a procedural set, and of a folder's split."""

    flip: bool = False
    """Mirror training images at random; not for captions that tell left from right."""

    margin: float = 0.0
    """Share by which images are made larger than asked for, to cut a square from them: at random in training, in the
    middle in the test split. AttnGAN cuts 64 pixels from 76, a margin of 0.1875; 0 always keeps the middle square."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 1:
            raise InputError(f"data.margin is {self.margin}: give a share from 0 to 1")


class ImageList(Protocol):
    """Images by index: a uint8 tensor (N, 3, H, W) held in memory, or an object that decodes on demand."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int) -> Tensor:
        """Image ``index``, uint8 (3, H, W)."""


@dataclass(eq=False, repr=False)
class CaptionedImages(Dataset):
    """Square images, several captions each, and attributes where they are known.

    An item is ``{"image": float32 (3, R, R) in [-1, 1], "caption": str, "class_id": int, "index": int}``. The train
    split draws a caption at random (torch's generator, seeded per worker by the data loader); the test split gives the
    first one.

    Attributes:
        name: Source of the images.
        split: "train" or "test".
        images: N images, uint8 (3, H, W) each, both sides at least R.
        captions: Captions of each image, the plainest first.
        class_ids: Class of each image; captions of one class are close in meaning.
        attributes: Name to int64 (N,) values; empty where unknown.
        attribute_names: Name to the names of its values.
        attribution: Line owed by whoever shows the images, or None.
        flip: Mirror half of the training images at random.
        resolution: Side R of the squares cut from the images, at random in the train split, else in the middle; None
            where the images are such squares.
        vocabulary: Words that a released text encoder of this set goes with, or None.
    """

    name: str
    split: Split
    images: ImageList
    captions: list[list[str]]
    class_ids: list[int]
    attributes: dict[str, Tensor] = field(default_factory=dict)
    attribute_names: dict[str, list[str]] = field(default_factory=dict)
    attribution: str | None = None
    flip: bool = False
    resolution: int | None = None
    vocabulary: Vocabulary | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        """Item ``index``; see the class."""
        image = self.images[index]
        sentences = self.captions[index]
        training = self.split == "train"
        choice = int(torch.randint(len(sentences), ())) if training else 0
        image = self._cut(image, training)
        if training and self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return {
            "image": image.float().div(127.5).sub(1.0),
            "caption": sentences[choice],
            "class_id": self.class_ids[index],
            "index": index,
        }

    def _cut(self, image: Tensor, training: bool) -> Tensor:
        side = self.resolution or image.shape[-1]
        spare = [length - side for length in image.shape[-2:]]
        if not any(spare):
            return image
        top, left = (int(torch.randint(length + 1, ())) if training else length // 2 for length in spare)
        return image[:, top : top + side, left : left + side]

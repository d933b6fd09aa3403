"""Captioned images and their configuration."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from icsd.data.captions import Vocabulary
from icsd.data.limits import Limits
from icsd.errors import InputError

Split = Literal["train", "test"]

LARGEST_DRAWN = 1_000_000  # images of a procedural set


@dataclass
class DataConfig:
    """Which captioned images to use, and what is held out of training."""

    name: Literal[
        "emoji", "procedural-flowers", "procedural-birds", "folder", "webdataset", "coco", "cub", "oxford"
    ] = "emoji"
    """The source: emoji, drawn flowers or birds, your own folder of images with captions, WebDataset shards, COCO
    captions, or CUB-200-2011 or Oxford-102 as `icsd data prepare` wrote them."""

    root: Path | None = None
    """The folder that holds the images and captions, the shards or the prepared set."""

    subset: Literal["busts", "people", "all"] = "busts"
    """Emoji: 828 head-and-shoulders images, all 1,368 people, or every named emoji (3,944)."""

    holdout: Literal["composition", "unseen-class"] = "composition"
    """The test split of emoji and procedural sets: new combinations of attributes that were seen, or unseen classes."""

    test_fraction: float = 0.1
    """Fraction of the images of a folder or of shards that forms the test split, chosen by a hash of the file name. It
    is not used for sets that define their own splits."""

    size: int = 2000
    """Number of images of a procedural set, both splits together."""

    seed: int = 0
    """Seed of the images of a procedural set, and of the split of a folder."""

    flip: bool = False
    """Mirror training images at random. Do not use it with captions that say left or right."""

    margin: float = 0.0
    """Fraction by which images are made larger than the training resolution before a square is cut from them: at a
    random place in training, in the middle in the test split. AttnGAN cuts 64 pixels from 76, a margin of 0.1875. With
    0 the middle square is used."""

    fit: Literal["crop", "pad"] = "crop"
    """The way to make squares of images: "crop" cuts the middle square; "pad" shows the whole image on white."""

    limits: Limits = field(default_factory=Limits)
    """The largest files and images that are read."""

    def __post_init__(self) -> None:
        if not 0 <= self.margin <= 1:
            raise InputError(f"data.margin is {self.margin}: give a fraction from 0 to 1")
        if self.size > LARGEST_DRAWN:
            raise InputError(
                f"data.size is {self.size}: give at most {LARGEST_DRAWN}, since drawn images stay in memory"
            )


class ImageList(Protocol):
    """A sequence of images: a uint8 tensor (N, 3, H, W) in memory, or an object that decodes on demand."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int) -> Tensor:
        """Return image ``index``, uint8 (3, H, W)."""


@dataclass(eq=False, repr=False)
class CaptionedImages(Dataset):
    """A data set of square images with several captions each, and with attributes where they are known.

    An item is ``{"image": float32 (3, R, R) in [-1, 1], "caption": str, "class_id": int, "index": int}``. The train
    split draws a caption at random (with torch's generator, which the data loader seeds in each worker); the test split
    returns the first one.

    Attributes:
        name: The source of the images.
        split: "train" or "test".
        images: N images, uint8 (3, H, W) each, both sides at least R.
        captions: Captions of each image. The first one is used where one caption stands for the image.
        class_ids: The class of each image; captions of one class are similar in meaning.
        attributes: The values of each attribute, int64 (N,), by name; empty where unknown.
        attribute_names: The names of the values of each attribute, by name.
        attribution: The credit line that must stand beside the images wherever they are shown, or None.
        flip: Mirror half of the training images at random.
        resolution: Side R of the squares cut from the images, at a random place in the train split and in the middle in
            the test split; None if the images already are such squares.
        vocabulary: The words of the released text encoder of this set, or None.
        notes: Lines about the set for its user.
        class_names: The name of the class of each image, None for an image without one; empty if classes are numbers.
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
    notes: list[str] = field(default_factory=list)
    class_names: list[str | None] = field(default_factory=list)

    def class_name(self, index: int) -> str | None:
        """Return the name of the class of image ``index``, or None if the set has no classes."""
        return self.class_names[index] if self.class_names else str(self.class_ids[index])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        """Return item ``index``; see the class."""
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

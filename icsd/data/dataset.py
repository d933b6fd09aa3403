"""Captioned images and the one function that opens them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

Split = Literal["train", "test"]


@dataclass
class DataConfig:
    """Which captioned images to use, and what is held out of training."""

    name: Literal["emoji", "procedural-flowers", "procedural-birds", "folder"] = "emoji"
    """Source: real emoji art, drawn flowers or birds, or your own folder of images with captions."""

    root: Path | None = None
    """Folder of images with captions; name=folder only."""

    subset: Literal["busts", "people", "all"] = "busts"
    """Emoji: 828 head-and-shoulders pictures, all 1,368 people, or every named emoji (3,944)."""

    holdout: Literal["composition", "unseen-class"] = "composition"
    """Test split of emoji and procedural sets: unseen combinations of attributes each seen, or unseen classes."""

    test_fraction: float = 0.1
    """Share of a folder's images that goes to the test split, chosen by a hash of the file name."""

    size: int = 2000
    """Number of pictures of a procedural set, both splits together."""

    seed: int = 0
    """Seed of the pictures of a procedural set, and of a folder's split."""

    flip: bool = False
    """Mirror training pictures at random; not for captions that tell left from right."""


class Pictures(Protocol):
    """Pictures by index: a uint8 tensor (N, 3, R, R) held in memory, or an object that decodes on demand."""

    def __len__(self) -> int:
        """Number of pictures."""

    def __getitem__(self, index: int) -> Tensor:
        """Picture ``index``, uint8 (3, R, R)."""


@dataclass(eq=False, repr=False)
class CaptionedImages(Dataset):
    """Square images, several captions each, and attributes where they are known.

    An item is ``{"image": float32 (3, R, R) in [-1, 1], "caption": str, "class_id": int, "index": int}``. The train
    split draws a caption at random (torch's generator, seeded per worker by the data loader); the test split gives the
    first one.

    Attributes:
        name: Source of the images.
        split: "train" or "test".
        pictures: N pictures, uint8 (3, R, R) each.
        captions: Captions of each picture, the plainest first.
        class_ids: Class of each picture; captions of one class are close in meaning.
        attributes: Name to int64 (N,) values; empty where unknown.
        attribute_names: Name to the names of its values.
        attribution: Line owed by whoever shows the pictures, or None.
        flip: Mirror half of the training pictures at random.
    """

    name: str
    split: Split
    pictures: Pictures
    captions: list[list[str]]
    class_ids: list[int]
    attributes: dict[str, Tensor] = field(default_factory=dict)
    attribute_names: dict[str, list[str]] = field(default_factory=dict)
    attribution: str | None = None
    flip: bool = False

    def __len__(self) -> int:
        """Number of images."""
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        """Item ``index``; see the class."""
        picture = self.pictures[index]
        sentences = self.captions[index]
        training = self.split == "train"
        choice = int(torch.randint(len(sentences), ())) if training else 0
        if training and self.flip and torch.rand(()) < 0.5:
            picture = picture.flip(-1)
        return {
            "image": picture.float().div(127.5).sub(1.0),
            "caption": sentences[choice],
            "class_id": self.class_ids[index],
            "index": index,
        }


def to_picture(image: Image.Image, resolution: int) -> Tensor:
    """Bring any Pillow image to uint8 (3, resolution, resolution).

    Turns it as its EXIF orientation says, lays transparency on white, cuts the middle square and resizes (Lanczos).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert("RGB") would clip 16 bits instead of scaling them
        image = image.point(lambda value: value * (1 / 256), "L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

"""Captioned images and the one function that opens them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from icsd.errors import InputError

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


class CaptionedImages(Dataset):
    """Square images, several captions each, and attributes where they are known.

    An item is ``{"image": float32 (3, R, R) in [-1, 1], "caption": str, "class_id": int, "index": int}``. The train
    split draws a caption at random (torch's generator, seeded per worker by the data loader); the test split gives the
    first one.

    Attributes:
        name: Source of the images.
        split: "train" or "test".
        captions: Captions of each image, the plainest first.
        class_ids: Class of each image; captions of one class are close in meaning.
        attributes: Name to int64 (N,) values; empty where unknown.
        attribute_names: Name to the names of its values.
        attribution: Line owed by whoever shows the pictures, or None.

    Args:
        name: See above.
        split: See above.
        pictures: N pictures, uint8 (3, R, R) each.
        captions: See above.
        class_ids: See above.
        attributes: See above.
        attribute_names: See above.
        attribution: See above.
        flip: Mirror half of the training pictures at random.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        pictures: Pictures,
        captions: Sequence[Sequence[str]],
        class_ids: Sequence[int],
        *,
        attributes: dict[str, Tensor] | None = None,
        attribute_names: dict[str, list[str]] | None = None,
        attribution: str | None = None,
        flip: bool = False,
    ):
        self.name = name
        self.split = split
        self.captions = [list(sentences) for sentences in captions]
        self.class_ids = list(class_ids)
        self.attributes = attributes or {}
        self.attribute_names = attribute_names or {}
        self.attribution = attribution
        self._pictures = pictures
        self._flip = flip and split == "train"

    def __len__(self) -> int:
        """Number of images."""
        return len(self.captions)

    def __getitem__(self, index: int) -> dict:
        """Item ``index``; see the class."""
        picture = self._pictures[index]
        sentences = self.captions[index]
        choice = int(torch.randint(len(sentences), ())) if self.split == "train" else 0
        if self._flip and torch.rand(()) < 0.5:
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
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("RGB"), (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_dataset(config: DataConfig, split: Split, resolution: int) -> CaptionedImages:
    """Open one split of the configured images.

    Args:
        config: Which images.
        split: "train" or "test"; no image is in both.
        resolution: Side R of the images, in pixels.

    Returns:
        The images, deterministic in ``config`` and ``resolution``.

    Raises:
        InputError: If the configuration, a file or a needed package cannot be used; the message says what to do.
    """
    if (config.root is None) == (config.name == "folder"):
        remedy = "give the folder of images" if config.root is None else "leave it out or set data.name=folder"
        raise InputError(f"data.root={config.root} does not go with data.name={config.name}; {remedy}")
    if config.name == "emoji":
        from icsd.data.emoji import open_emoji as opener
    else:
        raise InputError(f"data.name={config.name!r} is unknown")
    return opener(config, split, resolution)

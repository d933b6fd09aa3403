"""Decoding of image files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from icsd.data.files import File, Files
from icsd.errors import InputError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""The exceptions that Pillow raises for a file that is broken or not an image."""

_MEMORY = 256 * 2**20  # bytes of decoded images kept in memory; the images of a larger split are decoded on demand


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to RGB, with its EXIF orientation applied and transparent parts on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert("RGB") would clip 16 bits instead of scaling them
        image = image.point(lambda value: value * (1 / 256), "L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_short_side(image: Image.Image, side: int) -> Image.Image:
    """Resize (Lanczos) so that the shorter side is ``side``."""
    scale = side / min(image.size)
    return image.resize([max(round(length * scale), side) for length in image.size], Image.Resampling.LANCZOS)


def image_to_tensor(image: Image.Image, side: int, square: bool = True) -> Tensor:
    """Convert any Pillow image to a uint8 tensor.

    Args:
        image: Any image; see `to_rgb`.
        side: The shorter side of the result.
        square: Keep only the middle square.

    Returns:
        uint8 (3, H, W).
    """
    image = to_rgb(image)
    image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS) if square else to_short_side(image, side)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_images(files: Files, sources: Sequence[File], side: int, square: bool) -> Tensor | LazyImages:
    """Open image files. A moderate number of squares is decoded now, anything else on demand.

    Args:
        files: The files that hold them.
        sources: N image files.
        side: Shorter side of the images.
        square: Keep only the middle squares.

    Returns:
        The images, uint8 (N, 3, side, side), or a sequence of uint8 (3, H, W).

    Raises:
        InputError: A file cannot be read as an image. For images decoded on demand only the headers are checked.
    """
    images = LazyImages(files, sources, side, square)
    if square and len(sources) * 3 * side**2 <= _MEMORY:
        return torch.stack([images[index] for index in tqdm(range(len(sources)), **_PROGRESS)])
    images.check()
    return images


_PROGRESS = {"desc": "reading images", "unit": "image", "leave": False, "delay": 2, "disable": None}


class LazyImages:
    """A sequence of images that are decoded on demand, in any process; see `open_images`."""

    def __init__(self, files: Files, sources: Sequence[File], side: int, square: bool) -> None:
        self.ranges = [files.byte_range(source) for source in sources]
        self.names = [str(source) for source in sources]
        self.side = side
        self.square = square

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> Tensor:
        try:
            with self.ranges[index].open() as file, Image.open(file) as image:
                image.draft("RGB", (2 * self.side, 2 * self.side))  # a large JPEG is decoded smaller
                return image_to_tensor(image, self.side, self.square)
        except UNREADABLE as error:
            raise unreadable(self.names[index], error) from error

    def check(self) -> None:
        """Read the header of every file, so that most unreadable files are found before a run starts."""
        for index in tqdm(range(len(self)), **_PROGRESS):
            try:
                with self.ranges[index].open() as file:
                    Image.open(file).close()
            except UNREADABLE as error:
                raise unreadable(self.names[index], error) from error


def unreadable(name: str, error: Exception) -> InputError:
    """Return the error for a file that cannot be decoded."""
    return InputError(f"{name} cannot be read as an image ({error}); replace it or take it out of the set")

"""Image files to images."""

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
"""What Pillow raises on a file that is no image, or a broken one."""

_MEMORY = 256 * 2**20  # bytes of decoded images kept in memory; a larger split is decoded image by image


def to_rgb(image: Image.Image) -> Image.Image:
    """Bring any Pillow image to RGB: turned as its EXIF orientation says, transparency laid on white."""
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
    """Bring any Pillow image to a uint8 tensor.

    Args:
        image: Any image; see `to_rgb`.
        side: Its shorter side afterwards.
        square: Keep the middle square only.

    Returns:
        uint8 (3, H, W).
    """
    image = to_rgb(image)
    image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS) if square else to_short_side(image, side)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_images(files: Files, sources: Sequence[File], side: int, square: bool) -> Tensor | LazyImages:
    """Images of image files: decoded now where squares of a moderate number are wanted, else on demand.

    Args:
        files: Where they are.
        sources: N image files.
        side: Shorter side of the images.
        square: Keep middle squares only.

    Returns:
        uint8 (N, 3, side, side), or images of any H, W.

    Raises:
        InputError: A file cannot be read as an image. On demand, that is checked for the beginnings of the files.
    """
    images = LazyImages(files, sources, side, square)
    if square and len(sources) * 3 * side**2 <= _MEMORY:
        return torch.stack([images[index] for index in tqdm(range(len(sources)), **_PROGRESS)])
    images.check()
    return images


_PROGRESS = {"desc": "reading images", "unit": "image", "leave": False, "delay": 2, "disable": None}


class LazyImages:
    """Images decoded on demand, in any process; see `open_images`."""

    def __init__(self, files: Files, sources: Sequence[File], side: int, square: bool) -> None:
        self.places = [files.place(source) for source in sources]
        self.names = [str(source) for source in sources]
        self.side = side
        self.square = square

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        try:
            with self.places[index].open() as file, Image.open(file) as image:
                image.draft("RGB", (2 * self.side, 2 * self.side))  # a large JPEG is decoded smaller
                return image_to_tensor(image, self.side, self.square)
        except UNREADABLE as error:
            raise unreadable(self.names[index], error) from error

    def check(self) -> None:
        """Open every file, so that most unreadable ones are found now rather than in the middle of a run."""
        for index in tqdm(range(len(self)), **_PROGRESS):
            try:
                with self.places[index].open() as file:
                    Image.open(file).close()
            except UNREADABLE as error:
                raise unreadable(self.names[index], error) from error


def unreadable(name: str, error: Exception) -> InputError:
    """The error for a file that cannot be decoded."""
    return InputError(f"{name} cannot be read as an image ({error}); replace it or take it out of the set")

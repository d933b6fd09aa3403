"""Decoding of image files."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Sequence
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from icsd.data.files import File, Files
from icsd.data.limits import Limits
from icsd.errors import InputError

Fit = Literal["crop", "pad"]

MAX_ASPECT = 16
"""The largest ratio of the sides of an image. Only the middle part of a longer one is used."""

_MEMORY = 256 * 2**20  # bytes of decoded images kept in memory; the images of a larger split are decoded on demand

# Formats of Pillow that start another program, are stubs, or decompress without a limit.
_FORMATS_LEFT_OUT = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}

_OTHER_SUFFIXES = (
    *(".3fr", ".ai", ".arw", ".cr2", ".cr3", ".dng", ".emf", ".eps", ".exr", ".fit", ".fits", ".hdr", ".heic", ".heif"),
    *(".hif", ".jxl", ".jxr", ".nef", ".orf", ".pef", ".raf", ".raw", ".rw2", ".svg", ".svgz", ".wmf", ".xcf"),
)

_opening = threading.Lock()


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of the images that can be read: those of Pillow's formats."""
    formats = readable_formats()
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in formats))


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Return the names of the image formats that can be read."""
    known = set(Image.registered_extensions().values())
    return tuple(sorted(known & set(Image.OPEN) - _FORMATS_LEFT_OUT))


def is_image(name: str) -> bool:
    """Return True if a file of this name is an image that can be read."""
    return name.lower().endswith(image_suffixes())


def is_other_image(name: str) -> bool:
    """Return True if a file of this name is an image in a format that cannot be read."""
    return name.lower().endswith(_OTHER_SUFFIXES) and not is_image(name)


def open_image(file: BinaryIO, limits: Limits) -> Image.Image:
    """Read the header of an image file.

    Raises:
        InputError: The image has too many pixels, or pixels of an unknown scale; the message lacks the name of the
            file.
        Exception: The file is broken or not an image.
    """
    with _opening:  # Pillow's own limit is a global variable, and its message names no option
        allowed, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=readable_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = allowed
    if image.width * image.height > limits.max_pixels:
        raise InputError(
            f"has {image.width} x {image.height} pixels, more than max_pixels={limits.max_pixels} allows; "
            "raise max_pixels if the image is right"
        )
    if image.mode == "F":
        raise InputError("has floating-point pixels, whose scale is not known; convert it to 8 or 16 bits a pixel")
    return image


def limit_aspect(image: Image.Image) -> Image.Image:
    """Cut an image to the middle part whose sides have a ratio of at most `MAX_ASPECT`.

    A crop for training sees only as much of an image as is wide. Without a limit, a line of 6000 x 1 pixels would be
    enlarged to billions.
    """
    long, short = max(image.size), min(image.size)
    if long <= MAX_ASPECT * short:
        return image
    image = _upright(image)
    width, height = (min(length, MAX_ASPECT * short) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to RGB.

    Its EXIF orientation is applied, its color profile is converted to sRGB, and transparent parts become white.

    Raises:
        InputError: The image has pixels of more than 16 bits; the message lacks the name of the file.
    """
    of_format = image.format
    image = _upright(image)
    if image.mode.startswith("I"):
        image = _to_gray(image, of_format)
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        gray = image.mode == "LA"
        image = image.convert("RGBA")
        colors = _to_srgb(image.convert("L" if gray else "RGB"), profile).convert("RGB")
        colors.putalpha(image.getchannel("A"))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colors)
    else:
        image = _to_srgb(image, profile)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the orientation in the EXIF data of an image. Data that are broken are ignored."""
    image.load()  # broken pixels are an error
    try:
        image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # broken data may raise anything
        image.info.pop("exif", None)
    return ImageOps.exif_transpose(image)


def _to_gray(image: Image.Image, of_format: str | None) -> Image.Image:
    """Convert an image of integers to 8 bits. Pillow would clip larger ones instead of scaling them."""
    values = np.asarray(image)
    least, most = values.min(), values.max()
    if least < 0 or most > 0xFFFF:
        raise InputError(
            f"has pixels from {least} to {most}, whose scale is not known; convert it to 8 or 16 bits a pixel"
        )
    # Pillow reads these formats as integers of the mode I from 9 bits on, and scales them to 16.
    sixteen_bits = image.mode != "I" or of_format in ("PNG", "PPM") or most > 0xFF
    gray = Image.fromarray((values >> 8 if sixteen_bits else values).astype(np.uint8))
    gray.info = dict(image.info)
    transparent = gray.info.pop("transparency", None)
    if transparent is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image from its color profile to sRGB. Profiles that are broken or of another mode are ignored."""
    if not profile:
        return image
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform = _srgb_transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


@functools.lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in (source.profile.profile_description or ""):
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def to_short_side(image: Image.Image, side: int) -> Image.Image:
    """Resize (Lanczos) so that the shorter side is ``side``."""
    scale = side / min(image.size)
    return image.resize([max(round(length * scale), side) for length in image.size], Image.Resampling.LANCZOS)


def image_to_tensor(image: Image.Image, side: int, square: bool = True, fit: Fit = "crop") -> Tensor:
    """Convert any Pillow image to a uint8 tensor.

    Args:
        image: Any image; see `to_rgb`.
        side: The shorter side of the result.
        square: Make a square. Otherwise the aspect ratio is kept, up to `MAX_ASPECT`.
        fit: The way to make a square: "crop" keeps the middle square; "pad" keeps the whole image, on white.

    Returns:
        uint8 (3, H, W).
    """
    image = to_rgb(limit_aspect(image))
    if fit == "pad":
        image = ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color="white")
    elif square:
        image = ImageOps.fit(image, (side, side), Image.Resampling.LANCZOS)
    else:
        image = to_short_side(image, side)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def open_images(
    files: Files, sources: Sequence[File], side: int, square: bool, fit: Fit = "crop"
) -> Tensor | LazyImages:
    """Open image files. A moderate number of squares is decoded now, anything else on demand.

    Args:
        files: The files that hold them.
        sources: N image files.
        side: Shorter side of the images.
        square: Make squares; otherwise keep the aspect ratio.
        fit: The way to make a square; see `image_to_tensor`.

    Returns:
        The images, uint8 (N, 3, side, side), or a sequence of uint8 (3, H, W).

    Raises:
        InputError: A file cannot be read as an image. For images decoded on demand only the headers are checked.
    """
    images = LazyImages(files, sources, side, square, fit)
    if square and len(sources) * 3 * side**2 <= _MEMORY:
        return torch.stack([images[index] for index in tqdm(range(len(sources)), **_PROGRESS)])
    images.check()
    return images


_PROGRESS = {"desc": "reading images", "unit": "image", "leave": False, "delay": 2, "disable": None}


class LazyImages:
    """A sequence of images that are decoded on demand, in any process; see `open_images`."""

    def __init__(self, files: Files, sources: Sequence[File], side: int, square: bool, fit: Fit = "crop") -> None:
        self.ranges = [files.byte_range(source) for source in sources]
        self.names = [str(source) for source in sources]
        self.limits = files.limits
        self.side = side
        self.square = square
        self.fit = fit

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> Tensor:
        try:
            with self.ranges[index].open() as file:
                image = open_image(file, self.limits)
                image.draft("RGB", (2 * self.side, 2 * self.side))  # a large JPEG is decoded at a lower resolution
                return image_to_tensor(image, self.side, self.square, self.fit)
        except Exception as error:  # a broken image may raise anything
            raise unreadable(self.names[index], error) from error

    def check(self) -> None:
        """Read the header of every file, so that most unreadable files are found before a run starts."""
        for index in tqdm(range(len(self)), **_PROGRESS):
            try:
                with self.ranges[index].open() as file:
                    open_image(file, self.limits).close()
            except Exception as error:  # a broken image may raise anything
                raise unreadable(self.names[index], error) from error


def unreadable(name: str, error: Exception) -> InputError:
    """Return the error for a file that cannot be decoded."""
    if isinstance(error, InputError):
        return InputError(f"{name} {error}")
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{name} cannot be read ({error.strerror}); correct that or take it out of the set")
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # Pillow's message is the address of an object
        reason = "its format is unknown"
    return InputError(f"{name} cannot be read as an image ({reason}); replace it or take it out of the set")

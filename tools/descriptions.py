"""Descriptions in PNG files: the text that an image was drawn from. Tests compare it with what its tool says now."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

KEYWORD = "Description"


def write_description(path: Path, text: str) -> None:
    """Write a description into an image, in place of the one that it has."""
    info = PngInfo()
    info.add_itxt(KEYWORD, text, zip=True)
    with Image.open(path) as image:
        image.load()
        image.save(path, pnginfo=info, dpi=image.info.get("dpi"))


def read_description(path: Path) -> str | None:
    """Return the description of an image, if it has one."""
    with Image.open(path) as image:
        return image.text.get(KEYWORD)

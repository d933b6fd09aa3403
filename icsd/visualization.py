"""Images to look at: grids of every stage with captions underneath, attention, matrices."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

_PAPER, _FRAME, _INK, _PALE = "#f7f7f5", "#d8d8d4", "#222222", "#77776f"
_MARGIN, _GAP, _PADDING = 24, 20, 4
_TEXT, _SMALL, _TITLE = 14, 12, 20
_MOST_LINES = 4


def caption_grid(
    stages: Sequence[Tensor],
    captions: Sequence[str],
    *,
    headers: Sequence[str] | None = None,
    title: str | None = None,
    footer: str | None = None,
    columns: int | None = None,
    side: int = 112,
) -> Image.Image:
    """Draw samples as a grid of tiles, each its stages from left to right with the caption wrapped underneath.

    Args:
        stages: One tensor (B, 3, r, r) in [-1, 1] per stage, r free; one stage alone makes a contact sheet.
        captions: B sentences.
        headers: A heading per stage; its resolution by default, and none for one stage.
        title: Line on top.
        footer: Line at the bottom, such as the attribution that the art asks for.
        columns: Tiles per row; chosen for a page a little wider than high by default.
        side: Smallest side of a drawn image in pixels; every stage is enlarged (nearest) to the same side.

    Returns:
        The image, RGB.
    """
    finest = max(images.shape[-1] for images in stages)
    side = finest * math.ceil(side / finest)
    if headers is None:
        headers = [f"{images.shape[-1]} px" for images in stages] if len(stages) > 1 else []
    width = len(stages) * (side + _PADDING) - _PADDING
    texts = [_wrap(caption, _TEXT, width) for caption in captions]
    columns = max(min(columns or math.ceil(math.sqrt(2 * len(texts) * side / width)), len(texts)), 1)
    rows = [range(start, min(start + columns, len(texts))) for start in range(0, len(texts), columns)]

    page_width = 2 * _MARGIN + columns * (width + _GAP) - _GAP
    heading = _wrap(title or "", _TITLE, page_width - 2 * _MARGIN)
    ending = _wrap(footer or "", _SMALL, page_width - 2 * _MARGIN)
    top = _MARGIN + len(heading) * _line(_TITLE) + (_GAP // 2 if heading else 0)
    first = top + (_line(_SMALL) if headers else 0)
    heights = [side + _PADDING + max(len(texts[index]) for index in row) * _line(_TEXT) + _GAP for row in rows]
    bottom = first + sum(heights)
    page = Image.new("RGB", (page_width, bottom + len(ending) * _line(_SMALL) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(page)

    _write(draw, heading, _MARGIN, _MARGIN, _TITLE, _INK)
    _write(draw, ending, _MARGIN, bottom, _SMALL, _PALE)
    for column in range(columns):
        for stage, header in enumerate(headers):
            left = _MARGIN + column * (width + _GAP) + stage * (side + _PADDING)
            _write(draw, [header], left, top, _SMALL, _PALE)
    for row, upper in zip(rows, accumulate(heights, initial=first), strict=False):
        for column, index in enumerate(row):
            left = _MARGIN + column * (width + _GAP)
            for stage, images in enumerate(stages):
                corner = (left + stage * (side + _PADDING), upper)
                page.paste(tensor_to_image(images[index]).resize((side, side), Image.Resampling.NEAREST), corner)
                draw.rectangle((*corner, corner[0] + side - 1, corner[1] + side - 1), outline=_FRAME)
            _write(draw, texts[index], left, upper + side + _PADDING, _TEXT, _INK)
    return page


def tensor_to_image(image: Tensor) -> Image.Image:
    """Turn a image (3, H, W) in [-1, 1] into a Pillow image; NaN is grey."""
    pixels = image.detach().float().nan_to_num().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def attention_images(image: Tensor, attention: Tensor) -> Tensor:
    """Show where each word looks: the image, dark where the word does not attend.

    Args:
        image: (3, R, R) in [-1, 1].
        attention: (r, r, T), what each pixel of the stage before takes of each word.

    Returns:
        (T, 3, R, R) in [-1, 1].
    """
    light = attention.permute(2, 0, 1)[:, None]
    light = light / light.amax((2, 3), keepdim=True).clamp(min=1e-12)
    light = F.interpolate(light, image.shape[-2:], mode="bilinear", align_corners=False)
    return (image + 1) * (0.15 + 0.85 * light) - 1


def matrix_image(matrix: Tensor) -> Tensor:
    """Color a matrix of similarities: red towards 1, white at 0, blue towards -1.

    Args:
        matrix: (N, N) in [-1, 1].

    Returns:
        A image (3, N, N) in [-1, 1].
    """
    strength = matrix.clamp(-1, 1)[None]
    ends = torch.tensor([[0.70, 0.09, 0.17], [0.13, 0.40, 0.67]]).view(2, 3, 1, 1)
    return 1 - 2 * strength.abs() * (1 - torch.where(strength >= 0, ends[0], ends[1]))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _line(size: int) -> int:
    return round(1.3 * size)


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int, size: int, color: str) -> None:
    for place, line in enumerate(lines):
        draw.text((left, top + place * _line(size)), line, fill=color, font=_font(size))


def _wrap(text: str, size: int, width: int) -> list[str]:
    """Break ``text`` into lines no wider than ``width`` pixels; more than `_MOST_LINES` end in an ellipsis.

    Accents are dropped: Pillow's built-in font has the plain letters only.
    """
    font = _font(size)
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    lines = [""]
    for word in plain.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        lines += [""] if lines[-1] else []
        for letter in word:  # a word wider than the line is broken
            if font.getlength(lines[-1] + letter) > width and lines[-1]:
                lines.append("")
            lines[-1] += letter
    if len(lines) > _MOST_LINES:
        last = lines[_MOST_LINES - 1]
        while font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: _MOST_LINES - 1], last.rstrip() + "..."]
    return lines if lines[0] else []

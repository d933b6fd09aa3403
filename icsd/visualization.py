"""Images to look at: grids of every stage with captions underneath, and animations."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from icsd.errors import InputError

_PAPER, _FRAME, _INK, _PALE = "#f7f7f5", "#d8d8d4", "#222222", "#77776f"
_MARGIN, _GAP, _PADDING = 24, 20, 4
_TEXT, _SMALL, _TITLE = 14, 12, 20
_MOST_LINES = 6


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
    """Draw samples as a grid: each has its stages from left to right, and its caption underneath.

    Args:
        stages: One tensor (B, 3, r, r) in [-1, 1] per stage, of any resolution r.
        captions: B sentences.
        headers: A heading per stage; its resolution by default, and none for one stage.
        title: Line on top.
        footer: Line at the bottom, such as the credit that the images ask for.
        columns: Samples in a row; by default the page becomes a little wider than high.
        side: Smallest width of a drawn image in pixels; every stage is enlarged to the same size by repeating pixels.

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
    """Turn an image (3, H, W) in [-1, 1] into a Pillow image; NaN becomes gray."""
    pixels = image.detach().float().nan_to_num().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def stack_pages(pages: Sequence[Image.Image]) -> Image.Image:
    """Put pages below each other."""
    stacked = Image.new("RGB", (max(page.width for page in pages), sum(page.height for page in pages)), _PAPER)
    for page, top in zip(pages, accumulate((page.height for page in pages), initial=0), strict=False):
        stacked.paste(page, (0, top))
    return stacked


def check_animation(path: Path) -> None:
    """Check that an animation can be written.

    Args:
        path: `.gif`, or `.mp4`, which needs the package of the extra `video`.

    Raises:
        InputError: The path has another suffix, or the package is missing.
    """
    suffix = path.suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise InputError(f"output is {path}: give a .gif or .mp4 file")
    if suffix == ".mp4" and find_spec("av") is None:
        raise InputError('av is not installed; for MP4: pip install -e ".[video]" in the checkout')


def save_animation(frames: Sequence[Image.Image], path: Path, fps: float) -> None:
    """Write an animation that repeats without end (GIF) or a video (MP4).

    Args:
        frames: Images of one size.
        path: `.gif` or `.mp4`.
        fps: Frames per second.

    Raises:
        InputError: See `check_animation`.
        OSError: The file cannot be written.
    """
    check_animation(path)
    if path.suffix.lower() == ".gif":
        duration = round(1000 / fps)  # of a frame, in milliseconds
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)
        return
    import av

    width, height = (side + side % 2 for side in frames[0].size)  # H.264 stores colors for 2 x 2 pixels
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            page = Image.new("RGB", (width, height), _PAPER)
            page.paste(frame)
            container.mux(stream.encode(av.VideoFrame.from_image(page)))
        container.mux(stream.encode())


@cache
def _font(size: int, plain: bool) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font for plain letters, and one of more alphabets for all others."""
    if plain:
        return ImageFont.load_default(size)
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 0.9 * size)


def _line(size: int) -> int:
    return round(1.3 * size)


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], left: int, top: int, size: int, color: str) -> None:
    for place, line in enumerate(lines):
        draw.text((left, top + place * _line(size)), line, fill=color, font=_font(size, line.isascii()))


def _wrap(text: str, size: int, width: int) -> list[str]:
    """Break ``text`` into lines no wider than ``width`` pixels; more than `_MOST_LINES` end in an ellipsis."""
    text = unicodedata.normalize("NFC", text.encode(errors="replace").decode())  # without lone surrogates
    font = _font(size, text.isascii())
    lines = [""]
    for word in text.split():
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

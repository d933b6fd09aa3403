"""Images by the thousand: a folder of PNG files and the captions they were generated from.

`captions.jsonl` holds a line for each image, `{"file": ..., "caption": ..., "seed": ...}`, which `icsd train
--data.name folder` and scoring tools read. It is written last: a folder without it is not complete.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from icsd.errors import InputError
from icsd.sampling.sampler import Sampler
from icsd.visualization import tensor_to_image

_PLAN = "plan.json"


def generate_folder(
    sampler: Sampler,
    captions: Sequence[str],
    folder: Path,
    *,
    number: int,
    seed: int = 0,
    batch_size: int = 16,
    truncation: float | None = None,
) -> int:
    """Generate `number` images into a folder, going round the captions; go on where an earlier call was stopped.

    Image k shows caption k modulo their number and has the seed `seed + k`. Each file is complete or absent at every
    moment, and batches are the same after a stop: a resumed folder holds the very bytes of an uninterrupted one.

    Args:
        sampler: The model.
        captions: Sentences.
        folder: New folder, or one that an earlier call with the same arguments began.
        number: Images to generate.
        seed: Seed of the first image.
        batch_size: Images generated at once.
        truncation: See `Sampler.noise`.

    Returns:
        How many images this call generated.

    Raises:
        InputError: No caption, a number or batch size below 1, a seed or truncation that cannot be used, or a folder
            that holds something else.
    """
    captions = [caption for caption in captions if caption.strip()]
    if not captions:
        raise InputError("no caption to generate: give sentences, or a file with one a line")
    for name, value in (("number", number), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}: give at least 1")
    plan = {
        "checkpoint": str(sampler.path.resolve()),
        "captions": list(captions),
        "number": number,
        "seed": seed,
        "batch_size": batch_size,
        "truncation": truncation,
    }
    _begin(folder, plan)
    files = [folder / f"{place:0{len(str(number - 1))}d}.png" for place in range(number)]
    generated = 0
    progress = tqdm(total=number, unit="image", mininterval=0.5 if sys.stderr.isatty() else 30)
    with progress:
        for start in range(0, number, batch_size):
            places = range(start, min(start + batch_size, number))
            missing = [place for place in places if not files[place].exists()]
            if missing:
                sentences = [captions[place % len(captions)] for place in places]
                noise = sampler.noise([seed + place for place in places], truncation)
                images = sampler.generate(sentences, noise).images[-1]
                for place in missing:
                    _save(tensor_to_image(images[place - start]), files[place])
                generated += len(missing)
            progress.update(len(places))
    lines = (
        json.dumps({"file": file.name, "caption": captions[place % len(captions)], "seed": seed + place})
        for place, file in enumerate(files)
    )
    if sampler.attribution:
        (folder / "ATTRIBUTION").write_text(f"{sampler.attribution}\n", encoding="utf-8")
    (folder / "captions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return generated


def _begin(folder: Path, plan: dict) -> None:
    """Make the folder, or check that it is of the same plan."""
    path = folder / _PLAN
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in plan if found.get(key) != plan[key]]
        if differing:
            raise InputError(
                f"{folder} was begun with another {', '.join(differing)}: give the same again, or another folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and was not begun by this command: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plan), encoding="utf-8")


def _save(image: Image.Image, file: Path) -> None:
    temporary = file.with_suffix(".part")
    image.save(temporary, "PNG")
    os.replace(temporary, file)

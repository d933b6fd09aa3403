"""Large numbers of images: a folder of PNG files and the captions they were generated from.

`captions.jsonl` holds a line for each image, `{"file": ..., "caption": ..., "seed": ...}`, which `icsd train
--data.name folder` and scoring tools read. It is written last: a folder without it is not complete.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from icsd.errors import InputError
from icsd.outputs import replacing
from icsd.sampling.plan import Plan
from icsd.sampling.sampler import Sampler
from icsd.team import Team
from icsd.visualization import tensor_to_image

LARGEST_BATCH = 1024  # images generated at once

_PLAN = "plan.json"


def generate_folder(
    sampler: Sampler,
    plan: Plan,
    folder: Path,
    *,
    batch_size: int = 16,
    truncation: float | None = None,
    team: Team | None = None,
) -> int:
    """Generate the images of a plan into a folder, or continue where an earlier call was stopped.

    Each file is complete or absent at every moment, and batches are the same after a stop: a resumed folder holds
    exactly the bytes of an uninterrupted one.

    Args:
        sampler: The model.
        plan: The images to generate.
        folder: New folder, or one that an earlier call with the same arguments began.
        batch_size: Images generated at once.
        truncation: See `Sampler.noise`.
        team: The ranks that share the batches; all of them make this call.

    Returns:
        The number of images that this call generated, on this rank.

    Raises:
        InputError: A sentence cannot be read, a number is out of range, or the folder holds something else.
        OSError: A file cannot be written.
    """
    if not 1 <= batch_size <= LARGEST_BATCH:
        raise InputError(f"batch_size is {batch_size}: give a number from 1 to {LARGEST_BATCH}")
    sampler.check(plan.sentences)
    sampler.noise([plan[0].seed, plan[len(plan) - 1].seed], truncation)  # raises before anything is written
    team = team or Team()
    team.first(lambda: _begin(folder, _description(sampler, plan, batch_size, truncation)))
    try:
        generated = team.each(lambda: _generate(sampler, plan, folder, batch_size, truncation, team))
        team.first(lambda: _finish(sampler, plan, folder))
    except OSError as error:
        advice = f"{error.strerror or error}; the same command continues where it was"
        raise OSError(error.errno, advice, error.filename or str(folder)) from error
    return generated


def _generate(sampler: Sampler, plan: Plan, folder: Path, batch_size: int, truncation: float | None, team: Team) -> int:
    """Generate the files that are missing in the batches of this rank; return their number."""
    generated = 0
    starts = range(0, len(plan), batch_size)[team.rank :: team.size]
    total = sum(min(batch_size, len(plan) - start) for start in starts)
    interval = 0.5 if sys.stderr.isatty() else 30
    with tqdm(total=total, unit="image", mininterval=interval, disable=not team.leads) as progress:
        for start in starts:
            places = range(start, min(start + batch_size, len(plan)))
            missing = [place for place in places if not (folder / _file_name(plan, place)).exists()]
            if missing:
                requests = [plan[place] for place in places]
                noise = sampler.noise([request.seed for request in requests], truncation)
                images = sampler.generate([request.sentence for request in requests], noise).images[-1]
                for place in missing:
                    with replacing(folder / _file_name(plan, place)) as temporary:
                        tensor_to_image(images[place - start]).save(temporary)
                generated += len(missing)
            progress.update(len(places))
    return generated


def _finish(sampler: Sampler, plan: Plan, folder: Path) -> None:
    """Write the captions of all images, which mark the folder as complete."""
    if sampler.attribution:
        _write(folder / "ATTRIBUTION", f"{sampler.attribution}\n")
    with replacing(folder / "captions.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(_caption_line(plan, place) for place in range(len(plan)))


def _file_name(plan: Plan, place: int) -> str:
    return f"{place:0{len(str(len(plan) - 1))}d}.png"


def _caption_line(plan: Plan, place: int) -> str:
    sentence, seed = plan[place]
    return json.dumps({"file": _file_name(plan, place), "caption": sentence, "seed": seed}) + "\n"


def _description(sampler: Sampler, plan: Plan, batch_size: int, truncation: float | None) -> dict[str, Any]:
    """Return everything that the images depend on, as JSON values."""
    digest = hashlib.sha256()
    with sampler.path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {
        "checkpoint": str(sampler.path.resolve()),
        "checkpoint_sha256": digest.hexdigest(),
        **asdict(plan),
        "sentences": list(plan.sentences),
        "batch_size": batch_size,
        "truncation": truncation,
        "device": sampler.device.type,
    }


def _begin(folder: Path, description: dict[str, Any]) -> None:
    """Make the folder, or check that it was begun with the same description."""
    path = folder / _PLAN
    if path.is_file():
        found = {"device": description["device"], **_read_plan(path)}  # plans of earlier versions have none
        differing = [key for key in description if found.get(key) != description[key]]
        if differing:
            names = ", ".join(differing)
            raise InputError(f"{folder} was begun with another {names}: give the same again, or another folder")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and was not begun by this command: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, json.dumps(description))


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InputError(f"{path} is damaged: give a new folder")
    return found


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

"""Features of real and of generated images, kept in files so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icsd.errors import InputError
from icsd.evaluation.cache import keep, kept
from icsd.evaluation.progress import progress
from icsd.team import Team

BATCH = 64

Probe = Callable[[Tensor], dict[str, Tensor]]
"""Maps uint8 images `(B, 3, r, r)` to features by name, one row for each image."""

Generate = Callable[[list[str], list[int]], list[Tensor]]
"""Maps B captions and B seeds to one batch `(B, 3, r, r)` in [-1, 1] for every stage, coarse to fine."""


@dataclass(frozen=True)
class Plan:
    """The images that an evaluation generates: image k has the seed `seed + k` and caption k, modulo their number.

    Attributes:
        captions: The captions.
        count: Number of images.
        seed: Seed of the first image.
    """

    captions: list[str]
    count: int
    seed: int

    def __post_init__(self) -> None:
        if not self.captions:
            raise InputError("there is no caption to evaluate: the test split is empty")
        if self.count < 2:
            raise InputError(f"--count is {self.count}: give at least 2 images to evaluate")

    def batches(self) -> Iterator[range]:
        """Yield the numbers of the images of each batch."""
        return (range(start, min(start + BATCH, self.count)) for start in range(0, self.count, BATCH))

    def caption_of(self, image: int) -> int:
        """Return the number of the caption of an image."""
        return image % len(self.captions)


def generated_features(
    generate: Generate,
    plan: Plan,
    resolutions: Sequence[int],
    probes: dict[str, Probe],
    folder: Path | None,
    team: Team | None = None,
) -> dict[int, dict[str, Tensor]] | None:
    """Generate the images of a plan and return what the probes find in them.

    Every batch becomes a file in `folder`; a batch whose file is complete is not generated again.

    Args:
        generate: The model.
        plan: Captions, seeds and number of images.
        resolutions: Resolution of each stage that `generate` returns.
        probes: Probes by name.
        folder: Folder of the files, which belong to one model, one plan and one set of probes; None keeps none.
        team: The ranks that share the batches. Each takes every W-th one.

    Returns:
        Features `(count, ...)` by `probe/layer`, for each resolution, on the first rank; None on the others.

    Raises:
        InputError: An image is not finite.
    """
    team = team or Team()

    def features_of(images: range) -> dict[str, Tensor]:
        if folder is None:
            return _probe_batch(generate, plan, images, resolutions, probes)
        path = folder / f"images-{images.start:08d}.safetensors"
        found = kept(path)
        return keep(path, _probe_batch(generate, plan, images, resolutions, probes)) if found is None else found

    own = progress(list(plan.batches())[team.rank :: team.size], "generated images", "batch", shown=team.leads)
    batches = team.collect(team.each(lambda: [features_of(images) for images in own]))
    if batches is None:
        return None
    found = {resolution: {} for resolution in resolutions}
    for name, rows in joined(batches).items():
        resolution, _, feature = name.partition("/")
        found[int(resolution)][feature] = rows
    return found


def _probe_batch(
    generate: Generate, plan: Plan, images: range, resolutions: Sequence[int], probes: dict[str, Probe]
) -> dict[str, Tensor]:
    captions = [plan.captions[plan.caption_of(image)] for image in images]
    stages = generate(captions, [plan.seed + image for image in images])
    found = {}
    for resolution, stage in zip(resolutions, stages, strict=True):
        if not stage.isfinite().all():
            raise InputError(
                f"the model generates images that are not finite at {resolution} px: use an earlier checkpoint"
            )
        if stage.shape[1:] != (3, resolution, resolution):
            raise InputError(
                f"the model generates images of shape {tuple(stage.shape[1:])} at the stage of {resolution} px: "
                "evaluate a checkpoint of one run with the stages of that run"
            )
        pixels = to_uint8(stage)
        for name, probe in probes.items():
            found |= {f"{resolution}/{name}/{layer}": rows.contiguous() for layer, rows in probe(pixels).items()}
    return found


def real_features(images: Tensor, probe: Probe, path: Path) -> dict[str, Tensor]:
    """Return what an extractor finds in real images, from the file `path` if it is complete.

    Args:
        images: uint8 `(P, 3, r, r)`.
        probe: The extractor.
        path: File for these images and this extractor.
    """
    features = kept(path)
    if features is None:
        batches = progress(images.split(BATCH), "real images", "batch")
        features = keep(path, joined([probe(batch) for batch in batches]))
    return features


def joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the rows of batches by name, all in one tensor for each name."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def to_uint8(images: Tensor) -> Tensor:
    """Return images in [-1, 1] as uint8."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()

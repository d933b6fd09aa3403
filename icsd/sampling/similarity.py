"""Similarities of generated images at each stage: the matrices that the generator's distillation blocks compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icsd.models import (
    DiscriminatorConfig,
    GeneratorDistillationConfig,
    GeneratorOutput,
    build_discriminators,
    similarity_matrices,
)
from icsd.sampling.sampler import Sampler, stages_of
from icsd.training import checkpoint

DESCRIPTIONS = {
    "rgb": "the images",
    "hidden": "the generator's hidden maps",
    "discriminator": "the discriminators' features of the images",
}


class Similarities(NamedTuple):
    """The similarities of N generated images."""

    matrices: list[Tensor]
    """One `(N, N)` for each stage, coarse to fine: cosines of the images' features."""
    source: str
    """The features compared: rgb, hidden or discriminator."""


@torch.no_grad()
def similarities(sampler: Sampler, outputs: Sequence[GeneratorOutput]) -> Similarities:
    """Compare generated images by the features that the distillation of this model's training compared.

    The networks use their running statistics, so that a similarity depends on its two images only.

    Args:
        sampler: The model.
        outputs: The generator's outputs, a batch of one each.

    Returns:
        The similarities at each stage, and what was compared.
    """
    with checkpoint.restoring(sampler.path):
        source = GeneratorDistillationConfig(**sampler.config["distillation"]["generator"]).source
        if source not in DESCRIPTIONS:
            raise ValueError(f"distillation.generator.source is {source}")
    if source == "hidden":
        features = [torch.cat(stage).cpu() for stage in zip(*(output.hidden for output in outputs), strict=True)]
    else:
        features = stages_of(outputs)
    if source == "discriminator":
        features = _discriminator_features(sampler, features)
    return Similarities(similarity_matrices(features), source)


def _discriminator_features(sampler: Sampler, stages: Sequence[Tensor]) -> list[Tensor]:
    """Return what each stage's discriminator extracts from its images, on the CPU."""
    resolutions, dim = sampler.model.generator.resolutions, sampler.model.text_encoder.dim
    state = checkpoint.load(sampler.path, ["discriminators"])["discriminators"]
    with checkpoint.restoring(sampler.path):
        config = DiscriminatorConfig(**sampler.config["discriminator"])
        discriminators = build_discriminators(config, resolutions, dim).eval()
        checkpoint.load_module(discriminators, state, "discriminators")
    return [discriminator.features(images) for discriminator, images in zip(discriminators, stages, strict=True)]

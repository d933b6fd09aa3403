"""Sentences to images, from a checkpoint alone: neither the data set nor a GPU is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from icsd.errors import InputError
from icsd.models import GeneratorConfig, GeneratorOutput, TextConfig, TextToImage, restore_text_encoder
from icsd.training import checkpoint
from icsd.training.trainer import choose_device


class Noise(NamedTuple):
    """What an image depends on beside its sentence, standard normal, for B images."""

    z: Tensor
    """`(B, noise_dim)`."""
    condition: Tensor
    """`(B, condition_dim)`: where in the sentence's neighborhood its condition lies."""


@dataclass(frozen=True)
class Sampler:
    """A trained model, ready to generate."""

    model: TextToImage
    """The averaged model."""
    attribution: str | None
    """Line that the art it was trained on asks for."""
    path: Path
    """The checkpoint it was read from."""

    @classmethod
    def load(cls, path: Path | str, device: str = "cpu") -> Sampler:
        """Read a checkpoint.

        Args:
            path: Checkpoint, or run folder for its newest one.
            device: Where to generate: cpu, cuda, ... or auto.

        Returns:
            The sampler.

        Raises:
            InputError: There is no checkpoint, it cannot be used (see `icsd.training.checkpoint.load`), or there is no
                such device.
        """
        path = checkpoint.find(path, checkpoint.MODEL)
        state = checkpoint.load(path, ["config", "attribution", "text", "ema"])
        text_encoder = restore_text_encoder(TextConfig(**state["config"]["text"]), state["text"])
        model = TextToImage(text_encoder, GeneratorConfig(**state["config"]["generator"]))
        model.load_state_dict(state["ema"])
        return cls(model.eval().to(choose_device(device)), state["attribution"], path)

    @property
    def device(self) -> torch.device:
        """Where it generates."""
        return next(self.model.generator.parameters()).device

    def unknown(self, sentence: str) -> list[str]:
        """Words of a sentence that the model never saw in training and will not read."""
        return self.model.text_encoder.unknown(sentence)

    def noise(self, seeds: Sequence[int], truncation: float | None = None) -> Noise:
        """Draw the noise of each seed, the same on every machine and device.

        Args:
            seeds: One for each image.
            truncation: Values beyond this are drawn again: less variety, fewer failures. None keeps all.

        Returns:
            The noise, on the CPU.

        Raises:
            InputError: A negative seed, or a truncation that is not positive.
        """
        bad = next((seed for seed in seeds if not 0 <= seed < 2**63), None)
        if bad is not None:
            raise InputError(f"seed is {bad}: give a number from 0 to 2**63 - 1")
        if truncation is not None and not 0 < truncation < math.inf:
            raise InputError(f"truncation is {truncation}: give a positive number, such as 1.0")
        generator = self.model.generator
        widths = (generator.noise_dim, generator.condition_dim)
        rows = [_normal(sum(widths), torch.Generator().manual_seed(seed), truncation) for seed in seeds]
        return Noise(*torch.stack(rows).split(widths, dim=1))

    @torch.no_grad()
    def generate(self, sentences: Sequence[str], noise: Noise) -> GeneratorOutput:
        """Generate a batch: one image of each sentence.

        Args:
            sentences: B sentences.
            noise: Of B images.

        Returns:
            What the generator gives, on the sampler's device.
        """
        text = self.model.text_encoder(list(sentences))
        return self.model.generator(noise.z.to(self.device), text, noise.condition.to(self.device))

    def sample(
        self, sentences: Sequence[str], seed: int = 0, count: int = 1, truncation: float | None = None
    ) -> list[GeneratorOutput]:
        """Generate each sentence ``count`` times.

        Every image is generated alone: a sentence and a seed give the same image, whatever else is asked for.

        Args:
            sentences: Sentences.
            seed: Seed of each sentence's first image; the following ones take the seeds after it.
            count: Images of each sentence.
            truncation: See `noise`.

        Returns:
            What the generator gives for each image, a batch of one; the images of a sentence in a row.

        Raises:
            InputError: No sentence, an empty one, a negative seed, a count below 1, or a truncation that is not
                positive.
        """
        if not sentences or not all(sentence.strip() for sentence in sentences):
            raise InputError('no sentence to generate: give one or more, as in "a woman with dark skin, firefighter"')
        if count < 1:
            raise InputError(f"count is {count}: give at least 1")
        noises = [self.noise([each], truncation) for each in range(seed, seed + count)]
        return [self.generate([sentence], noise) for sentence in sentences for noise in noises]


def stages_of(images: Sequence[GeneratorOutput]) -> list[Tensor]:
    """The images of every stage together: one `(B, 3, r, r)` in [-1, 1] each, coarse to fine, on the CPU."""
    return [torch.cat(stage).cpu() for stage in zip(*(image.images for image in images), strict=True)]


def _normal(width: int, generator: torch.Generator, truncation: float | None) -> Tensor:
    values = torch.randn(width, generator=generator)
    while truncation is not None and (beyond := values.abs() > truncation).any():
        values[beyond] = torch.randn(int(beyond.sum()), generator=generator)
    return values

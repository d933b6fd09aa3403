"""A trained model that generates images from sentences; it needs neither the data set nor a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icsd.errors import InputError
from icsd.models import GeneratorConfig, GeneratorOutput, TextConfig, TextFeatures, TextToImage, restore_text_encoder
from icsd.models.noise import Noise, draw_noise
from icsd.sampling.plan import Plan, Request
from icsd.training import checkpoint
from icsd.training.trainer import choose_device

SEEDS = 2**63
SMALLEST_TRUNCATION = 0.01  # below it, drawing again until all values fit takes too long


@dataclass(frozen=True)
class Sampler:
    """A trained model that generates images."""

    model: TextToImage
    """The averaged model."""
    attribution: str | None
    """The line of credit that the training images ask for."""
    path: Path
    """The checkpoint that the model was read from."""
    config: dict[str, Any]
    """The configuration of the training run."""

    @classmethod
    def load(cls, path: Path | str, device: str = "cpu") -> Sampler:
        """Read a checkpoint.

        Args:
            path: Checkpoint, or run folder for its newest one.
            device: Device that generates: cpu, cuda, ... or auto.

        Returns:
            The sampler.

        Raises:
            InputError: There is no checkpoint of `icsd train`, it cannot be read, or the device is not available.
        """
        device = choose_device(device)
        path = checkpoint.find(path, checkpoint.MODEL)
        state = checkpoint.load(path, ["config", "attribution", "text", "ema"])
        config, attribution = state["config"], state["attribution"]
        with checkpoint.restoring(path):
            text_encoder = restore_text_encoder(TextConfig(**config["text"]), state["text"])
            model = TextToImage(text_encoder, GeneratorConfig(**config["generator"]))
            checkpoint.load_module(model, state["ema"], "ema")
            if not isinstance(attribution, str | None):
                raise TypeError(f"attribution is {attribution!r}")
        return cls(model.eval().to(device), attribution, path, config)

    @property
    def device(self) -> torch.device:
        """The device that generates."""
        return next(self.model.generator.parameters()).device

    def unknown(self, sentence: str) -> list[str]:
        """Return the words of a sentence that the model does not know and leaves out."""
        return self.model.text_encoder.tokenizer.unknown(sentence)

    def beyond(self, sentence: str) -> list[str]:
        """Return the known words of a sentence that the model leaves out because the sentence is too long."""
        return self.model.text_encoder.tokenizer.beyond(sentence)

    def words(self, sentence: str) -> list[str]:
        """Return the words of a sentence that the model reads, one for each of its word features."""
        return self.model.text_encoder.tokenizer.read(sentence)

    def check(self, sentences: Iterable[str]) -> None:
        """Check that the model can read sentences.

        Raises:
            InputError: A sentence has no word that the model knows, or is not valid Unicode.
        """
        for sentence in dict.fromkeys(sentences):
            if not sentence.isascii() and sentence.encode(errors="replace").decode() != sentence:
                raise InputError(f"sentence {sentence!r} is not valid Unicode: give UTF-8 text")
            if not self.model.text_encoder.tokenizer.reads(sentence):
                raise InputError(
                    f"sentence {sentence!r} has no word that this model knows: use words of its training captions"
                )

    @torch.no_grad()
    def encode(self, sentences: Sequence[str]) -> TextFeatures:
        """Encode B sentences.

        Returns:
            Their features, on the sampler's device.

        Raises:
            InputError: A sentence has no word that the model knows.
        """
        self.check(sentences)
        return self.model.text_encoder.encode(sentences)

    def noise(self, seeds: Sequence[int], truncation: float | None = None) -> Noise:
        """Draw the noise of each seed, the same on every machine and device.

        Args:
            seeds: One seed for each image.
            truncation: Values beyond this are drawn again, for fewer failures and less variety. None keeps all values.

        Returns:
            The noise, on the CPU.

        Raises:
            InputError: A seed or the truncation is out of range.
        """
        bad = next((seed for seed in seeds if not 0 <= seed < SEEDS), None)
        if bad is not None:
            raise InputError(f"seed is {bad}: give a number from 0 to 2**63 - 1")
        if truncation is not None and not SMALLEST_TRUNCATION <= truncation < math.inf:
            raise InputError(f"truncation is {truncation}: give {SMALLEST_TRUNCATION} or more, such as 1.0")
        return draw_noise(self.model.generator, seeds, truncation)

    @torch.no_grad()
    def generate(self, sentences: Sequence[str], noise: Noise) -> GeneratorOutput:
        """Generate a batch, one image of each sentence.

        Args:
            sentences: B sentences.
            noise: The noise of B images.

        Returns:
            The output of the generator, on the sampler's device.

        Raises:
            InputError: A sentence has no word that the model knows.
        """
        text = self.encode(sentences)
        return self.model.generator(noise.z.to(self.device), text, noise.condition.to(self.device))

    def sample(
        self, sentences: Sequence[str], seed: int = 0, per_sentence: int = 1, truncation: float | None = None
    ) -> list[GeneratorOutput]:
        """Generate each sentence ``per_sentence`` times; see `sample_each`.

        Args:
            sentences: Sentences.
            seed: Seed of the first image of each sentence; its next images take the seeds after it.
            per_sentence: Images of each sentence.
            truncation: See `noise`.

        Returns:
            The output of the generator for each image, a batch of one; the images of a sentence follow each other.

        Raises:
            InputError: There is no sentence, one of them cannot be read, or a number is out of range.
        """
        return self.sample_each(Plan(sentences, seed, per_sentence), truncation)

    def sample_each(self, requests: Iterable[Request], truncation: float | None = None) -> list[GeneratorOutput]:
        """Generate every image alone: a sentence and a seed give the same image, whatever else is asked for.

        Args:
            requests: Sentences with seeds, such as a `Plan`.
            truncation: See `noise`.

        Returns:
            The output of the generator for each image, a batch of one.

        Raises:
            InputError: A sentence cannot be read, or a number is out of range.
        """
        requests = list(requests)
        self.check(request.sentence for request in requests)
        noises = [self.noise([request.seed], truncation) for request in requests]
        return [self.generate([request.sentence], noise) for request, noise in zip(requests, noises, strict=True)]


def stages_of(outputs: Sequence[GeneratorOutput]) -> list[Tensor]:
    """Join the images of several outputs: one `(B, 3, r, r)` in [-1, 1] for each stage, coarse to fine, on the CPU."""
    return [torch.cat(stage).cpu() for stage in zip(*(output.images for output in outputs), strict=True)]

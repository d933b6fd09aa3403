"""Sentences to pictures, from a checkpoint alone: neither the data set nor a GPU is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icsd.errors import InputError
from icsd.models import GeneratorConfig, TextConfig, TextToImage, restore_text_encoder
from icsd.training import checkpoint


@dataclass(frozen=True)
class Painter:
    """A trained model, ready to paint."""

    model: TextToImage
    """The averaged model, on the CPU."""
    attribution: str | None
    """Line that the art it was trained on asks for."""

    @classmethod
    def load(cls, path: Path | str) -> Painter:
        """Read a checkpoint.

        Args:
            path: Checkpoint, or run folder for its newest one.

        Returns:
            The painter.

        Raises:
            InputError: There is no checkpoint, or it cannot be used; see `icsd.training.checkpoint.load`.
        """
        path = Path(path)
        path = checkpoint.latest(path) if path.is_dir() else path
        state = checkpoint.load(path, ["config", "attribution", "text", "ema"])
        text_encoder = restore_text_encoder(TextConfig(**state["config"]["text"]), state["text"])
        model = TextToImage(text_encoder, GeneratorConfig(**state["config"]["generator"]))
        model.load_state_dict(state["ema"])
        return cls(model.eval(), state["attribution"])

    def unknown(self, sentence: str) -> list[str]:
        """Words of a sentence that the model never saw in training and will not read."""
        return self.model.text_encoder.unknown(sentence)

    def paint(self, sentences: Sequence[str], seed: int = 0, count: int = 1) -> list[Tensor]:
        """Paint each sentence ``count`` times.

        Every picture is painted alone: a sentence and a seed give the same picture, whatever else is asked for.

        Args:
            sentences: B sentences.
            seed: Seed of each sentence's first picture; the following ones take the seeds after it.
            count: Pictures of each sentence.

        Returns:
            One ``(B * count, 3, r, r)`` in [-1, 1] per stage, coarse to fine; the pictures of a sentence in a row.

        Raises:
            InputError: No sentence, an empty one, a negative seed, or a count below 1.
        """
        if not sentences or not all(sentence.strip() for sentence in sentences):
            raise InputError('no sentence to paint: give one or more, as in "a woman with dark skin, firefighter"')
        if not 0 <= seed <= 2**63 - count:
            raise InputError(f"seed is {seed}: give a number from 0 to 2**63 - count")
        if count < 1:
            raise InputError(f"count is {count}: give at least 1")
        painted = [self.model.paint([sentence], seed + place) for sentence in sentences for place in range(count)]
        return [torch.cat(stage) for stage in zip(*painted, strict=True)]

"""Interpolation from one image to another: through the noise, or from sentence to sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from icsd.errors import InputError
from icsd.models import GeneratorOutput, TextFeatures
from icsd.sampling.sampler import Noise, Sampler


@torch.no_grad()
def interpolate(
    sampler: Sampler, sentences: tuple[str, str], seeds: tuple[int, int], frames: int, truncation: float | None = None
) -> list[GeneratorOutput]:
    """Interpolate between two sentences and seeds; both ends are the images that `Sampler.sample` generates.

    Args:
        sampler: The model.
        sentences: First and last sentence; the same one twice interpolates the noise alone.
        seeds: First and last seed; the same one twice interpolates the sentences alone.
        frames: Number of images, both ends included.
        truncation: See `Sampler.noise`.

    Returns:
        The output of the generator for each frame, a batch of one.

    Raises:
        InputError: There are fewer than two frames, a sentence cannot be read, or a number is out of range.
    """
    if frames < 2:
        raise InputError(f"frames is {frames}: give at least 2, the first and the last image")
    noises = [sampler.noise([seed], truncation) for seed in seeds]
    texts = [sampler.encode([sentence]) for sentence in sentences]
    generated = []
    for step in torch.linspace(0, 1, frames).tolist():
        noise = Noise(*(_slerp(a, b, step).to(sampler.device) for a, b in zip(*noises, strict=True)))
        text = texts[round(step)] if step in (0, 1) else _mix(*texts, step)
        generated.append(sampler.model.generator(noise.z, text, noise.condition))
    return generated


def _slerp(a: Tensor, b: Tensor, step: float) -> Tensor:
    """Interpolate on the arc from `a` to `b`: a straight line would pass through norms that training never saw."""
    cosine = torch.nn.functional.cosine_similarity(a, b).clamp(-1, 1)
    angle = cosine.acos()[:, None]
    if angle.abs().max() < 1e-4:
        return torch.lerp(a, b, step)
    return (torch.sin((1 - step) * angle) * a + torch.sin(step * angle) * b) / torch.sin(angle)


def _mix(first: TextFeatures, second: TextFeatures, step: float) -> TextFeatures:
    """Interpolate between two sentences; where one is longer, its last words fade to or from zero."""
    longest = max(first.words.shape[2], second.words.shape[2])
    padded = [
        torch.nn.functional.pad(text.words.masked_fill(~text.mask[:, None], 0), (0, longest - text.words.shape[2]))
        for text in (first, second)
    ]
    words = torch.lerp(*padded, step)
    mask = torch.ones(1, longest, dtype=torch.bool, device=words.device)
    return TextFeatures(words, torch.lerp(first.sentence, second.sentence, step), mask)

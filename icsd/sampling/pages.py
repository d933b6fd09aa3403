"""Pages that show what a model generates: images, interpolations, attention to words, similarities of images."""

from __future__ import annotations

import textwrap

from PIL import Image
from torch import Tensor

from icsd.errors import InputError
from icsd.sampling.interpolation import interpolate
from icsd.sampling.plan import Plan, Request
from icsd.sampling.sampler import Sampler, stages_of
from icsd.visualization import caption_grid, stack_pages


def images_page(
    sampler: Sampler, plan: Plan, *, truncation: float | None = None, all_stages: bool = False
) -> Image.Image:
    """Draw the images of a plan with their sentences and seeds.

    Args:
        sampler: The model.
        plan: The images to generate.
        truncation: See `Sampler.noise`.
        all_stages: Draw the images of every stage side by side, not only those of the last one.

    Raises:
        InputError: A sentence cannot be read, or a number is out of range.
    """
    return caption_grid(
        _shown(stages_of(sampler.sample_each(plan, truncation)), all_stages),
        [str(request) for request in plan],
        columns=plan.per_sentence if (plan.per_sentence or 1) > 1 else None,
        side=160 if len(plan) <= 24 else 112,
        footer=sampler.attribution,
    )


def interpolation_page(
    sampler: Sampler,
    first: Request,
    last: Request,
    frames: int,
    *,
    truncation: float | None = None,
    all_stages: bool = False,
) -> Image.Image:
    """Draw an interpolation, at most eight images in a row; see `interpolate` and `images_page`."""
    stages = _interpolated(sampler, first, last, frames, truncation, all_stages)
    captions = [f"frame {frame}" for frame in range(1, frames + 1)]
    return caption_grid(stages, captions, title=_title(first, last), columns=min(frames, 8), footer=sampler.attribution)


def interpolation_frames(
    sampler: Sampler,
    first: Request,
    last: Request,
    frames: int,
    *,
    truncation: float | None = None,
    all_stages: bool = False,
) -> list[Image.Image]:
    """Draw an interpolation as the frames of an animation; see `interpolate` and `images_page`."""
    stages = _interpolated(sampler, first, last, frames, truncation, all_stages)
    return [
        caption_grid(
            [stage[index : index + 1] for stage in stages], [_title(first, last)], side=256, footer=sampler.attribution
        )
        for index in range(frames)
    ]


def attention_page(sampler: Sampler, plan: Plan, *, truncation: float | None = None) -> Image.Image:
    """Draw heat maps of the attention that the pixels of each image pay to each word, at every stage after the first.

    Args:
        sampler: The model.
        plan: The images to generate; their maps are drawn below each other.
        truncation: See `Sampler.noise`.

    Raises:
        InputError: The model has one stage only, a sentence cannot be read, or a number is out of range.
    """
    from icsd.heat_maps import draw_attention

    if len(sampler.model.generator.resolutions) == 1:
        raise InputError("this model has one stage only, which pays no attention to words: show the images instead")
    return stack_pages(
        [
            draw_attention(
                output.images[-1][0],
                [attention[0] for attention in output.attention],
                sampler.words(request.sentence),
                title=str(request),
                footer=sampler.attribution,
            )
            for request, output in zip(plan, sampler.sample_each(plan, truncation), strict=True)
        ]
    )


def similarity_page(sampler: Sampler, plan: Plan, *, truncation: float | None = None) -> Image.Image:
    """Draw how similar the images of a plan are to each other at each stage; see `icsd.sampling.similarity`.

    Args:
        sampler: The model.
        plan: The images to generate, at least two.
        truncation: See `Sampler.noise`.

    Raises:
        InputError: There is one image only, a sentence cannot be read, or a number is out of range.
    """
    from icsd.heat_maps import draw_similarities
    from icsd.sampling.similarity import DESCRIPTIONS, similarities

    if len(plan) < 2:
        raise InputError("similarities need at least two images: give more sentences, or more images of each")
    matrices, source = similarities(sampler, sampler.sample_each(plan, truncation))
    resolutions = sampler.model.generator.resolutions
    return draw_similarities(
        matrices,
        [f"{textwrap.shorten(sentence, 40, placeholder=' ...')} (seed {seed})" for sentence, seed in plan],
        [f"stage {stage}: {resolution} px" for stage, resolution in enumerate(resolutions, start=1)],
        title=f"Similarities of {DESCRIPTIONS[source]}, which distillation compares",
        footer=sampler.attribution,
    )


def _title(first: Request, last: Request) -> str:
    start = f'from "{first.sentence}", seed {first.seed}, to '
    return start + (f"seed {last.seed}" if first.sentence == last.sentence else f'"{last.sentence}", seed {last.seed}')


def _interpolated(
    sampler: Sampler, first: Request, last: Request, frames: int, truncation: float | None, all_stages: bool
) -> list[Tensor]:
    outputs = interpolate(
        sampler, (first.sentence, last.sentence), (first.seed, last.seed), frames, truncation=truncation
    )
    return _shown(stages_of(outputs), all_stages)


def _shown(stages: list[Tensor], all_stages: bool) -> list[Tensor]:
    return stages if all_stages else stages[-1:]

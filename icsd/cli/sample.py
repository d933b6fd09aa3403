"""``icsd sample``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from icsd.cli.parser import Parser, check_image_file
from icsd.errors import InputError

if TYPE_CHECKING:
    from icsd.sampling import Sampler

DESCRIPTION = """Generate sentences with a trained model and write one PNG with the sentences underneath; or, with
--folder, any number of images, a file each.

Examples:

  icsd sample "a woman with dark skin, firefighter"
      with the newest checkpoint below runs/

  icsd sample "a man with a beard and pale skin" "a lady with red hair" --count 4 --stages
      four images of each sentence, from seeds 0 to 3, all stages side by side

  icsd sample "a bald person" --checkpoint runs/emoji-busts --seed 7 --truncation 1 --out bald.png
      from the newest checkpoint of one run, without unusual noise

  icsd sample "a man with dark skin, cook" "a woman with light skin, cook" --interpolate sentences
      the way from one to the other; `--interpolate noise` goes from seed to seed

  icsd sample "a woman with dark skin, firefighter" --show attention
      where each word looks; `--show similarity` draws what the samples of all images are to each other

  head -100 captions.txt | icsd sample --file - --folder generated --count 30000
      30,000 images, going round the captions; the same command goes on after Ctrl-C

The same checkpoint, sentence and seed give the same image. Words that the model has never seen are named and
skipped."""


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = 'icsd sample "SENTENCE" ["SENTENCE" ...] [options]'
    parser.description = DESCRIPTION
    parser.add_argument("sentences", type=str, nargs="*", metavar="SENTENCE", help="what to generate")
    parser.add_argument("--file", type=str | None, metavar="FILE", help="more sentences, one a line; - reads the input")
    parser.add_argument("--checkpoint", type=Path | None, metavar="PATH", help="or run folder; the newest in runs/")
    parser.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, ... or auto")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image of each sentence")
    parser.add_argument(
        "--count",
        type=int,
        default=1,
        help="images of each sentence, from as many seeds; with --folder of all together",
    )
    parser.add_argument(
        "--truncation", type=float | None, metavar="T", help="draw noise beyond T again: less variety, fewer failures"
    )
    parser.add_argument("--stages", action="store_true", help="show the coarse stages beside the finest")
    parser.add_argument(
        "--interpolate",
        type=Literal["noise", "sentences"] | None,
        help="generate the way from the seed to the next one, or from the first sentence to the second",
    )
    parser.add_argument("--frames", type=int, default=8, help="images of an interpolation")
    parser.add_argument(
        "--show",
        type=Literal["images", "attention", "similarity"],
        default="images",
        help="images; where each word of the first sentence looks; or the similarities of all images at each stage",
    )
    parser.add_argument("--folder", type=Path | None, help="write into this folder, a PNG file each, and go on in it")
    parser.add_argument("--batch_size", type=int, default=16, help="images generated at once into a folder")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="image to write")


def run(options: Namespace) -> int:
    """Generate."""
    check_image_file(options.out)
    if options.interpolate and options.show != "images":
        raise InputError(f"interpolate and show={options.show} do not go together: leave one of them out")
    from icsd.sampling import Sampler
    from icsd.training import checkpoint

    sentences = [*options.sentences, *_lines(options.file)]
    sampler = Sampler.load(options.checkpoint or checkpoint.newest("runs").path, options.device)
    unknown = dict.fromkeys(word for sentence in sentences for word in sampler.unknown(sentence))
    if unknown:
        print(f"icsd: this model does not know and skips: {', '.join(unknown)}", file=sys.stderr)
    if options.folder:
        return _generate_folder(sampler, sentences, options)
    draw = {"images": _draw_images, "attention": _draw_attention, "similarity": _draw_similarity}[options.show]
    (_draw_interpolation if options.interpolate else draw)(sampler, sentences, options).save(options.out)
    print(options.out)
    return 0


def _lines(name: str | None) -> list[str]:
    """The sentences of a file, or of the standard input."""
    if name is None:
        return []
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"file is {name}, which is not UTF-8 text ({error.reason}): convert it") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _generate_folder(sampler: Sampler, sentences: list[str], options: Namespace) -> int:
    from icsd.sampling.folder import generate_folder

    try:
        generate_folder(
            sampler,
            sentences,
            options.folder,
            number=options.count,
            seed=options.seed,
            batch_size=options.batch_size,
            truncation=options.truncation,
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("stopped; the same command goes on where it was") from interrupt
    print(options.folder)
    return 0


def _generate(sampler: Sampler, sentences: list[str], options: Namespace):
    return sampler.sample(sentences, options.seed, options.count, options.truncation)


def _draw_images(sampler: Sampler, sentences: list[str], options: Namespace):
    from icsd.sampling.sampler import stages_of
    from icsd.visualization import caption_grid

    stages = stages_of(_generate(sampler, sentences, options))
    seeds = range(options.seed, options.seed + options.count)
    return caption_grid(
        stages if options.stages else stages[-1:],
        [f"{sentence} (seed {seed})" for sentence in sentences for seed in seeds],
        columns=options.count if options.count > 1 else None,
        footer=sampler.attribution,
    )


def _draw_interpolation(sampler: Sampler, sentences: list[str], options: Namespace):
    from icsd.sampling.interpolation import interpolate
    from icsd.sampling.sampler import stages_of
    from icsd.visualization import caption_grid

    wanted = 2 if options.interpolate == "sentences" else 1
    if len(sentences) != wanted:
        raise InputError(f"interpolate is {options.interpolate}: give {wanted} sentence(s), got {len(sentences)}")
    seeds = (options.seed, options.seed if wanted == 2 else options.seed + 1)
    frames = interpolate(sampler, (sentences[0], sentences[-1]), seeds, options.frames, options.truncation)
    stages = stages_of(frames)
    captions = [f"{sentences[0]} (seed {seeds[0]})", *[""] * (len(frames) - 2), f"{sentences[-1]} (seed {seeds[1]})"]
    columns = min(len(frames), 8)
    return caption_grid(
        stages if options.stages else stages[-1:], captions, columns=columns, footer=sampler.attribution
    )


def _draw_attention(sampler: Sampler, sentences: list[str], options: Namespace):
    from icsd.visualization import attention_images, caption_grid

    (generated,) = sampler.sample(sentences[:1], options.seed, 1, options.truncation)
    if not generated.attention:
        raise InputError("show is attention, but this model has one stage only, which attends to no words")
    finest = generated.images[-1][0].cpu()
    words = sampler.model.text_encoder.read(sentences[0])
    return caption_grid(
        [attention_images(finest, attention[0].cpu()) for attention in generated.attention],
        words,
        headers=[f"stage {stage}" for stage in range(2, len(generated.attention) + 2)],
        title=f"{sentences[0]} (seed {options.seed})",
        footer=sampler.attribution,
    )


def _draw_similarity(sampler: Sampler, sentences: list[str], options: Namespace):
    from icsd.models import similarity_matrices
    from icsd.sampling.sampler import stages_of
    from icsd.visualization import caption_grid, matrix_image

    stages = stages_of(_generate(sampler, sentences, options))
    return caption_grid(
        [matrix_image(matrix)[None] for matrix in similarity_matrices(stages)],
        [f"cosines of the {len(stages[0])} images: 1 red, 0 white, -1 blue"],
        headers=[f"{stage.shape[-1]} px" for stage in stages],
        side=256,
    )

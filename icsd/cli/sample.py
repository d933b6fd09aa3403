"""``icsd sample``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace
from PIL import Image

from icsd.cli.parser import Parser
from icsd.errors import InputError
from icsd.outputs import check_output, replacing

if TYPE_CHECKING:
    from icsd.sampling import Plan, Request, Sampler
    from icsd.team import Team

DESCRIPTION = """Generate images from sentences with a trained model: one page with the sentences underneath, an
animation, or a folder of any number of images.

Examples:

  icsd sample "a woman with dark skin, firefighter"
      writes sample.png, with the newest model below runs/

  icsd sample "a man with a beard and pale skin" "a lady with red hair" --per-sentence 4 --stages
      four images of each sentence, from seeds 0 to 3, all stages side by side

  icsd sample "a bald person" --checkpoint runs/emoji-busts --seed 7 --truncation 1 --output bald.png
      the newest checkpoint of one run, without unusual noise

  icsd sample "a man with dark skin, cook" "a woman with light skin, cook" --interpolate sentences
      from one sentence to the other; `--interpolate noise` goes from one seed to the next

  icsd sample "a bald person" --interpolate noise --output bald.gif
      an animation; .mp4 needs pip install -e ".[video]" in the checkout

  icsd sample "a woman with dark skin, firefighter" --show attention
      heat maps of the attention that each pixel pays to each word, at every stage after the first

  icsd sample "a cook" "a pilot" --count 8 --show similarity
      how similar the images are to each other at each stage: the matrices that distillation compares

  head -100 captions.txt | icsd sample --file - --output generated --count 30000
      a folder of 30,000 images, going round the sentences; the same command continues after Ctrl-C

  icsd sample --file captions.txt --output generated --device auto
      on a GPU, if there is one; the default is the CPU

  torchrun --standalone --nproc-per-node 8 --no-python icsd sample --file captions.txt --output generated --device cuda
      the same on eight GPUs, which share the images

The same checkpoint, sentence and seed give the same image. Words that the model does not know, and words past the
longest sentence that it reads, are reported and left out."""

IMAGES_ON_A_PAGE = 1000
LARGEST_FILE = 64 << 20

# The options that have an effect on each kind of output, beside those of all kinds.
_USED = {
    "a page of images": {"count", "per_sentence", "stages"},
    "--interpolate": {"interpolate", "frames", "stages"},
    "an animation": {"interpolate", "frames", "stages", "fps"},
    "--show attention": {"show", "count", "per_sentence"},
    "--show similarity": {"show", "count", "per_sentence"},
    "a folder": {"count", "per_sentence", "batch_size"},
}
_ANIMATIONS = (".gif", ".mp4")


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = 'icsd sample ["SENTENCE" ...] [--file FILE] [options]'
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("sentences", type=str, nargs="*", metavar="SENTENCE", help="description of an image")
    add(
        "--file",
        type=str | None,
        metavar="FILE",
        help="read sentences from a file, one a line; - for stdin; no SENTENCE is needed then",
    )
    add(
        "--checkpoint",
        type=Path | None,
        metavar="PATH",
        help="checkpoint, or run folder for its newest one; the newest model below runs/ by default",
    )
    add(
        "--output",
        type=Path,
        default=Path("sample.png"),
        metavar="PATH",
        help="image to write; a .gif or .mp4 of an interpolation; or, without a suffix, a folder of images",
    )
    add(
        "--device",
        type=str,
        default="cpu",
        metavar="DEVICE",
        help="device that generates: cpu, cuda, cuda:1, ... or auto, which takes a GPU where there is one",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the first image; the next images take the seeds after it",
    )
    add(
        "--per-sentence",
        type=int | None,
        metavar="N",
        help="images of each sentence, the same seeds for all sentences (default: 1)",
    )
    add("--count", type=int | None, metavar="N", help="images in all instead, going round the sentences, a seed each")
    add(
        "--truncation",
        type=float | None,
        metavar="T",
        help="draw noise beyond T again: fewer failures, less variety; 1 is a good start",
    )
    add("--stages", action="store_true", help="show the images of every stage, not only those of the last one")
    add(
        "--interpolate",
        type=Literal["noise", "sentences"] | None,
        metavar="{noise,sentences}",
        help="generate the images between a seed and the next one (noise), or between two sentences",
    )
    add("--frames", type=int | None, metavar="N", help="images of an interpolation (default: 8; in an animation 32)")
    add("--fps", type=float | None, metavar="RATE", help="frames per second of an animation (default: 8)")
    add(
        "--show",
        type=Literal["images", "attention", "similarity"],
        default="images",
        help="draw the images, their attention to each word, or their similarities at each stage",
    )
    add("--batch-size", type=int | None, metavar="N", help="images generated at once into a folder (default: 16)")


def run(options: Namespace) -> int:
    """Generate, a folder on all ranks together, anything else on the first one."""
    from icsd.team import joined

    kind = _kind_of_output(options)
    _check_options(options, kind)
    with joined() as team:
        sentences = team.first(lambda: [*options.sentences, *_lines(options.file)])
        plan = _plan(sentences, options, kind)
        if kind == "a folder" or team.leads:
            _generate(plan, options, kind, team)
    return 0


def _generate(plan: Plan, options: Namespace, kind: str, team: Team) -> None:
    sampler = load_sampler(options.checkpoint, options.device)
    if team.leads:
        _report_words(sampler, list(plan.sentences))
    if kind == "a folder":
        _write_folder(sampler, plan, options, team)
    elif kind == "an animation":
        _write_animation(sampler, plan, options)
    else:
        _write_page(sampler, plan, options, kind)
    print(options.output)


def load_sampler(place: Path | None, device: str = "cpu") -> Sampler:
    """Load the model that ``--checkpoint`` names, or else the newest one below runs/."""
    from icsd.sampling import Sampler
    from icsd.training import checkpoint

    if place is None:
        place, skipped = checkpoint.newest("runs")
        for message in skipped:
            print(f"icsd: skipped: {message}", file=sys.stderr)
    return Sampler.load(place, device)


def _kind_of_output(options: Namespace) -> str:
    """Return a key of `_USED`, after a check of the path."""
    path, suffix = options.output, options.output.suffix.lower()
    if suffix in _ANIMATIONS:
        if options.interpolate is None:
            raise InputError(f"output is {path}, an animation: give --interpolate as well, or an image such as x.png")
        from icsd.visualization import check_animation

        check_animation(path)
        kind = "an animation"
    elif suffix == "" or (path.is_dir() and suffix not in Image.registered_extensions()):
        return "a folder"
    elif Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise InputError(
            f"output is {path}: give an image such as image.png, a .gif or .mp4 with --interpolate, "
            "or a folder, whose name has no suffix"
        )
    else:
        showing = options.show != "images"
        kind = f"--show {options.show}" if showing else "--interpolate" if options.interpolate else "a page of images"
    check_output(path)
    return kind


def _check_options(options: Namespace, kind: str) -> None:
    """Refuse the options that would have no effect."""
    given = {
        "show": options.show != "images",
        "stages": options.stages,
        **{
            name: options[name] is not None
            for name in ("interpolate", "count", "per_sentence", "frames", "fps", "batch_size")
        },
    }
    unused = [f"--{name.replace('_', '-')}" for name, there in given.items() if there and name not in _USED[kind]]
    if unused:
        raise InputError(f"{' and '.join(unused)} and {kind} do not go together: leave one of them out")
    for name in ("count", "per_sentence", "batch_size"):
        if options[name] is not None and options[name] < 1:
            raise InputError(f"--{name.replace('_', '-')} is {options[name]}: give at least 1")
    if options.count is not None and options.per_sentence is not None:
        raise InputError("--count and --per-sentence do not go together: leave one of them out")
    if options.frames is not None and not 2 <= options.frames <= IMAGES_ON_A_PAGE:
        raise InputError(f"--frames is {options.frames}: give a number from 2 to {IMAGES_ON_A_PAGE}")
    if options.fps is not None and not 0.1 <= options.fps <= 100:
        raise InputError(f"--fps is {options.fps}: give a number from 0.1 to 100")


def _plan(sentences: list[str], options: Namespace, kind: str) -> Plan:
    """Return the images to generate; for an interpolation they are its ends."""
    from icsd.sampling import Plan

    plan = Plan(tuple(sentences), options.seed, options.per_sentence, options.count)
    if kind != "a folder" and len(plan) > IMAGES_ON_A_PAGE:
        raise InputError(f"{len(plan)} images do not fit on a page: give at most {IMAGES_ON_A_PAGE}, or a folder")
    if options.interpolate:
        wanted = 2 if options.interpolate == "sentences" else 1
        if len(sentences) != wanted:
            raise InputError(f"--interpolate is {options.interpolate}: give {wanted} sentence(s), got {len(sentences)}")
    return plan


def _lines(name: str | None) -> list[str]:
    """Return the sentences of a file, or of the standard input."""
    if name is None:
        return []
    if name == "-":
        data = sys.stdin.buffer.read(LARGEST_FILE + 1)
    else:
        with open(name, "rb") as file:
            data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise InputError(f"--file is {name}, which is larger than {LARGEST_FILE >> 20} MiB: split it")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"--file is {name}, which is not UTF-8 text ({error.reason}): convert it") from error
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _report_words(sampler: Sampler, sentences: list[str]) -> None:
    """Tell which words of the sentences the model leaves out."""
    sampler.check(sentences)
    distinct = list(dict.fromkeys(sentences))
    unknown = _listed(word for sentence in distinct for word in sampler.unknown(sentence))
    if unknown:
        print(f"icsd: no words that this model knows, left out: {unknown}", file=sys.stderr)
    beyond = _listed(word for sentence in distinct for word in sampler.beyond(sentence))
    if beyond:
        limit = sampler.model.text_encoder.tokenizer.max_words
        print(f"icsd: this model reads {limit} words of a sentence and leaves out: {beyond}", file=sys.stderr)


def _listed(words: Iterable[str], most: int = 30) -> str:
    """Join words, each once."""
    distinct = list(dict.fromkeys(words))
    more = f" and {len(distinct) - most} more" if len(distinct) > most else ""
    return ", ".join(distinct[:most]) + more


def _write_folder(sampler: Sampler, plan: Plan, options: Namespace, team: Team) -> None:
    from icsd.sampling.folder import LARGEST_BATCH, generate_folder

    if options.batch_size and options.batch_size > LARGEST_BATCH:
        raise InputError(f"--batch-size is {options.batch_size}: give at most {LARGEST_BATCH}")
    try:
        generate_folder(
            sampler,
            plan,
            options.output,
            batch_size=options.batch_size or 16,
            truncation=options.truncation,
            team=team,
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("stopped; the same command continues where it was") from interrupt


def _write_page(sampler: Sampler, plan: Plan, options: Namespace, kind: str) -> None:
    from icsd.sampling import pages

    keywords = {"truncation": options.truncation}
    if kind == "--show attention":
        page = pages.attention_page(sampler, plan, **keywords)
    elif kind == "--show similarity":
        page = pages.similarity_page(sampler, plan, **keywords)
    elif kind == "--interpolate":
        ends = _ends(plan, options)
        page = pages.interpolation_page(sampler, *ends, options.frames or 8, all_stages=options.stages, **keywords)
    else:
        page = pages.images_page(sampler, plan, all_stages=options.stages, **keywords)
    with replacing(options.output) as temporary:
        page.save(temporary)


def _write_animation(sampler: Sampler, plan: Plan, options: Namespace) -> None:
    from icsd.sampling.pages import interpolation_frames
    from icsd.visualization import save_animation

    frames = interpolation_frames(
        sampler,
        *_ends(plan, options),
        options.frames or 32,
        truncation=options.truncation,
        all_stages=options.stages,
    )
    with replacing(options.output) as temporary:
        save_animation(frames, temporary, options.fps or 8)


def _ends(plan: Plan, options: Namespace) -> tuple[Request, Request]:
    """Return the first and the last image of an interpolation."""
    from icsd.sampling import Request

    last_seed = options.seed + (options.interpolate == "noise")
    return plan[0], Request(plan.sentences[-1], last_seed)

"""``icsd sample``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from icsd.cli.parser import Parser, check_picture_file

DESCRIPTION = """Paint sentences with a trained model, on the CPU, and write one PNG with the sentences underneath.

Examples:

  icsd sample "a woman with dark skin, firefighter"
      with the newest checkpoint below runs/

  icsd sample "a man with a beard and pale skin" "a lady with red hair" --count 4 --stages
      four pictures of each sentence, from seeds 0 to 3, all stages side by side

  icsd sample "a bald person" --checkpoint runs/emoji-busts --seed 7 --out bald.png
      from the newest checkpoint of one run

The same checkpoint, sentence and seed give the same picture. Words that the model has never seen are named and
skipped."""


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = 'icsd sample "SENTENCE" ["SENTENCE" ...] [options]'
    parser.description = DESCRIPTION
    parser.add_argument("sentences", type=str, nargs="*", metavar="SENTENCE", help="what to paint")
    parser.add_argument("--checkpoint", type=Path | None, metavar="PATH", help="or run folder; the newest in runs/")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture of each sentence")
    parser.add_argument("--count", type=int, default=1, help="pictures of each sentence, from as many seeds")
    parser.add_argument("--stages", action="store_true", help="show the coarse stages beside the finest")
    parser.add_argument("--out", type=Path, default=Path("sample.png"), help="picture to write")


def run(options: Namespace) -> int:
    """Paint."""
    check_picture_file(options.out)
    from icsd.pictures import caption_grid
    from icsd.sampling import Painter
    from icsd.training import checkpoint

    painter = Painter.load(options.checkpoint or checkpoint.newest("runs"))
    for sentence in options.sentences:
        unknown = painter.unknown(sentence)
        if unknown:
            print(f"icsd: this model does not know and skips: {', '.join(unknown)}", file=sys.stderr)
    stages = painter.paint(options.sentences, options.seed, options.count)
    seeds = range(options.seed, options.seed + options.count)
    grid = caption_grid(
        stages if options.stages else stages[-1:],
        [f"{sentence} (seed {seed})" for sentence in options.sentences for seed in seeds],
        columns=options.count if options.count > 1 else None,
        footer=painter.attribution,
    )
    grid.save(options.out)
    print(options.out)
    return 0

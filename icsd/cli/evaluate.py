"""``icsd evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from icsd.cli.parser import Parser
from icsd.errors import InputError

if TYPE_CHECKING:
    from icsd.data import DataConfig
    from icsd.evaluation.evaluate import Encoder
    from icsd.evaluation.extractors import Extractor

DESCRIPTION = """Measure the images that a trained model generates, stage by stage, against held-out real images.

Without any downloaded file the command reports a kernel distance on features of EfficientNet-Lite0, the diversity of
images within and between captions, the inconsistency between stages and, where the data set knows attributes, their
accuracy. With a file of weights it adds the figures of the literature.

Examples:

  icsd evaluate runs/emoji-busts
      the newest checkpoint of a run, 1,000 images

  icsd evaluate runs/cub --count 30000 --extractor inception --weights weights-inception-2015-12-05-6726825d.pth
      FID, KID, precision, recall and inception score; needs pip install "icsd[fidelity]"

  icsd evaluate runs/cub --encoder runs/damsm-cub
      R-precision by the encoders of a run of `icsd pretrain`

  icsd evaluate runs/a --compare runs/b/evaluation/0123456789ab.json
      the differences of two models under one protocol

Every figure is printed and saved with its protocol: network and hash of its weights, resolution, real images, captions
and seeds. Figures of different protocols are not compared. After an interruption the same command goes on."""


def configure(parser: Parser, arguments: Sequence[str]) -> None:
    """Add the options."""
    parser.usage = "icsd evaluate RUN [options]"
    parser.description = DESCRIPTION
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or one of its checkpoints")
    parser.add_argument("--count", type=int, default=1000, help="number of images to generate in all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    parser.add_argument(
        "--extractor",
        type=Literal["lite0", "inception", "clip", "dinov2"],
        default="lite0",
        help="network whose features are compared; all but lite0 need --weights",
    )
    parser.add_argument("--weights", type=Path | None, help="the file (inception) or model folder (clip, dinov2)")
    parser.add_argument(
        "--encoder", type=Path | None, metavar="RUN", help="run of `icsd pretrain` that ranks captions (R-precision)"
    )
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, ... or auto")
    parser.add_argument("--compare", type=Path | None, metavar="FILE", help="results of another model to compare with")
    parser.add_argument("--output", type=Path | None, help="JSON file to write; by default in RUN/evaluation")


def run(options: Namespace) -> int:
    """Evaluate."""
    import torch

    from icsd.data import open_dataset
    from icsd.evaluation import report
    from icsd.evaluation.attributes import attribute_classifier
    from icsd.evaluation.evaluate import evaluate
    from icsd.evaluation.extractors import sha256_of
    from icsd.evaluation.features import Plan
    from icsd.evaluation.protocol import hash_of
    from icsd.sampling import Sampler
    from icsd.training import checkpoint

    sampler = Sampler.load(options.run, options.device)
    state = checkpoint.load(sampler.path, ["config", "step"])
    resolutions = sampler.model.generator.resolutions
    data = _data_config(state["config"]["data"])
    test_set = open_dataset(data, "test", resolutions[-1])
    plan = Plan([captions[0] for captions in test_set.captions], options.count, options.seed)
    extractor = _extractor(options, sampler.device)
    encoders = _encoders(options, state["config"], sampler.device)
    classifiers = {}
    if test_set.attributes:
        train_set = open_dataset(data, "train", resolutions[-1])
        classifiers = {size: attribute_classifier(train_set, size) for size in resolutions}
    folder = sampler.path.parent.parent / "evaluation"
    key = hash_of(
        [sha256_of(sampler.path), extractor.sha256, plan.captions, plan.count, plan.seed, str(options.encoder)]
    )

    def generate(sentences: list[str], seeds: list[int]) -> list[torch.Tensor]:
        return sampler.generate(sentences, sampler.noise(seeds)).images

    work = folder / f"features-{key[:12]}"
    results = evaluate(
        generate, plan, test_set, resolutions, extractor, work, encoders=encoders, classifiers=classifiers
    )
    output = options.output or folder / f"{results[resolutions[-1]].protocol.identifier}.json"
    text = report.to_json(str(sampler.path), state["step"], results)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(report.table(results))
    print(f"\nresults      {output}")
    if options.compare is not None:
        print(f"\ndifferences: this evaluation minus {options.compare}")
        print(report.comparison(results, report.read(options.compare)))
    return 0


def _data_config(saved: dict) -> DataConfig:
    """Return the data configuration of a checkpoint, which holds paths as strings and nested keys as dicts."""
    from icsd.data import DataConfig
    from icsd.data.limits import Limits

    root = None if saved["root"] is None else Path(saved["root"])
    return DataConfig(**saved | {"root": root, "limits": Limits(**saved["limits"])})


def _extractor(options: Namespace, device) -> Extractor:
    from icsd.evaluation import extractors

    if options.extractor == "lite0":
        return extractors.lite0()
    if options.weights is None:
        raise InputError(f"--extractor {options.extractor} needs --weights: give the file or folder of its weights")
    return extractors.EXTRACTORS[options.extractor](options.weights, device)


def _encoders(options: Namespace, config: dict, device) -> list[Encoder]:
    """Return the encoders for R-precision, labeled by whether they took part in training the model."""
    if options.encoder is None:
        return []
    from torch.nn import functional as F

    from icsd.evaluation.evaluate import Encoder
    from icsd.training import checkpoint
    from icsd.training.pretrain import load_damsm

    path = checkpoint.find(options.encoder, checkpoint.ENCODERS)
    size = checkpoint.load(path, ["config"])["config"]["resolution"]
    damsm = load_damsm(path, size)[0].to(device)
    trained = config["damsm"]["checkpoint"]
    own = trained is not None and Path(trained).resolve() == options.encoder.resolve()

    def images(pixels):
        resized = F.interpolate(pixels.float(), size=(size, size), mode="bilinear", antialias=True)
        return damsm.image_encoder(resized.to(device).div(127.5).sub(1)).whole

    def sentences(captions):
        return damsm.text_encoder.encode(captions).sentence

    return [Encoder("training encoder" if own else "independent encoder", images, sentences)]

"""``icsd evaluate``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from icsd.cli.parser import Parser
from icsd.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, device

    from icsd.data import DataConfig, Vocabulary
    from icsd.evaluation.encoders import Encoder
    from icsd.evaluation.evaluate import Evaluation, StageResult
    from icsd.evaluation.extractors import Extractor
    from icsd.sampling import Sampler
    from icsd.team import Team

DESCRIPTION = """Measure the images that a trained model generates, stage by stage, against held-out real images.
The command needs pip install -e ".[evaluate]" in the checkout.

Without any downloaded file the command reports a kernel distance on features of EfficientNet-Lite0, R-precision by the
encoder that guided the training, the diversity of images within and between captions, the error of pixels that are the
same in all real images, the inconsistency between stages and, where the data set knows attributes, their accuracy.
With a file of weights it adds the metrics of the literature.

Examples:

  icsd evaluate runs/emoji-busts
      the newest checkpoint of a run, 1,000 images

  icsd evaluate runs/cub --count 30000 --extractor inception --weights weights-inception-2015-12-05-6726825d.pth
      FID, KID, precision, recall and inception score; needs pip install -e ".[fidelity]"

  icsd evaluate runs/cub --encoder runs/other-damsm --clip clip-vit-base-patch32
      R-precision by encoders that did not train the model, and CLIP score

  icsd evaluate runs/a --compare runs/b/evaluation/step-00002500-0123456789ab.json
      the differences of two models under one protocol

  torchrun --standalone --nproc-per-node 8 --no-python icsd evaluate runs/cub --count 30000
      eight GPUs share the images

Every metric is printed and saved with its protocol: network and hash of its weights, resolution, real images, captions
and seeds. Values of different protocols are not compared. After an interruption the same command goes on."""


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
    parser.add_argument("--stages", type=list[int] | None, help="stages to measure, as in [16,32]; by default all")
    parser.add_argument(
        "--encoder",
        type=Path | None,
        metavar="RUN",
        help="another run of `icsd pretrain`, or AttnGAN's released encoders, for R-precision by them, too",
    )
    parser.add_argument(
        "--clip",
        type=Path | None,
        metavar="FOLDER",
        help="folder of a CLIP model in the layout of Hugging Face, for CLIP score and R-precision",
    )
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, cuda:1, ... or auto")
    parser.add_argument("--compare", type=Path | None, metavar="FILE", help="results of another model to compare with")
    parser.add_argument("--output", type=Path | None, help="JSON file to write; by default in RUN/evaluation")


def run(options: Namespace) -> int:
    """Evaluate, on all ranks together."""
    from icsd.team import joined

    with joined() as team:
        return _run(options, team)


def _run(options: Namespace, team: Team) -> int:
    from icsd.evaluation import report
    from icsd.evaluation.extractors import sha256_of
    from icsd.evaluation.protocol import hash_of
    from icsd.outputs import check_output, replacing
    from icsd.sampling import Sampler
    from icsd.training import checkpoint

    if options.output is not None:
        check_output(options.output)
    others = None if options.compare is None else report.read(options.compare)
    path = team.first(lambda: checkpoint.find(options.run, checkpoint.MODEL))
    digest, step = sha256_of(path), checkpoint.load(path, ["step"])["step"]
    sampler = Sampler.load(path, options.device)
    evaluation = team.led(lambda: _evaluation(options, sampler, team))
    team.each(lambda: _check_same(path, digest))
    key = hash_of([digest, evaluation.identifier])[:12]
    protocol = list(evaluation.protocols.values())[-1].identifier
    output = options.output or path.parent.parent / "evaluation" / f"step-{step:08d}-{protocol}.json"
    features = output.parent / f"features-{key}"
    earlier = team.first(lambda: report.read(output) if report.key_of(output) == key else None)
    if earlier is None:
        team.first(lambda: _make_folder(output))
    results = earlier or _measured(sampler, evaluation, features)
    print(report.table(results))
    if earlier is None and team.leads:
        with replacing(output) as temporary:
            temporary.write_text(report.to_json(str(path), step, results, key), encoding="utf-8")
        shutil.rmtree(features, ignore_errors=True)
    print(f"\nresults      {output}")
    if others is not None:
        print(f"\ndifferences: this evaluation minus {options.compare}")
        print(report.comparison(results, others))
    return 0


def _check_same(path: Path, digest: str) -> None:
    """Check that a checkpoint is still the file that was hashed before anything was read from it."""
    from icsd.evaluation.extractors import sha256_of

    if sha256_of(path) != digest:
        raise InputError(
            f"{path} was replaced while it was read, as training does: evaluate a copy of it, or wait for its run"
        )


def _make_folder(output: Path) -> None:
    """Make the folder of a file, and check that it can be written to, before the work that makes its contents."""
    from icsd.outputs import check_output

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the folder {output.parent} cannot be made ({error.strerror}): give --output FILE in another folder"
        ) from error
    check_output(output)


def _evaluation(options: Namespace, sampler: Sampler, team: Team) -> Evaluation:
    """Return the evaluation that the options describe, for the data set of a model."""
    from icsd.data import open_dataset
    from icsd.evaluation.evaluate import Evaluation
    from icsd.evaluation.features import Plan
    from icsd.training.evaluation import classifiers_of

    available = sampler.model.generator.resolutions
    stages = _stages(options.stages, available)
    data = _data_config(sampler.config["data"])
    test_set = open_dataset(data, "test", available[-1])
    plan = Plan([captions[0] for captions in test_set.captions], options.count, options.seed)
    extractor = _extractor(options, sampler.device)
    encoders = _encoders(options, sampler.path, sampler.device, test_set.vocabulary)
    classifiers = classifiers_of(open_dataset(data, "train", available[-1]), stages) if test_set.attributes else {}
    return Evaluation(
        plan,
        test_set,
        stages,
        extractor,
        refined=available[-1],
        encoders=encoders,
        classifiers=classifiers,
        team=team,
    )


def _measured(sampler: Sampler, evaluation: Evaluation, folder: Path) -> dict[int, StageResult]:
    """Measure a model, from the features that an interrupted command left in a folder."""
    available = sampler.model.generator.resolutions

    def generate(sentences: list[str], seeds: list[int]) -> list[Tensor]:
        images = sampler.generate(sentences, sampler.noise(seeds)).images
        return [images[available.index(stage)] for stage in evaluation.resolutions]

    try:
        return evaluation.measure(generate, folder)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("stopped; the same command goes on after the last complete batch") from interrupt


def _stages(wanted: list[int] | None, available: Sequence[int]) -> list[int]:
    """Return the stages to measure, coarse to fine."""
    if not wanted:
        return list(available)
    unknown = next((stage for stage in wanted if stage not in available), None)
    if unknown is not None:
        raise InputError(
            f"--stages holds {unknown}, which is no stage of this run: give some of {', '.join(map(str, available))}"
        )
    return [stage for stage in available if stage in wanted]


def _data_config(saved: dict) -> DataConfig:
    """Return the data configuration of a checkpoint, which holds paths as strings and nested keys as dicts."""
    from icsd.data import DataConfig
    from icsd.data.limits import Limits

    root = None if saved["root"] is None else Path(saved["root"])
    return DataConfig(**saved | {"root": root, "limits": Limits(**saved["limits"])})


def _extractor(options: Namespace, device) -> Extractor:
    from icsd.evaluation import extractors

    if options.extractor == "lite0":
        if options.weights is not None:
            raise InputError(
                f"--weights is {options.weights}, but --extractor lite0 takes none: name another extractor"
            )
        return extractors.lite0(device)
    if options.weights is None:
        raise InputError(f"--extractor {options.extractor} needs --weights: give the file or folder of its weights")
    return extractors.EXTRACTORS[options.extractor](options.weights, device)


def _encoders(options: Namespace, path: Path, device: device, vocabulary: Vocabulary | None) -> list[Encoder]:
    """Return the encoder that guided the model, if it can be read, and those that the options name."""
    from icsd.evaluation.encoders import clip_encoder
    from icsd.training.evaluation import load_damsm_encoder, load_training_encoder

    encoders = []
    try:
        guide = load_training_encoder(path, device, vocabulary)
    except InputError as error:
        print(f"note         R-precision by the training encoder is left out: {error}")
        guide = None
    if guide is not None:
        encoders.append(guide)
    if options.encoder is not None:
        other = load_damsm_encoder("independent_encoder", options.encoder, device, vocabulary)
        if guide is not None and guide.identity == other.identity:
            raise InputError(f"--encoder {options.encoder} guided this model in training: give an independent one")
        encoders.append(other)
    if options.clip is not None:
        encoders.append(clip_encoder(options.clip, device))
    return encoders

"""Evaluation during training, by the code of `icsd evaluate`, and the encoders that guided a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icsd.data import CaptionedImages, Vocabulary
from icsd.evaluation.attributes import attribute_classifier, classifier_recipe
from icsd.evaluation.encoders import Encoder
from icsd.evaluation.evaluate import Classifier, Evaluation, StageResult
from icsd.evaluation.extractors import lite0, sha256_of
from icsd.evaluation.features import Plan
from icsd.models import (
    DiscriminatorConfig,
    TextConfig,
    TextToImage,
    build_discriminators,
    restore_text_encoder,
)
from icsd.models.attngan import find_release
from icsd.models.damsm import DAMSM
from icsd.models.inception import SIDE
from icsd.models.matching import MatchingHead
from icsd.models.noise import draw_noise
from icsd.models.text import TextEncoder
from icsd.training import checkpoint
from icsd.training.pretrain import load_damsm
from icsd.training.randomness import seeded
from icsd.training.run_folder import write_text
from icsd.training.trainer import Trainer

IMAGES = 256
"""Images of an evaluation during training."""


class TrainingEvaluation:
    """An evaluation of the averaged model that can be repeated during training, by all ranks together.

    It leaves the state of every random generator and the mode of every network as they were.

    Args:
        trainer: The trainer.
        train_set: Real images that the classifier of attributes learns from, where attributes are known.
        test_set: Held-out real images.

    Raises:
        InputError: The packages that evaluation needs are not installed, or the test split is empty.
    """

    def __init__(self, trainer: Trainer, train_set: CaptionedImages, test_set: CaptionedImages) -> None:
        self.trainer = trainer
        resolutions = trainer.resolutions
        guided = trainer.damsm or trainer.config.losses.discriminator.matching
        with seeded(0):
            self.evaluation = trainer.team.led(
                lambda: Evaluation(
                    Plan([captions[0] for captions in test_set.captions], IMAGES, 0),
                    test_set,
                    resolutions,
                    lite0(trainer.device),
                    encoders=[_encoder_of(trainer)] if guided else [],
                    classifiers=classifiers_of(train_set, resolutions),
                    team=trainer.team,
                )
            )

    def measure(self) -> dict[int, StageResult]:
        """Measure the averaged model."""
        trainer = self.trainer
        with seeded(0), _unchanged([trainer.ema, trainer.discriminators, trainer.matching, trainer.model]):
            return self.evaluation.measure(lambda captions, seeds: generate(trainer.ema.module, captions, seeds))

    def write_protocols(self, path: Path) -> None:
        """Write the protocol of every stage to a file."""
        protocols = {str(resolution): asdict(each) for resolution, each in self.evaluation.protocols.items()}
        path.parent.mkdir(exist_ok=True)
        write_text(path, json.dumps(protocols, indent=2) + "\n")


def flat(results: dict[int, StageResult]) -> dict[str, float]:
    """Return the metrics that depend on the model by their keys in a log, such as "evaluation/32/kernel_distance"."""
    return {
        f"evaluation/{resolution}/{name}": estimate.value
        for resolution, result in results.items()
        for name, estimate in result.metrics.items()
        if not name.endswith(("_real", "_shuffled"))
    }


def score_of(results: dict[int, StageResult]) -> float:
    """Return the score that decides which model is the best, from the metrics of the last stage.

    It is the mean accuracy of the attributes where the data set knows them, else minus the kernel distance.
    """
    metrics = results[max(results)].metrics
    accuracies = [estimate.value for name, estimate in metrics.items() if name.endswith("_accuracy")]
    return sum(accuracies) / len(accuracies) if accuracies else -metrics["kernel_distance"].value


def classifiers_of(train_set: CaptionedImages, resolutions: Sequence[int]) -> dict[int, Classifier]:
    """Return the classifiers of attributes for every stage; none where the data set knows no attributes."""
    if not train_set.attributes:
        return {}
    return {
        resolution: Classifier(attribute_classifier(train_set, resolution), classifier_recipe(train_set, resolution))
        for resolution in resolutions
    }


@torch.no_grad()
def generate(model: TextToImage, captions: list[str], seeds: list[int]) -> list[Tensor]:
    """Generate one image of each caption from the noise of its seed, as `icsd.sampling.Sampler` does."""
    device = next(model.generator.parameters()).device
    z, condition = (part.to(device) for part in draw_noise(model.generator, seeds))
    return model.generator(z, model.text_encoder.encode(captions), condition).images


def _encoder_of(trainer: Trainer) -> Encoder:
    """Return the encoder that guides a model in training."""
    if trainer.damsm is not None:
        return _damsm_encoder("training_encoder", trainer.damsm, *_describe(trainer.config.damsm.checkpoint))
    networks = (trainer.discriminators, trainer.matching, trainer.model.text_encoder)
    return _matching_encoder(*networks, trainer.resolutions, "matching heads in training")


def load_training_encoder(path: Path, device: torch.device, vocabulary: Vocabulary | None = None) -> Encoder | None:
    """Return the encoder that guided the model of a checkpoint: DAMSM, or the matching heads of the discriminators.

    Args:
        path: A checkpoint of `icsd train`.
        device: Device of the encoder.
        vocabulary: The words of the data set, which AttnGAN's text encoder may need.

    Returns:
        The encoder, or None for a model that was trained without one.

    Raises:
        InputError: The checkpoint, or that of DAMSM, cannot be read.
    """
    state = checkpoint.load(path, ["config", "text", "model", "discriminators", "matching"])
    config = state["config"]
    resolutions = config["generator"]["resolutions"]
    if config["damsm"]["checkpoint"] is not None:
        return load_damsm_encoder("training_encoder", Path(config["damsm"]["checkpoint"]), device, vocabulary)
    if not config["losses"]["discriminator"]["matching"]:
        return None
    with checkpoint.restoring(path):
        text_encoder = restore_text_encoder(TextConfig(**config["text"]), state["text"])
        discriminators = build_discriminators(
            DiscriminatorConfig(**config["discriminator"]), resolutions, text_encoder.dim
        )
        matching = nn.ModuleList(MatchingHead(each.channels, text_encoder.dim) for each in discriminators)
        prefix = "text_encoder."
        text = {key.removeprefix(prefix): value for key, value in state["model"].items() if key.startswith(prefix)}
        checkpoint.load_module(text_encoder, text, "model")
        checkpoint.load_module(discriminators, state["discriminators"], "discriminators")
        checkpoint.load_module(matching, state["matching"], "matching")
    for network in (text_encoder, discriminators, matching):
        network.to(device).eval()
    identity = f"matching heads of the checkpoint {sha256_of(path)[:12]}"
    return _matching_encoder(discriminators, matching, text_encoder, resolutions, identity)


def load_damsm_encoder(label: str, place: Path, device: torch.device, vocabulary: Vocabulary | None) -> Encoder:
    """Return pretrained encoders.

    Args:
        label: Label of their metrics.
        place: A run or checkpoint of `icsd pretrain`, or AttnGAN's released encoders.
        device: Device of the encoders.
        vocabulary: The words of the data set, which AttnGAN's text encoder may need.

    Raises:
        InputError: There are no such encoders, or they cannot be read.
    """
    identity, size = _describe(place)
    return _damsm_encoder(label, load_damsm(place, size, vocabulary)[0].to(device).eval(), identity, size)


def _describe(place: Path) -> tuple[str, int]:
    """Return the name and hash of pretrained encoders, and the resolution of their images."""
    release = find_release(place)
    if release is not None:
        digests = [sha256_of(path)[:12] for path in (release.text, release.image)]
        return f"AttnGAN's encoders {' and '.join(digests)}", SIDE
    path = checkpoint.find(place, checkpoint.ENCODERS)
    return f"DAMSM {sha256_of(path)[:12]}", checkpoint.load(path, ["config"])["config"]["resolution"]


def _damsm_encoder(label: str, damsm: DAMSM, identity: str, size: int) -> Encoder:
    """Return DAMSM's encoders as those of evaluation; images of other stages are resized to its resolution."""

    def images(pixels: Tensor) -> Tensor:
        device = next(damsm.parameters()).device
        resized = F.interpolate(pixels.float().to(device), size=(size, size), mode="bilinear", antialias=True)
        return damsm.image_encoder(resized.div(127.5).sub(1)).whole

    return Encoder(label, identity, images, lambda captions: damsm.text_encoder.encode(captions).sentence)


def _matching_encoder(
    discriminators: nn.ModuleList,
    matching: nn.ModuleList,
    text_encoder: TextEncoder,
    resolutions: Sequence[int],
    identity: str,
) -> Encoder:
    """Return each stage's discriminator with its matching head, beside the text encoder that learned with them."""

    def images(pixels: Tensor) -> Tensor:
        stage = resolutions.index(pixels.shape[-1])
        device = next(matching.parameters()).device
        return matching[stage](discriminators[stage].features(pixels.to(device).float().div(127.5).sub(1)))

    return Encoder("training_encoder", identity, images, lambda captions: text_encoder.encode(captions).sentence)


@contextlib.contextmanager
def _unchanged(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Put networks into evaluation mode, and every part back into its own mode afterwards."""
    modes = [(part, part.training) for network in networks for part in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode

"""Figures of a trained model, stage by stage, each with the protocol under which it was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from icsd.data import CaptionedImages
from icsd.errors import InputError
from icsd.evaluation.attributes import AttributeClassifier
from icsd.evaluation.cache import cache_folder
from icsd.evaluation.distances import (
    Estimate,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_and_recall,
)
from icsd.evaluation.extractors import FEATURES, LOGITS, Extractor
from icsd.evaluation.features import (
    BATCH,
    Generate,
    Plan,
    Probe,
    generated_features,
    hash_of_images,
    real_features,
    real_images,
)
from icsd.evaluation.protocol import Protocol, hash_of
from icsd.evaluation.retrieval import r_precision
from icsd.ops import similarity_distillation_loss

THUMBNAIL = 16  # pixels of the side at which the diversity of images is measured


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A pair of encoders that rank captions for an image.

    Attributes:
        label: Label of its figures, which says whether the encoder took part in training the model.
        images: uint8 images `(B, 3, r, r)` to features `(B, E)`.
        sentences: Captions to features `(B, E)`.
    """

    label: str
    images: Callable[[Tensor], Tensor]
    sentences: Callable[[list[str]], Tensor]


@dataclasses.dataclass(frozen=True)
class StageResult:
    """The figures of one stage.

    Attributes:
        protocol: The protocol of the distances.
        figures: Estimates by name.
        left_out: The reason for each figure that could not be measured, by name.
    """

    protocol: Protocol
    figures: dict[str, Estimate]
    left_out: dict[str, str]


def evaluate(
    generate: Generate,
    plan: Plan,
    test_set: CaptionedImages,
    resolutions: Sequence[int],
    extractor: Extractor,
    folder: Path,
    *,
    encoders: Sequence[Encoder] = (),
    classifiers: dict[int, AttributeClassifier] | None = None,
) -> dict[int, StageResult]:
    """Generate the images of a plan and measure every stage.

    Args:
        generate: The model.
        plan: Captions, seeds and number of images; its captions are the first ones of `test_set`.
        test_set: Held-out real images at the finest resolution.
        resolutions: Resolution of each stage, coarse to fine.
        extractor: Network for the distances.
        folder: Folder for features of the generated images; it belongs to one model and one plan.
        encoders: Encoders for R-precision.
        classifiers: Attribute classifiers by resolution, where attributes are known.

    Returns:
        The result of each stage by resolution.

    Raises:
        InputError: An image or a feature is not finite, or there are fewer than two images of a set.
    """
    classifiers = classifiers or {}
    probes: dict[str, Probe] = {"extractor": lambda images, _: extractor(images), "pixels": _thumbnails}
    for encoder in encoders:
        probes[encoder.label] = _encoder_probe(encoder, plan.captions)
    for resolution, classifier in classifiers.items():
        probes[f"attributes-{resolution}"] = _attribute_probe(classifier, resolution)
    found = generated_features(generate, plan, resolutions, probes, folder)
    results = {}
    for resolution in resolutions:
        features = found[resolution]
        real = real_images(test_set, resolution)
        digest = hash_of_images(real)
        cache = cache_folder() / f"{digest[:24]}-{extractor.name}-{extractor.sha256[:12]}.safetensors"
        protocol = _protocol(extractor, resolution, test_set, digest, len(real), plan)
        figures, left_out = distances(real_features(real, extractor, cache), features, extractor.name)
        figures |= _diversity(features["pixels/thumbnail"], plan)
        if resolution != resolutions[-1]:
            refined = found[resolutions[-1]]["extractor/features"]
            figures["inconsistency"] = _inconsistency(features["extractor/features"], refined)
        for encoder in encoders:
            pair = (features[f"{encoder.label}/{kind}"] for kind in ("images", "sentences"))
            figures[f"r_precision ({encoder.label})"] = _retrieval(*pair, plan, test_set)
        if resolution in classifiers:
            figures |= _attribute_accuracy(features, classifiers[resolution], real, test_set, plan, resolution)
        results[resolution] = StageResult(protocol, figures, left_out)
    return results


def distances(
    real: dict[str, Tensor], generated: dict[str, Tensor], extractor: str
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Return the distances between two sets of features, and the reasons for those that are left out."""
    x, y = real[FEATURES], generated[f"extractor/{FEATURES}"]
    figures, left_out = {"kernel_distance": kernel_distance(x, y)}, {}
    wanted: dict[str, Callable[[], Estimate | dict[str, Estimate]]] = {}
    if extractor != "lite0":  # its features have no published figures to compare with
        wanted = {
            "frechet_distance": lambda: frechet_distance(x, y),
            "precision and recall": lambda: precision_and_recall(x, y),
        }
    if LOGITS in real:
        wanted["inception_score"] = lambda: inception_score(generated[f"extractor/{LOGITS}"])
    for name, measure in wanted.items():
        try:
            value = measure()
        except InputError as error:
            left_out[name] = str(error)
        else:
            figures |= value if isinstance(value, dict) else {name: value}
    return figures, left_out


def _protocol(
    extractor: Extractor, resolution: int, test_set: CaptionedImages, digest: str, count: int, plan: Plan
) -> Protocol:
    return Protocol(
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        resize=extractor.resize,
        resolution=resolution,
        real_set=f"{test_set.name}, {test_set.split} split",
        real_sha256=digest,
        real_images=count,
        generated_images=plan.count,
        captions_sha256=hash_of(plan.captions),
        first_seed=plan.seed,
    )


def _thumbnails(images: Tensor, _: Sequence[int]) -> dict[str, Tensor]:
    return {"thumbnail": F.adaptive_avg_pool2d(images.float(), THUMBNAIL).div(127.5).sub(1).flatten(1).half()}


def _encoder_probe(encoder: Encoder, captions: list[str]) -> Probe:
    def probe(images: Tensor, numbers: Sequence[int]) -> dict[str, Tensor]:
        sentences = encoder.sentences([captions[number] for number in numbers])
        return {"images": encoder.images(images).float().cpu(), "sentences": sentences.float().cpu()}

    return probe


def _attribute_probe(classifier: AttributeClassifier, resolution: int) -> Probe:
    def probe(images: Tensor, _: Sequence[int]) -> dict[str, Tensor]:
        return classifier.read(images.float().div(127.5).sub(1)) if images.shape[-1] == resolution else {}

    return probe


def _diversity(thumbnails: Tensor, plan: Plan) -> dict[str, Estimate]:
    """Return the mean absolute difference (range 2) of two images of one caption, and of two captions."""
    thumbnails, period = thumbnails.float(), len(plan.captions)
    found = {}
    for name, shift in (("diversity_within_caption", period), ("diversity_between_captions", 1)):
        if len(thumbnails) > shift and (shift != period or period > 0):
            differences = (thumbnails[shift:] - thumbnails[:-shift]).abs().mean(1)
            found[name] = Estimate(differences.mean().item(), _standard_error(differences))
    if period == 1:
        found.pop("diversity_between_captions", None)
    return found


def _inconsistency(coarse: Tensor, refined: Tensor) -> Estimate:
    """Return the mean of (S - T)² over batches: S and T compare the images of a batch at two stages."""
    pairs = zip(coarse.split(BATCH), refined.split(BATCH), strict=True)
    values = torch.stack(
        [similarity_distillation_loss(a, b) for a, b in pairs if len(a) == BATCH or len(coarse) < BATCH]
    )
    return Estimate(values.mean().item(), _standard_error(values))


def _retrieval(images: Tensor, sentences: Tensor, plan: Plan, test_set: CaptionedImages) -> Estimate:
    """Return the share of images whose own caption is the most similar among 100, 99 of them of other captions.

    Images are ranked in rounds over the captions, so that no caption occurs twice among the candidates.
    """
    rounds = [slice(start, start + len(plan.captions)) for start in range(0, len(images), len(plan.captions))]
    values = [
        r_precision(images[each], sentences[each], test_set.class_ids[: len(images[each])])
        for each in rounds
        if len(images[each]) >= 2
    ]
    share = sum(values) / len(values)
    return Estimate(share, (share * (1 - share) / len(images)) ** 0.5)


def _attribute_accuracy(
    features: dict[str, Tensor],
    classifier: AttributeClassifier,
    real: Tensor,
    test_set: CaptionedImages,
    plan: Plan,
    resolution: int,
) -> dict[str, Estimate]:
    """Return the accuracy of every attribute in generated images, and its ceiling in real ones."""
    captions = torch.tensor([plan.caption_of(image) for image in range(plan.count)])
    ceilings = classifier.read(real.float().div(127.5).sub(1))
    found = {}
    for name, truth in test_set.attributes.items():
        for label, read, asked in (
            (name, features[f"attributes-{resolution}/{name}"], truth[captions]),
            (f"{name} (real images)", ceilings[name], truth),
        ):
            correct = (read == asked).float()
            found[f"accuracy of {label}"] = Estimate(correct.mean().item(), _standard_error(correct))
    return found


def _standard_error(values: Tensor) -> float | None:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None

"""Metrics of a model, stage by stage, each with the protocol under which it was measured.

`icsd evaluate` and the evaluations during training share this code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from icsd.data import CaptionedImages
from icsd.errors import InputError
from icsd.evaluation.attributes import AttributeClassifier
from icsd.evaluation.distances import (
    Estimate,
    frechet_distance,
    inception_score,
    is_fidelity_available,
    kernel_distance,
    precision_and_recall,
)
from icsd.evaluation.encoders import CLIP, Encoder
from icsd.evaluation.extractors import FEATURES, LITE0, LOGITS, Extractor
from icsd.evaluation.features import BATCH, Generate, Plan, Probe, generated_features
from icsd.evaluation.protocol import VERSION, Protocol, hash_of
from icsd.evaluation.real import RealImages, mean_difference, read_attributes, thumbnails_of
from icsd.evaluation.retrieval import CANDIDATES, r_precision
from icsd.ops import similarity_distillation_loss
from icsd.team import Team


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier of attributes at one resolution, and the hash of what it was trained with."""

    network: AttributeClassifier
    recipe: str

    @property
    def identity(self) -> str:
        """The name of this classifier in results."""
        return f"attribute classifier {self.recipe}"


@dataclasses.dataclass(frozen=True)
class StageResult:
    """The metrics of one stage.

    Attributes:
        protocol: The protocol of the distances.
        metrics: Estimates by name.
        left_out: The reason for each metric that could not be measured, by name.
        measured_by: The network behind a metric, where it is not the extractor of the protocol.
    """

    protocol: Protocol
    metrics: dict[str, Estimate]
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    measured_by: dict[str, str] = dataclasses.field(default_factory=dict)


class Evaluation:
    """Real images, networks and a plan, with which any number of models are measured.

    Args:
        plan: Captions, seeds and number of images; its captions are the first ones of `test_set`.
        test_set: Held-out real images at the finest resolution.
        resolutions: Resolution of each stage that is measured, coarse to fine.
        extractor: Network for the distances.
        refined: Resolution of the refined stage, with which coarse ones are compared; by default the last one.
        encoders: Encoders for R-precision.
        classifiers: Attribute classifiers by resolution, where attributes are known.
        team: The ranks that share the batches of generated images; each has such an evaluation.

    Raises:
        InputError: The real set has fewer than two images.
    """

    def __init__(
        self,
        plan: Plan,
        test_set: CaptionedImages,
        resolutions: Sequence[int],
        extractor: Extractor,
        *,
        refined: int | None = None,
        encoders: Sequence[Encoder] = (),
        classifiers: dict[int, Classifier] | None = None,
        team: Team | None = None,
    ) -> None:
        require_two_images(test_set)
        self.team = team or Team()
        self.plan, self.test_set, self.resolutions = plan, test_set, resolutions
        self.extractor, self.encoders, self.classifiers = extractor, encoders, classifiers or {}
        self.refined = refined or resolutions[-1]
        readers = {resolution: each.network for resolution, each in self.classifiers.items()}
        self.real = {
            resolution: RealImages.of(test_set, resolution, extractor, readers.get(resolution))
            for resolution in resolutions
        }
        self.protocols = {resolution: self._protocol(resolution) for resolution in resolutions}
        self.probes: dict[str, Probe] = {
            "extractor": extractor,
            "pixels": lambda images: {"thumbnail": thumbnails_of(images)},
            "constant": lambda images: self.real[images.shape[-1]].constant_errors(images),
        }
        self.probes |= {encoder.label: _encoder_probe(encoder) for encoder in encoders}
        self.probes |= {f"attributes-{size}": _attribute_probe(network, size) for size, network in readers.items()}

    @property
    def identifier(self) -> str:
        """A hash of everything that the metrics depend on besides the model, and which of them can be measured."""
        networks = [encoder.identity for encoder in self.encoders]
        networks += [classifier.identity for classifier in self.classifiers.values()]
        fidelity = self.extractor.name != LITE0 and is_fidelity_available()
        return hash_of([VERSION, [each.identifier for each in self.protocols.values()], networks, fidelity])

    @torch.no_grad()
    def measure(self, generate: Generate, folder: Path | None = None) -> dict[int, StageResult]:
        """Generate the images of the plan and measure every stage, on all ranks together.

        Args:
            generate: The model; it returns the stages of `resolutions`.
            folder: Folder for features of the generated images, which belongs to one model and one `identifier`; None
                keeps no files.

        Returns:
            The result of each stage by resolution.

        Raises:
            InputError: An image or a feature is not finite.
        """
        found = generated_features(generate, self.plan, self.resolutions, self.probes, folder, self.team)
        return self.team.first(lambda: self._stages(found))

    def _stages(self, found: dict[int, dict[str, Tensor]]) -> dict[int, StageResult]:
        sentences = {encoder.label: self._sentences(encoder) for encoder in self.encoders}
        return {resolution: self._stage(resolution, found, sentences) for resolution in self.resolutions}

    def _sentences(self, encoder: Encoder) -> Tensor:
        """Return what an encoder finds in every candidate."""
        captions = self._candidates
        parts = (captions[start : start + BATCH] for start in range(0, len(captions), BATCH))
        return torch.cat([encoder.sentences(part).float().cpu() for part in parts])

    def _stage(self, resolution: int, found: dict[int, dict[str, Tensor]], sentences: dict[str, Tensor]) -> StageResult:
        features, real = found[resolution], self.real[resolution]
        result = StageResult(self.protocols[resolution], *distances(real.features, features, self.extractor.name))
        self._add_pixels(result, features, real)
        self._add_inconsistency(result, features, found)
        for encoder in self.encoders:
            self._add_retrieval(result, features[f"{encoder.label}/images"], sentences[encoder.label], encoder)
        if resolution in self.classifiers:
            self._add_accuracies(result, features, resolution)
        return result

    def _add_pixels(self, result: StageResult, features: dict[str, Tensor], real: RealImages) -> None:
        """Add diversity, beside that of real images, and the error of constant pixels."""
        metrics, left_out = _diversity(features["pixels/thumbnail"], len(self.plan.captions))
        result.metrics.update(metrics | real.diversity)
        result.left_out.update(left_out)
        if "diversity_within_caption_real" not in real.diversity:
            result.left_out["diversity_within_caption_real"] = "no two real images share a caption"
        errors = features.get("constant/error")
        if errors is None:
            result.left_out["constant_pixel_error"] = "no pixel is the same in all real images"
        else:
            result.metrics["constant_pixel_error"] = _mean(errors)

    def _add_inconsistency(
        self, result: StageResult, features: dict[str, Tensor], found: dict[int, dict[str, Tensor]]
    ) -> None:
        if result.protocol.resolution == self.refined:
            return
        if self.refined not in found:
            result.left_out["inconsistency"] = f"the refined stage of {self.refined} px is not among the stages"
            return
        pair = (each[f"extractor/{FEATURES}"] for each in (features, found[self.refined]))
        result.metrics["inconsistency"] = _inconsistency(*pair)
        pair = (self.real[stage].features[FEATURES] for stage in (result.protocol.resolution, self.refined))
        result.metrics["inconsistency_real"] = _inconsistency(*pair)

    def _add_retrieval(self, result: StageResult, images: Tensor, sentences: Tensor, encoder: Encoder) -> None:
        """Add R-precision and the CLIP score."""
        name, own, captions = f"r_precision_{encoder.label}", self._own_captions(), self._candidates
        class_ids = self.test_set.class_ids[: len(captions)]
        share = r_precision(images, sentences, class_ids, captions=captions, own=own)
        if math.isnan(share):
            result.left_out[name] = "no two captions differ"
        else:
            result.metrics[name] = Estimate(share, (share * (1 - share) / len(images)) ** 0.5)
        result.measured_by[name] = encoder.identity
        if encoder.label == CLIP:
            result.metrics["clip_score"] = _mean(100 * F.cosine_similarity(images, sentences[own]).clamp(min=0))
            result.measured_by["clip_score"] = encoder.identity

    @property
    def _candidates(self) -> Sequence[str]:
        """The captions that each image has to choose from: those of all images, and at least as many as it draws."""
        return self.plan.captions[: max(self.plan.count, CANDIDATES)]

    def _own_captions(self) -> Tensor:
        """Return the number of the caption of each image."""
        return torch.tensor([self.plan.caption_of(image) for image in range(self.plan.count)])

    def _add_accuracies(self, result: StageResult, features: dict[str, Tensor], resolution: int) -> None:
        """Add the accuracy of every attribute, its ceiling in real images, and its floor if captions were shuffled."""
        captions, ceilings = self._own_captions(), self.real[resolution].attributes
        for attribute, truth in self.test_set.attributes.items():
            read, asked = features[f"attributes-{resolution}/{attribute}"], truth[captions]
            values = len(self.test_set.attribute_names[attribute])
            counts = [torch.bincount(each, minlength=values) for each in (read, asked)]
            metrics = {
                f"{attribute}_accuracy": _mean(read == asked),
                f"{attribute}_accuracy_shuffled": Estimate((counts[0] @ counts[1]).item() / len(read) ** 2),
                f"{attribute}_accuracy_real": _mean(ceilings[attribute] == truth),
            }
            result.metrics.update(metrics)
            result.measured_by.update(dict.fromkeys(metrics, self.classifiers[resolution].identity))

    def _protocol(self, resolution: int) -> Protocol:
        real = self.real[resolution]
        return Protocol(
            extractor=self.extractor.name,
            extractor_sha256=self.extractor.sha256,
            resize=self.extractor.resize,
            resolution=resolution,
            real_set=f"{self.test_set.name}, {self.test_set.split} split",
            real_sha256=real.sha256,
            real_images=real.count,
            generated_images=self.plan.count,
            captions_sha256=hash_of(self.plan.captions),
            first_seed=self.plan.seed,
        )


def require_two_images(test_set: CaptionedImages) -> None:
    """Check that generated images can be compared with a set, before the work that needs it.

    Raises:
        InputError: The set has fewer than two images.
    """
    if len(test_set) < 2:
        raise InputError(
            f"the {test_set.split} split of {test_set.name} has {len(test_set)} image, and an evaluation needs at "
            "least 2: give more images or a larger data.test_fraction"
        )


def distances(
    real: dict[str, Tensor], generated: dict[str, Tensor], extractor: str
) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Return the distances between two sets of features, and the reasons for those that are left out."""
    x, y = real[FEATURES], generated[f"extractor/{FEATURES}"]
    metrics, left_out = {"kernel_distance": kernel_distance(x, y)}, {}
    wanted: dict[str, Callable[[], Estimate | dict[str, Estimate]]] = {}
    if extractor != LITE0:  # there are no published values for its features to compare with
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
            metrics |= value if isinstance(value, dict) else {name: value}
    return metrics, left_out


def _encoder_probe(encoder: Encoder) -> Probe:
    return lambda images: {"images": encoder.images(images).float().cpu()}


def _attribute_probe(network: AttributeClassifier, resolution: int) -> Probe:
    def probe(images: Tensor) -> dict[str, Tensor]:
        return read_attributes(network, images) if images.shape[-1] == resolution else {}

    return probe


def _diversity(thumbnails: Tensor, captions: int) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Return the mean absolute difference (range 2) of two images of one caption, and of two captions."""
    thumbnails, metrics, left_out = thumbnails.float(), {}, {}
    if len(thumbnails) > captions:
        metrics["diversity_within_caption"] = mean_difference(thumbnails[captions:], thumbnails[:-captions])
    else:
        left_out["diversity_within_caption"] = (
            f"no caption has two images: give a --count of more than {captions:,}, the number of captions"
        )
    if captions > 1:
        metrics["diversity_between_captions"] = mean_difference(thumbnails[1:], thumbnails[:-1])
    else:
        left_out["diversity_between_captions"] = "there is one caption"
    return metrics, left_out


def _inconsistency(coarse: Tensor, refined: Tensor) -> Estimate:
    """Return the mean of (S - T)² over batches: S and T compare the images of a batch at two stages."""
    pairs = zip(coarse.split(BATCH), refined.split(BATCH), strict=True)
    values = [similarity_distillation_loss(a, b) for a, b in pairs if len(a) == BATCH or len(coarse) < BATCH]
    return _mean(torch.stack(values))


def _mean(values: Tensor) -> Estimate:
    """Return the mean and its standard error."""
    values = values.double()
    return Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None)

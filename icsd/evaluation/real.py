"""The held-out real images at the resolution of a stage, and what generated ones are compared with."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from icsd.data import CaptionedImages
from icsd.evaluation.attributes import AttributeClassifier
from icsd.evaluation.distances import Estimate
from icsd.evaluation.extractors import Extractor
from icsd.evaluation.features import BATCH, joined, real_features, to_uint8
from icsd.evaluation.protocol import VERSION, hash_of
from icsd.outputs import cache_folder

THUMBNAIL = 16  # pixels of the side at which the diversity of images is measured


@dataclass(frozen=True)
class RealImages:
    """The real images at one resolution as evaluations need them; the images themselves are not kept.

    Attributes:
        sha256: Hash of the pixels.
        count: Number of images.
        features: Features that the extractor finds in them.
        constant: Pixels `(3, r, r)` that are the same in all images, as bools.
        first: The first image, uint8 `(3, r, r)`.
        diversity: Mean absolute difference of two images of one caption, where captions are shared, and of any two.
        attributes: Values that a classifier reads in them, where attributes are known.
    """

    sha256: str
    count: int
    features: dict[str, Tensor]
    constant: Tensor
    first: Tensor
    diversity: dict[str, Estimate]
    attributes: dict[str, Tensor]

    @classmethod
    def of(
        cls, dataset: CaptionedImages, resolution: int, extractor: Extractor, classifier: AttributeClassifier | None
    ) -> RealImages:
        """Measure the images of a split."""
        images = real_images(dataset, resolution)
        batches = images.split(BATCH)  # as floats, all images at once would take four times their memory
        digest = hashlib.sha256(images.numpy()).hexdigest()
        thumbnails = torch.cat([thumbnails_of(batch) for batch in batches])
        key = hash_of([VERSION, digest, extractor.name, extractor.sha256, extractor.resize])
        return cls(
            sha256=digest,
            count=len(images),
            features=real_features(images, extractor, cache_folder() / f"real-{key[:24]}.safetensors"),
            constant=torch.stack([(batch == images[0]).all(0) for batch in batches]).all(0),
            first=images[0],
            diversity=_diversity(thumbnails.float(), dataset.captions),
            attributes={} if classifier is None else joined([read_attributes(classifier, batch) for batch in batches]),
        )

    def constant_errors(self, images: Tensor) -> dict[str, Tensor]:
        """Return the mean absolute error (range 2) of the constant pixels of each image, if there are such pixels."""
        if not self.constant.any():
            return {}
        errors = (images.float() - self.first.float()).abs()[:, self.constant]
        return {"error": errors.mean(1) / 127.5}


def read_attributes(classifier: AttributeClassifier, images: Tensor) -> dict[str, Tensor]:
    """Return what a classifier reads in uint8 images, by attribute."""
    return classifier.read(images.float().div(127.5).sub(1))


def real_images(dataset: CaptionedImages, resolution: int) -> Tensor:
    """Return the images of a split as uint8 `(P, 3, resolution, resolution)`, reduced by area averaging."""
    numbers = range(len(dataset))
    return torch.stack([to_uint8(F.adaptive_avg_pool2d(dataset[number]["image"], resolution)) for number in numbers])


def thumbnails_of(images: Tensor) -> Tensor:
    """Return uint8 images `(B, 3, r, r)` as float16 rows in [-1, 1] of a common small size."""
    return F.adaptive_avg_pool2d(images.float(), THUMBNAIL).div(127.5).sub(1).flatten(1).half()


def _diversity(thumbnails: Tensor, captions: list[list[str]]) -> dict[str, Estimate]:
    found = {}
    shared = sorted(_pairs_of_one_caption(captions))
    if shared:
        first, second = torch.tensor(shared).T
        found["diversity_within_caption_real"] = mean_difference(thumbnails[first], thumbnails[second])
    if len(thumbnails) > 1:
        found["diversity_between_captions_real"] = mean_difference(thumbnails[1:], thumbnails[:-1])
    return found


def _pairs_of_one_caption(captions: list[list[str]]) -> set[tuple[int, int]]:
    """Return the pairs of neighbors among the images that share a caption."""
    owners: dict[str, list[int]] = {}
    for number, sentences in enumerate(captions):
        for sentence in dict.fromkeys(sentences):
            owners.setdefault(sentence, []).append(number)
    return set(_neighbors(owners.values()))


def _neighbors(groups: Iterator[list[int]]) -> Iterator[tuple[int, int]]:
    return itertools.chain.from_iterable(map(itertools.pairwise, groups))


def mean_difference(a: Tensor, b: Tensor) -> Estimate:
    """Return the mean absolute difference of the rows of two matrices, and its standard error."""
    differences = (a - b).abs().mean(1)
    error = (differences.std() / len(differences) ** 0.5).item() if len(differences) > 1 else None
    return Estimate(differences.mean().item(), error)

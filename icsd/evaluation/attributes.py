"""Scores of known attributes in generated images, by a small classifier that is trained on real images.

Each accuracy stands between two others: the ceiling, what the classifier reads in real images it has not seen, and
the floor, what it would score if the captions had been dealt out at random.
"""

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icsd.data import CaptionedImages
from icsd.evaluation.cache import keep, kept
from icsd.evaluation.progress import progress
from icsd.evaluation.protocol import VERSION
from icsd.outputs import cache_folder

STEPS, BATCH_SIZE = 600, 64


@dataclass(frozen=True)
class AttributeScore:
    """Accuracy of one attribute, in [0, 1]."""

    attribute: str
    """The name of the attribute."""
    values: int
    """The number of its values."""
    ceiling: float
    """The accuracy on real held-out images."""
    result: float
    """The accuracy on images generated from held-out captions."""
    floor: float
    """The expected accuracy if the captions were shuffled."""


class AttributeClassifier(nn.Module):
    """A small convolutional network with one head per attribute.

    Args:
        values: Number of values of each attribute.
        width: Channels of the first layer.
    """

    def __init__(self, values: dict[str, int], width: int = 32) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for channels, out_channels in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3))
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1] * 16, count) for name, count in values.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images `(B, 3, r, r)` in [-1, 1] to logits `(B, values)` by attribute."""
        features = self.trunk(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Tensor, batch_size: int = 64) -> dict[str, Tensor]:
        """Return the likeliest value `(N,)` by attribute, for images `(N, 3, r, r)` in [-1, 1]."""
        self.eval()
        logits = [self(batch) for batch in images.split(batch_size)]
        return {name: torch.cat([one[name].argmax(1) for one in logits]) for name in self.heads}


def attribute_classifier(train_set: CaptionedImages, resolution: int) -> AttributeClassifier:
    """Return a classifier for images of a resolution, trained once and then read from the cache folder.

    Args:
        train_set: Real images with attributes, at least as large.
        resolution: Side of the images in pixels, to which the real ones are reduced by area averaging.
    """
    path = cache_folder() / f"classifier-{classifier_recipe(train_set, resolution)}.safetensors"
    weights = kept(path)
    if weights is None:
        classifier = train_classifier(train_set, resolution, steps=STEPS, batch_size=BATCH_SIZE)
        keep(path, classifier.state_dict())
        return classifier.eval()
    with torch.random.fork_rng([]):
        classifier = _untrained(train_set)
    classifier.load_state_dict(weights)
    return classifier.eval()


def classifier_recipe(train_set: CaptionedImages, resolution: int) -> str:
    """Return the first digits of a hash of all that a classifier is made from: version, images, attributes and steps.

    Rounding differs between machines, and so do the last digits of what two classifiers of one recipe find.
    """
    digest = hashlib.sha256(repr((VERSION, resolution, STEPS, BATCH_SIZE, train_set.attribute_names)).encode())
    for index in range(len(train_set)):
        digest.update(train_set.images[index].contiguous().numpy().tobytes())
    for values in train_set.attributes.values():
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:12]


def train_classifier(
    train_set: CaptionedImages,
    resolution: int | None = None,
    *,
    steps: int,
    batch_size: int,
    seed: int = 0,
) -> AttributeClassifier:
    """Train a classifier on real images with shifts, blur, tints and noise; leave the random state alone.

    Args:
        train_set: Images with attributes.
        resolution: Side to which the images are reduced by area averaging; by default they stay as they are.
        steps: Steps of AdamW, its rate falling to zero on a half cosine.
        batch_size: Images per step.
        seed: Seed of weights, batches and changes of the images.

    Returns:
        The classifier.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPU's, too
        images = torch.stack([_reduced(train_set[index]["image"], resolution) for index in range(len(train_set))])
        return _train_classifier(train_set, images, steps, batch_size)


def _reduced(image: Tensor, resolution: int | None) -> Tensor:
    return image if resolution is None else F.adaptive_avg_pool2d(image, resolution)


def _untrained(train_set: CaptionedImages) -> AttributeClassifier:
    return AttributeClassifier({name: len(train_set.attribute_names[name]) for name in train_set.attributes})


def _train_classifier(train_set: CaptionedImages, images: Tensor, steps: int, batch_size: int) -> AttributeClassifier:
    classifier = _untrained(train_set)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress(range(steps), f"attribute classifier {images.shape[-1]} px", "step"):
        chosen = torch.randint(len(images), (batch_size,))
        logits = classifier(_augment(images[chosen]))
        losses = [F.cross_entropy(logits[name], train_set.attributes[name][chosen]) for name in logits]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
    return classifier


def _augment(images: Tensor) -> Tensor:
    """Move, blur and tint the images of a batch and add noise, because generated images are not as clean as real ones.

    A classifier that learns from clean images alone takes the faint noise of generated ones for a color.
    """
    count, _, side, _ = images.shape
    top, left = torch.randint(5, (2,)).tolist()
    moved = F.pad(images, (2, 2, 2, 2), mode="replicate")[..., top : top + side, left : left + side]
    blurred = F.interpolate(F.avg_pool2d(moved, 2), size=side, mode="bilinear")
    mixed = torch.lerp(blurred, moved, torch.rand(count, 1, 1, 1))
    tinted = mixed * (1 + 0.2 * torch.randn(count, 1, 1, 1)) + 0.1 * torch.randn(count, 1, 1, 1)
    tinted = tinted + 0.05 * torch.randn(count, 3, 1, 1)
    clouds = F.interpolate(torch.randn(count, 3, side // 4, side // 4), size=side, mode="bilinear")
    white, smooth = 0.3 * torch.rand(2, count, 1, 1, 1)
    return tinted + white * torch.randn_like(tinted) + smooth * clouds


def evaluate_attributes(
    generate: Callable[[list[str], int], Tensor],
    classifier: AttributeClassifier,
    test_set: CaptionedImages,
    repeats: int = 4,
    seed: int = 0,
) -> list[AttributeScore]:
    """Score images generated from the captions of held-out images.

    Args:
        generate: B captions and a seed -> images `(B, 3, r, r)` in [-1, 1].
        classifier: Reads the attributes.
        test_set: Held-out images; their first captions are generated.
        repeats: Number of images of each caption, each from other noise.
        seed: Seed of the first generation.

    Returns:
        One score per attribute.
    """
    real = classifier.read(torch.stack([test_set[index]["image"] for index in range(len(test_set))]))
    captions = [sentences[0] for sentences in test_set.captions]
    generated = classifier.read(torch.cat([generate(captions, seed + repeat) for repeat in range(repeats)]))
    scores = []
    for name, truth in test_set.attributes.items():
        values = len(test_set.attribute_names[name])
        asked = truth.repeat(repeats)
        read_as, asked_for = (torch.bincount(one, minlength=values) / len(asked) for one in (generated[name], asked))
        scores.append(
            AttributeScore(
                attribute=name,
                values=values,
                ceiling=(real[name] == truth).float().mean().item(),
                result=(generated[name] == asked).float().mean().item(),
                floor=(read_as @ asked_for).item(),
            )
        )
    return scores


def format_scores(scores: list[AttributeScore]) -> str:
    """Return a table of scores, one line each."""
    lines = [f"{'attribute':<12} {'values':>6} {'ceiling':>8} {'result':>8} {'floor':>8}"]
    lines += [
        f"{one.attribute:<12} {one.values:>6} {one.ceiling:>8.3f} {one.result:>8.3f} {one.floor:>8.3f}"
        for one in scores
    ]
    return "\n".join(lines)

"""GAN losses on logits, and the penalties on discriminators: which discriminators and generator minimize.

A matching-aware discriminator tells three kinds of pairs from the real one: a generated image with its caption, and a
real image with the caption of another (Reed et al. 2016). Terms are weighted as in AttnGAN (Xu et al. 2018).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from icsd.errors import InputError
from icsd.models import Discriminator
from icsd.training.losses import DiscriminatorLosses


@dataclass
class AdversarialConfig:
    """The adversarial loss of generator and discriminators."""

    loss: Literal["bce", "hinge", "relativistic"] = "hinge"
    """Binary cross-entropy (AttnGAN), hinge (DF-GAN), or the relativistic loss of pairs (R3GAN), which is
    stable together with losses.discriminator.r1."""

    matching_penalty_power: float = 6.0
    """Power p of the matching-aware gradient penalty (DF-GAN: 6); see losses.discriminator.matching_penalty."""

    wrong_captions: Literal["any", "similar"] = "any"
    """Wrong captions of real images: those of any image of another class (AttnGAN), or of the one in the batch whose
    caption has the largest share of common words with the right one, among all words of both (Jaccard's index).
    similar suits captions that fit one image alone."""

    penalty_every: int = 1
    """Steps between two penalties on the discriminators' gradients, whose weights are multiplied by this number (lazy
    regularization, StyleGAN2)."""

    augment: list[Literal["color", "translation", "cutout"]] = field(default_factory=list)
    """Changes made to real and generated images alike before the discriminators see them (DiffAugment, Zhao et al.
    2020), for small data sets."""

    def __post_init__(self) -> None:
        if self.penalty_every < 1:
            raise InputError(f"adversarial.penalty_every is {self.penalty_every}: give at least 1")
        if not self.matching_penalty_power >= 2:
            raise InputError(f"adversarial.matching_penalty_power is {self.matching_penalty_power}: give at least 2")


class Logits(NamedTuple):
    """A discriminator's logits of a batch."""

    images: Tensor
    """Logits of the images without their captions, `(B,)`."""
    pairs: Tensor
    """Logits of the images with their captions, `(B,)`."""


class WrongPairs(NamedTuple):
    """A discriminator's logits of the real images that have a wrong caption."""

    right: Tensor
    """Logits with their own captions, `(W,)`."""
    wrong: Tensor
    """Logits with the wrong captions, `(W,)`; W is 0 where a batch has none."""
    weight: float = 1.0
    """Weight of their mean, so that the mean over ranks is that over all such images."""


@dataclass(frozen=True)
class SeparateLoss:
    """A loss of each logit by itself, with the weights of AttnGAN. The fields are means over logits `(B,)`."""

    real: Callable[[Tensor], Tensor]
    """The discriminator's loss of what it should accept."""
    fake: Callable[[Tensor], Tensor]
    """The discriminator's loss of what it should reject."""
    fool: Callable[[Tensor], Tensor]
    """The generator's loss of what the discriminator should accept."""
    compares = False
    """True if the generator's loss needs the logits of real images."""

    def discriminator(self, real: Logits, fake: Logits, wrong: WrongPairs) -> Tensor:
        """Return the loss of a discriminator."""
        accept = self.real(real.images) + self.real(real.pairs)
        reject = self.fake(fake.images) + self.fake(fake.pairs)
        if len(wrong.wrong):
            reject = reject + wrong.weight * self.fake(wrong.wrong)
        return accept / 2 + reject / 3

    def generator(self, fake: Logits, real: Logits | None) -> Tensor:
        """Return the loss of the generator."""
        return self.fool(fake.images) + self.fool(fake.pairs)


class RelativisticLoss:
    """Softplus of how far a logit that should be greater is above one that should be less (RpGAN).

    A generated image is compared with the real image of the same caption, and a wrong caption with the right one of the
    same image (Jolicoeur-Martineau 2019; R3GAN, Huang et al. 2024).
    """

    compares = True

    def discriminator(self, real: Logits, fake: Logits, wrong: WrongPairs) -> Tensor:
        """Return the loss of a discriminator."""
        loss = _above(real.images, fake.images) + _above(real.pairs, fake.pairs)
        return loss + wrong.weight * _above(wrong.right, wrong.wrong) if len(wrong.wrong) else loss

    def generator(self, fake: Logits, real: Logits | None) -> Tensor:
        """Return the loss of the generator."""
        return _above(fake.images, real.images) + _above(fake.pairs, real.pairs)


def _above(greater: Tensor, less: Tensor) -> Tensor:
    return F.softplus(less - greater).mean()


class Mismatched(NamedTuple):
    """The wrong captions of a batch."""

    captions: Tensor
    """Index of the wrong caption of each image among the captions of all ranks, `(B,)`."""
    images: Tensor | None
    """Indices of the images whose wrong caption is one; None for all."""
    weight: float = 1.0
    """See `WrongPairs`."""

    @classmethod
    def of(cls, captions: Tensor, device: torch.device, own: slice = slice(None)) -> "Mismatched":
        """Move indices from the CPU to a device; an image with its own index has no wrong caption.

        Args:
            captions: Indices for the images of all ranks.
            device: The device.
            own: The images of this rank.
        """
        valid = captions != torch.arange(len(captions))
        chosen, captions = valid[own], captions[own].to(device, non_blocking=True)
        weight = (chosen.sum() / len(chosen) / valid.float().mean()).item() if valid.any() else 1.0
        if chosen.all() or (valid.any() and not chosen.any()):  # ranks compute the same, if with weight 0
            return cls(captions, None, weight)
        return cls(captions, chosen.nonzero().squeeze(1).to(device, non_blocking=True), weight)


AdversarialLoss = SeparateLoss | RelativisticLoss

ADVERSARIAL: dict[str, AdversarialLoss] = {
    "bce": SeparateLoss(
        real=lambda logits: F.softplus(-logits).mean(),
        fake=lambda logits: F.softplus(logits).mean(),
        fool=lambda logits: F.softplus(-logits).mean(),
    ),
    "hinge": SeparateLoss(
        real=lambda logits: F.relu(1 - logits).mean(),
        fake=lambda logits: F.relu(1 + logits).mean(),
        fool=lambda logits: -logits.mean(),
    ),
    "relativistic": RelativisticLoss(),
}


PENALTIES = ("matching_penalty", "r1")
"""Names of the penalties on the gradients of discriminators."""


def discriminator_loss(
    loss: AdversarialLoss,
    discriminator: Discriminator,
    real: Tensor,
    fake: Tensor,
    sentence: Tensor,
    mismatched: Mismatched,
    sentences: Tensor | None = None,
) -> Tensor:
    """Return the adversarial loss of one stage's discriminator.

    Args:
        loss: The adversarial loss.
        discriminator: The stage's discriminator.
        real: Its features of real images, `(B, C, 4, 4)`.
        fake: Its features of generated images, `(B, C, 4, 4)`.
        sentence: The captions of both, `(B, E)`.
        mismatched: The wrong captions of the real images.
        sentences: The captions of all ranks, `(N, E)`; by default `sentence`.

    Returns:
        A scalar.
    """
    wrong = (sentence if sentences is None else sentences)[mismatched.captions]
    images, captions = torch.cat((real, fake)), torch.cat((sentence, sentence, wrong))
    real_pair, fake_pair, wrong_pair = discriminator.conditional(images, captions, parts=3).chunk(3)
    chosen = slice(None) if mismatched.images is None else mismatched.images
    return loss.discriminator(
        Logits(discriminator.unconditional(real), real_pair),
        Logits(discriminator.unconditional(fake), fake_pair),
        WrongPairs(real_pair[chosen], wrong_pair[chosen], mismatched.weight),
    )


def generator_loss(
    loss: AdversarialLoss, discriminator: Discriminator, fake: Tensor, real: Tensor | None, sentence: Tensor
) -> Tensor:
    """Return the adversarial loss of the generator at one stage.

    Args:
        loss: The adversarial loss.
        discriminator: The stage's discriminator.
        fake: Its features of generated images, `(B, C, 4, 4)`.
        real: Its features of real images, `(B, C, 4, 4)`, if the loss compares them with the generated ones.
        sentence: The captions of both, `(B, E)`.

    Returns:
        A scalar.
    """
    fake_logits = Logits(discriminator.unconditional(fake), discriminator.conditional(fake, sentence))
    if real is None:
        return loss.generator(fake_logits, None)
    with torch.no_grad():
        real_logits = Logits(discriminator.unconditional(real), discriminator.conditional(real, sentence))
    return loss.generator(fake_logits, real_logits)


def gradient_penalties(
    weights: DiscriminatorLosses, power: float, discriminator: Discriminator, real: Tensor, sentence: Tensor
) -> dict[str, Tensor]:
    """Return the weighted penalties on a discriminator's gradient at real images with their captions.

    The matching-aware penalty is k E[|dD/d(x, e)|^p] over image x and sentence e of the conditional logits, with
    the norm over both together that DF-GAN trains with (Tao et al. 2022, whose paper writes the sum of two norms). R1
    is gamma/2 E[|dD/dx|^2] of both logits (Mescheder et al. 2018).

    Args:
        weights: The weights k and gamma.
        power: The power p.
        discriminator: The stage's discriminator.
        real: Real images, `(B, 3, r, r)`.
        sentence: The captions of the images, `(B, E)`.

    Returns:
        By name, scalars that can be differentiated by the discriminator's weights; penalties of weight 0 are left out.
    """
    real, sentence = real.detach().requires_grad_(), sentence.detach().requires_grad_()
    features = discriminator.features(real)
    matching = discriminator.conditional(features, sentence)
    penalties = {}
    if weights.matching_penalty:
        gradients = torch.autograd.grad(matching.sum(), (real, sentence), create_graph=True)
        squared_norm = sum(gradient.flatten(1).square().sum(1) for gradient in gradients)
        penalties["matching_penalty"] = weights.matching_penalty * squared_norm.pow(power / 2).mean()
    if weights.r1:
        logits = (matching + discriminator.unconditional(features)).sum()
        (gradient,) = torch.autograd.grad(logits, real, create_graph=True)
        penalties["r1"] = weights.r1 / 2 * gradient.flatten(1).square().sum(1).mean()
    return penalties

"""GAN losses on logits, and the penalties on discriminators: what discriminators and generator minimize.

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


@dataclass
class AdversarialConfig:
    """the adversarial loss of generator and discriminators."""

    loss: Literal["bce", "hinge"] = "hinge"
    """Binary cross-entropy (AttnGAN) or hinge (DF-GAN)."""

    matching_penalty: float = 0.0
    """Weight k of the matching-aware gradient penalty (DF-GAN: 2); 0 leaves it out."""

    matching_penalty_power: float = 6.0
    """Its power p (DF-GAN: 6)."""

    r1: float = 0.0
    """Weight gamma of the R1 penalty (Mescheder et al. 2018), half of which multiplies the squared gradient."""

    augment: list[Literal["color", "translation", "cutout"]] = field(default_factory=list)
    """Changes made to real and generated images alike before they are judged (DiffAugment, Zhao et al. 2020), for small
    data sets."""

    def __post_init__(self) -> None:
        for key in ("matching_penalty", "r1"):
            if not getattr(self, key) >= 0:
                raise InputError(f"adversarial.{key} is {getattr(self, key)}: give 0 or more")
        if not self.matching_penalty_power >= 2:
            raise InputError(f"adversarial.matching_penalty_power is {self.matching_penalty_power}: give at least 2")

    @property
    def penalized(self) -> bool:
        """Whether gradients of the discriminators are themselves part of the loss."""
        return self.matching_penalty > 0 or self.r1 > 0


class AdversarialLoss(NamedTuple):
    """A recipe: three means over logits `(B,)`."""

    real: Callable[[Tensor], Tensor]
    """For the discriminator, on what it should accept."""
    fake: Callable[[Tensor], Tensor]
    """For the discriminator, on what it should reject."""
    fool: Callable[[Tensor], Tensor]
    """For the generator, on what should be accepted."""


ADVERSARIAL = {
    "bce": AdversarialLoss(
        real=lambda logits: F.softplus(-logits).mean(),
        fake=lambda logits: F.softplus(logits).mean(),
        fool=lambda logits: F.softplus(-logits).mean(),
    ),
    "hinge": AdversarialLoss(
        real=lambda logits: F.relu(1 - logits).mean(),
        fake=lambda logits: F.relu(1 + logits).mean(),
        fool=lambda logits: -logits.mean(),
    ),
}


def discriminator_loss(
    loss: AdversarialLoss, discriminator: Discriminator, real: Tensor, fake: Tensor, sentence: Tensor
) -> Tensor:
    """One stage's discriminator loss.

    Args:
        loss: The recipe.
        discriminator: The stage's discriminator.
        real: Its features of real images, `(B, C, 4, 4)`.
        fake: Its features of generated images, `(B, C, 4, 4)`.
        sentence: The captions of both, `(B, E)`.

    Returns:
        A scalar.
    """
    wrong = sentence.roll(1, dims=0)
    pairs = torch.cat((real, fake, real)), torch.cat((sentence, sentence, wrong))
    real_pair, fake_pair, wrong_pair = discriminator.conditional(*pairs, parts=3).chunk(3)
    accept = loss.real(discriminator.unconditional(real)) + loss.real(real_pair)
    reject = loss.fake(discriminator.unconditional(fake)) + loss.fake(fake_pair) + loss.fake(wrong_pair)
    return accept / 2 + reject / 3


def generator_loss(loss: AdversarialLoss, discriminator: Discriminator, fake: Tensor, sentence: Tensor) -> Tensor:
    """One stage's generator loss.

    Args:
        loss: The recipe.
        discriminator: The stage's discriminator.
        fake: Its features of generated images, `(B, C, 4, 4)`.
        sentence: Their captions, `(B, E)`.

    Returns:
        A scalar.
    """
    return loss.fool(discriminator.unconditional(fake)) + loss.fool(discriminator.conditional(fake, sentence))


def gradient_penalty(config: AdversarialConfig, discriminator: Discriminator, real: Tensor, sentence: Tensor) -> Tensor:
    """One stage's penalties on the discriminator's slope at real images with their sentences.

    The matching-aware penalty is k E[|dD/d(x, e)|^p] over image x and sentence e of the conditional logits, with
    the norm over both together that DF-GAN trains with (Tao et al. 2022, whose paper writes the sum of two norms). R1
    is gamma/2 E[|dD/dx|^2] of both logits (Mescheder et al. 2018).

    Args:
        config: Weights and power.
        discriminator: The stage's discriminator.
        real: Real images, `(B, 3, r, r)`.
        sentence: Their captions, `(B, E)`.

    Returns:
        A scalar that can be differentiated by the discriminator's weights.
    """
    real, sentence = real.detach().requires_grad_(), sentence.detach().requires_grad_()
    features = discriminator.features(real)
    matching = discriminator.conditional(features, sentence)
    penalty = real.new_zeros(())
    if config.matching_penalty:
        gradients = torch.autograd.grad(matching.sum(), (real, sentence), create_graph=True)
        squared_norm = sum(gradient.flatten(1).square().sum(1) for gradient in gradients)
        penalty = penalty + config.matching_penalty * squared_norm.pow(config.matching_penalty_power / 2).mean()
    if config.r1:
        logits = (matching + discriminator.unconditional(features)).sum()
        (gradient,) = torch.autograd.grad(logits, real, create_graph=True)
        penalty = penalty + config.r1 / 2 * gradient.flatten(1).square().sum(1).mean()
    return penalty

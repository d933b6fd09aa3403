"""GAN losses on logits: what the discriminators and the generator minimise.

A matching-aware discriminator tells three kinds of pairs from the real one: a painted picture with its caption, and a
real picture with the caption of another (Reed et al. 2016). Terms are weighted as in AttnGAN (Xu et al. 2018).
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from icsd.models import Discriminator


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
        real: Its features of real pictures, `(B, C, 4, 4)`.
        fake: Its features of painted pictures, `(B, C, 4, 4)`.
        sentence: The captions of both, `(B, E)`.

    Returns:
        A scalar.
    """
    wrong = sentence.roll(1, dims=0)
    accept = loss.real(discriminator.unconditional(real)) + loss.real(discriminator.conditional(real, sentence))
    reject = (
        loss.fake(discriminator.unconditional(fake))
        + loss.fake(discriminator.conditional(fake, sentence))
        + loss.fake(discriminator.conditional(real, wrong))
    )
    return accept / 2 + reject / 3


def generator_loss(loss: AdversarialLoss, discriminator: Discriminator, fake: Tensor, sentence: Tensor) -> Tensor:
    """One stage's generator loss.

    Args:
        loss: The recipe.
        discriminator: The stage's discriminator.
        fake: Its features of painted pictures, `(B, C, 4, 4)`.
        sentence: Their captions, `(B, E)`.

    Returns:
        A scalar.
    """
    return loss.fool(discriminator.unconditional(fake)) + loss.fool(discriminator.conditional(fake, sentence))

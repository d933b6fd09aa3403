from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from icsd.errors import InputError
from icsd.training.adversarial import (
    ADVERSARIAL,
    AdversarialConfig,
    Mismatched,
    discriminator_loss,
    generator_loss,
    gradient_penalties,
)
from icsd.training.losses import DiscriminatorLosses


class Stub:
    """A discriminator whose logits are the first feature, and with the sentence their product."""

    def unconditional(self, features):
        return features[:, 0]

    def conditional(self, features, sentence, parts=1):
        return torch.cat((features, features))[: len(sentence), 0] * sentence[:, 0]


REAL, FAKE = torch.tensor([[1.0], [2.0], [0.5]]), torch.tensor([[-1.0], [0.5], [3.0]])
SENTENCE = torch.tensor([[1.0], [-2.0], [0.5]])


def test_bce_is_binary_cross_entropy_with_logits():
    logits = torch.linspace(-30, 30, 11)
    loss = ADVERSARIAL["bce"]
    real = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    fake = F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))
    torch.testing.assert_close(loss.real(logits), real)
    torch.testing.assert_close(loss.fool(logits), real)
    torch.testing.assert_close(loss.fake(logits), fake)


def test_hinge_is_satisfied_beyond_the_margin():
    loss = ADVERSARIAL["hinge"]
    assert loss.real(torch.tensor([1.0, 5.0])) == 0
    assert loss.fake(torch.tensor([-1.0, -5.0])) == 0
    assert loss.real(torch.tensor([0.0])) == loss.fake(torch.tensor([0.0])) == 1
    assert loss.fool(torch.tensor([2.0, 4.0])) == -3


@pytest.mark.parametrize("name", ["bce", "hinge"])
def test_discriminator_loss_weighs_five_logits(name):
    loss = ADVERSARIAL[name]
    wrong = SENTENCE[[2, 0, 1]]
    mismatched = Mismatched.of(torch.tensor([2, 0, 1]), SENTENCE.device)
    expected = (loss.real(REAL[:, 0]) + loss.real((REAL * SENTENCE)[:, 0])) / 2
    expected += (loss.fake(FAKE[:, 0]) + loss.fake((FAKE * SENTENCE)[:, 0]) + loss.fake((REAL * wrong)[:, 0])) / 3
    torch.testing.assert_close(discriminator_loss(loss, Stub(), REAL, FAKE, SENTENCE, mismatched), expected)


@pytest.mark.parametrize("name", ["bce", "hinge"])
def test_generator_loss_adds_conditional_and_unconditional_logits(name):
    loss = ADVERSARIAL[name]
    expected = loss.fool(FAKE[:, 0]) + loss.fool((FAKE * SENTENCE)[:, 0])
    torch.testing.assert_close(generator_loss(loss, Stub(), FAKE, None, SENTENCE), expected)


def test_relativistic_discriminator_loss_compares_pairs():
    mismatched = Mismatched.of(torch.tensor([2, 1, 1]), SENTENCE.device)  # no wrong caption for the second image
    real, fake, wrong = REAL * SENTENCE, FAKE * SENTENCE, REAL * SENTENCE[[2, 1, 1]]
    differences = [REAL - FAKE, real - fake, (real - wrong)[[0, 2]]]
    expected = sum((1 + difference.neg().exp()).log().mean() for difference in differences)
    loss = discriminator_loss(ADVERSARIAL["relativistic"], Stub(), REAL, FAKE, SENTENCE, mismatched)
    torch.testing.assert_close(loss, expected)


def test_relativistic_generator_loss_compares_with_real_images_that_get_no_gradient():
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    expected = sum((1 + (a - b).exp()).log().mean() for a, b in [(REAL, FAKE), (REAL * SENTENCE, FAKE * SENTENCE)])
    loss = generator_loss(ADVERSARIAL["relativistic"], Stub(), fake, real, SENTENCE)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert real.grad is None
    assert (fake.grad[:, 0] != 0).all()


@pytest.mark.parametrize(("captions", "images"), [([2, 1, 1], [0, 2]), ([0, 1, 2], [])])
def test_images_without_a_wrong_caption_are_left_out(captions, images):
    loss = ADVERSARIAL["bce"]
    mismatched = Mismatched.of(torch.tensor(captions), SENTENCE.device)
    expected = (loss.real(REAL[:, 0]) + loss.real((REAL * SENTENCE)[:, 0])) / 2
    expected += (loss.fake(FAKE[:, 0]) + loss.fake((FAKE * SENTENCE)[:, 0])) / 3
    if images:
        expected += loss.fake((REAL * SENTENCE[captions])[images, 0]) / 3
    torch.testing.assert_close(discriminator_loss(loss, Stub(), REAL, FAKE, SENTENCE, mismatched), expected)


class Plane:
    """Logits that are linear in image and sentence, with gradients known by hand; `scale` is its only weight."""

    def __init__(self):
        self.scale = torch.tensor(2.0, requires_grad=True)

    def features(self, images):
        return self.scale * images.flatten(1)

    def unconditional(self, features):
        return 2 * features.sum(1)

    def conditional(self, features, sentence):
        return features.sum(1) + self.scale * sentence.sum(1)


def test_penalties_are_powers_of_the_slopes():
    images, sentences = torch.randn(5, 3, 2, 2), torch.randn(5, 4)
    both = 2**2 * (12 + 4)  # squared slope of the conditional logits by image and sentence
    weights = DiscriminatorLosses(matching_penalty=2.0, r1=10.0)
    expected = {"matching_penalty": 2 * both**3, "r1": 10 / 2 * 12 * (2 + 4) ** 2}
    for given, names in (
        (weights, ("matching_penalty", "r1")),
        (replace(weights, r1=0.0), ("matching_penalty",)),
        (replace(weights, matching_penalty=0.0), ("r1",)),
    ):
        penalties = gradient_penalties(given, 6.0, Plane(), images, sentences)
        assert {name: value.item() for name, value in penalties.items()} == pytest.approx(
            {name: expected[name] for name in names}
        )


def test_penalties_reach_the_weights():
    plane = Plane()
    penalties = gradient_penalties(
        DiscriminatorLosses(matching_penalty=1.0), 2.0, plane, torch.randn(5, 3, 2, 2), torch.randn(5, 4)
    )
    penalties["matching_penalty"].backward()
    assert plane.scale.grad.item() == pytest.approx(2 * 2 * 16)  # d/ds of 16 s^2 at s = 2


def test_a_power_below_2_is_refused():
    with pytest.raises(InputError, match=r"adversarial\.matching_penalty_power"):
        AdversarialConfig(matching_penalty_power=1.0)

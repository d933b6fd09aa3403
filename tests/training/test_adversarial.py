import pytest
import torch
from torch.nn import functional as F

from icsd.training.adversarial import ADVERSARIAL, discriminator_loss, generator_loss


class Stub:
    """Judges by the first feature, and with the sentence by their product."""

    def unconditional(self, features):
        return features[:, 0]

    def conditional(self, features, sentence):
        return features[:, 0] * sentence[:, 0]


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


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_discriminator_weighs_five_judgements(name):
    loss = ADVERSARIAL[name]
    wrong = torch.tensor([[0.5], [1.0], [-2.0]])
    expected = (loss.real(REAL[:, 0]) + loss.real((REAL * SENTENCE)[:, 0])) / 2
    expected += (loss.fake(FAKE[:, 0]) + loss.fake((FAKE * SENTENCE)[:, 0]) + loss.fake((REAL * wrong)[:, 0])) / 3
    torch.testing.assert_close(discriminator_loss(loss, Stub(), REAL, FAKE, SENTENCE), expected)


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_generator_is_judged_with_and_without_the_sentence(name):
    loss = ADVERSARIAL[name]
    expected = loss.fool(FAKE[:, 0]) + loss.fool((FAKE * SENTENCE)[:, 0])
    torch.testing.assert_close(generator_loss(loss, Stub(), FAKE, SENTENCE), expected)

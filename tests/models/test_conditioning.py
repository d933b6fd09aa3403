import torch
from torch.distributions import Normal, kl_divergence

from icsd.models.conditioning import ConditioningAugmentation, kl_to_standard_normal


def test_condition_is_a_sample_around_mu():
    torch.manual_seed(0)
    augment = ConditioningAugmentation(8, 5)
    sentence = torch.randn(1, 8)
    condition, mu, logvar = augment(sentence.expand(20_000, -1))
    assert condition.shape == mu.shape == logvar.shape == (20_000, 5)
    torch.testing.assert_close(condition.mean(0), mu[0], atol=0.05, rtol=0)
    torch.testing.assert_close(condition.var(0).log(), logvar[0], atol=0.1, rtol=0)


def test_kl_agrees_with_torch_distributions():
    torch.manual_seed(0)
    mu, logvar = torch.randn(4, 5), torch.randn(4, 5)
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_to_standard_normal(mu, logvar), expected)
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.zeros(2, 3)) == 0

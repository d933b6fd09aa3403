"""Conditioning augmentation: a smooth Gaussian around each sentence (StackGAN, Zhang et al. 2017)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConditioningAugmentation(nn.Module):
    """Sentence embedding -> a sample of N(mu, exp(logvar)).

    Args:
        sentence_dim: Width of the sentence embedding.
        condition_dim: Width of the condition.
    """

    def __init__(self, sentence_dim: int, condition_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(sentence_dim, 4 * condition_dim)

    def forward(self, sentence: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Sample one condition for each sentence.

        Args:
            sentence: `(B, E)`.
            noise: Standard normal, `(B, condition_dim)`; drawn by default.

        Returns:
            condition, mu and logvar, each `(B, condition_dim)`.
        """
        mu, logvar = F.glu(self.project(sentence), dim=1).float().chunk(2, dim=1)
        return mu + torch.exp(0.5 * logvar) * (torch.randn_like(mu) if noise is None else noise), mu, logvar


def kl_to_standard_normal(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mu, exp(logvar)) || N(0, 1)), the mean over batch and dimensions.

    Args:
        mu: `(B, C)`.
        logvar: `(B, C)`.

    Returns:
        A scalar.
    """
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).mean()

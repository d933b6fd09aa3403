"""Word attention: each pixel of a hidden map looks for the words it depends on (AttnGAN, Xu et al. 2018)."""

import torch
from torch import Tensor, nn


class WordAttention(nn.Module):
    """Attention of each pixel to the words of its own sample.

    Args:
        word_dim: Width of the word features.
        channels: Channels of the hidden map, and of the result.
    """

    def __init__(self, word_dim: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv1d(word_dim, channels, 1, bias=False)

    def forward(self, hidden: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the words.

        Args:
            hidden: `(B, channels, H, W)`.
            words: `(B, word_dim, T)`.
            mask: `(B, T)` bool, True at real words; each sample has at least one.

        Returns:
            The context, `(B, channels, H, W)`, and the attention, `(B, H, W, T)`, which is zero at padding.
        """
        batch, channels, height, width = hidden.shape
        values = self.project(words)
        pixels = hidden.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        scores = (pixels @ values).masked_fill(~mask.unsqueeze(1), float("-inf"))
        attention = torch.softmax(scores, dim=2)
        context = attention @ values.transpose(1, 2)
        return (
            context.reshape(batch, height, width, channels).permute(0, 3, 1, 2),
            attention.reshape(batch, height, width, -1),
        )

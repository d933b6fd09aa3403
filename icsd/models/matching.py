"""Image-text matching within a batch: the sentence half of DAMSM (AttnGAN, Xu et al. 2018).

AttnGAN's image encoder is an Inception network trained beforehand; here the discriminators' own features are projected
beside the sentences, and the projection learns on real images while the GAN does.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icsd.losses.gram import compute_dtype, no_autocast


class MatchingHead(nn.Module):
    """Discriminator features -> a vector beside the sentences.

    Args:
        channels: Channels of the features.
        sentence_dim: Width of the sentence features.
    """

    def __init__(self, channels: int, sentence_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(4 * 4 * channels, sentence_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map features `(B, channels, 4, 4)` to vectors `(B, sentence_dim)`."""
        return self.project(features.permute(0, 2, 3, 1).flatten(1))


def matching_loss(
    images: Tensor, sentences: Tensor, caption_ids: Tensor | None = None, *, sharpness: float = 10.0
) -> Tensor:
    """Return how far each image is from finding its sentence among those of the batch, and each sentence its image.

    Args:
        images: `(B, E)`.
        sentences: `(B, E)`, row by row those of the images.
        caption_ids: `(B,)`; images with the same number share a caption, and are no wrong answers for each other.
        sharpness: Factor on the cosines before the softmax, the paper's gamma 3.

    Returns:
        The mean cross-entropy of both directions, a scalar; log B at chance.
    """
    scores = sharpness * cosines(images, sentences)
    own = torch.arange(len(scores), device=scores.device)
    if caption_ids is not None:
        scores = scores.masked_fill(others_alike(caption_ids), -torch.inf)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def cosines(images: Tensor, sentences: Tensor) -> Tensor:
    """Return the cosines of `(I, E)` and `(C, E)`, `(I, C)`, in float32 at least, under autocast too."""
    with no_autocast(images):
        dtype = compute_dtype(images, sentences)
        images, sentences = (F.normalize(each.to(dtype), dim=1) for each in (images, sentences))
        return images @ sentences.T


def others_alike(ids: Tensor) -> Tensor:
    """Return where two different samples of `(B,)` have the same number, `(B, B)` bool, False on the diagonal."""
    return (ids[:, None] == ids).fill_diagonal_(False)

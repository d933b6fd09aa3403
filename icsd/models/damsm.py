"""DAMSM, the deep attentional multimodal similarity model of images and sentences, regions and words.

T. Xu et al., "AttnGAN: Fine-Grained Text to Image Generation with Attentional Generative Adversarial Networks", CVPR
2018, section 3.2; the numbers in brackets are its equations. All pairs of a batch are scored at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icsd.errors import InputError
from icsd.losses.gram import compute_dtype, no_autocast
from icsd.models.image_encoder import ImageEncoder, ImageFeatures
from icsd.models.matching import cosines, others_alike
from icsd.models.text import TextEncoder, TextFeatures


@dataclass
class DAMSMConfig:
    """The matching of images and sentences."""

    attention_sharpness: float = 4.0
    """Gamma 1: sharpness of the attention of a word to its best regions."""

    word_sharpness: float = 5.0
    """Gamma 2: weight of the best matching words of a sentence."""

    match_sharpness: float = 10.0
    """Gamma 3: factor on the matches before the softmax over a batch."""

    mode: Literal["paper", "code"] = "paper"
    """code leaves out the power 1/gamma2 of the paper's equation (10), as the published code does."""

    same_class_is_wrong: bool = False
    """Take captions of other images of the same class for wrong answers. Not for CUB, where they fit as well; for sets
    whose captions tell the images of a class apart."""

    def __post_init__(self) -> None:
        for key in ("attention_sharpness", "word_sharpness", "match_sharpness"):
            if not getattr(self, key) > 0:
                raise InputError(f"damsm.{key} is {getattr(self, key)}: give a positive number")


class DAMSMLosses(NamedTuple):
    """The two halves of the loss (13), each the mean over the batch of both directions' sum."""

    words: Tensor
    """L1w + L2w (12), a scalar."""
    sentence: Tensor
    """L1s + L2s, a scalar."""


class DAMSM(nn.Module):
    """A text and an image encoder of one feature space.

    Args:
        text_encoder: The text encoder.
        image_encoder: The image encoder, with features of the same width.
        config: Parameters of the matching.
    """

    def __init__(self, text_encoder: TextEncoder, image_encoder: ImageEncoder, config: DAMSMConfig) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        self.config = config

    def forward(
        self,
        images: Tensor,
        text: TextFeatures,
        class_ids: Tensor | None = None,
        caption_ids: Tensor | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> DAMSMLosses:
        """Return the `damsm_losses` of images `(B, 3, r, r)` in [-1, 1] and the features of their captions."""
        return damsm_losses(self.image_encoder(images), text, self.config, class_ids, caption_ids, gather)


def damsm_losses(
    images: ImageFeatures,
    text: TextFeatures,
    config: DAMSMConfig,
    class_ids: Tensor | None = None,
    caption_ids: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> DAMSMLosses:
    """Return how far each image is from finding its sentence among those of the batch, and each sentence its image.

    Args:
        images: Features of B images.
        text: Features of their B captions, row by row.
        config: The sharpnesses.
        class_ids: `(B,)`; other images of the same class are left out, unless `config.same_class_is_wrong`.
        caption_ids: `(B,)`; other images with the same number share a caption and are left out.
        gather: Joins the matches `(n, B)` of the images of all ranks to `(B, B)`, if this rank has n of them.

    Returns:
        The word and the sentence half; 2 log B each at chance. They are computed in float32 at least, under autocast
        too.
    """
    dtype = compute_dtype(images.whole, text.sentence)
    images = ImageFeatures(*(each.to(dtype) for each in images))
    text = text._replace(words=text.words.to(dtype))
    with no_autocast(images.whole):
        matches = [word_matches(images, text, config), cosines(images.whole, text.sentence)]
    if gather is not None:
        matches = [gather(scores) for scores in matches]
    ignored = torch.zeros_like(matches[1], dtype=torch.bool)
    for ids in (None if config.same_class_is_wrong else class_ids, caption_ids):
        if ids is not None:
            ignored |= others_alike(ids)
    return DAMSMLosses(*(_both_directions(config.match_sharpness * scores, ignored) for scores in matches))


def word_matches(images: ImageFeatures, text: TextFeatures, config: DAMSMConfig) -> Tensor:
    """Return R(Q, D) of equation (10), the match of the words of each sentence with the regions of each image.

    Args:
        images: Features of I images.
        text: Features of C captions.
        config: The sharpnesses.

    Returns:
        `(I, C)`.
    """
    words = text.words.transpose(1, 2)  # (C, T, E)
    products = torch.einsum("cte,ier->ictr", words, images.regions)  # (7)
    padding = ~text.mask[:, :, None]
    over_words = products.masked_fill(padding, -torch.inf).softmax(2)  # (8)
    attention = (config.attention_sharpness * over_words).softmax(3)  # (9)
    contexts = torch.einsum("ictr,ier->icte", attention, images.regions)
    relevance = F.cosine_similarity(contexts, words, dim=3)
    matches = (config.word_sharpness * relevance).masked_fill(~text.mask, -torch.inf).logsumexp(2)  # (10)
    return matches / config.word_sharpness if config.mode == "paper" else matches


def _both_directions(scores: Tensor, ignored: Tensor) -> Tensor:
    """Return the cross-entropy of `(B, B)` scores whose diagonal is right, over rows plus over columns (11)."""
    own = torch.arange(len(scores), device=scores.device)
    scores = scores.masked_fill(ignored, -torch.inf)
    return F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)

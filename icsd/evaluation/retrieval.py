"""R-precision: the share of images that find their caption among wrong ones.

T. Xu et al., "AttnGAN", CVPR 2018, section 4: of 100 captions, one of them the image's own, the most similar should
be that one. In the paper the encoder that compares is the one that guided training: scores of different encoders are
not comparable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from icsd.data import tokenize

ROW_BLOCK = 256
CANDIDATES = 100
"""Captions that an image has to choose from, one of which is its own."""


def r_precision(
    images: Tensor,
    sentences: Tensor,
    class_ids: Sequence[int] | None = None,
    *,
    captions: Sequence[str] | None = None,
    own: Sequence[int] | None = None,
    candidates: int = CANDIDATES,
    seed: int = 0,
) -> float:
    """Return the share of images whose own caption is the most similar of the candidates.

    Args:
        images: Features `(Q, E)`.
        sentences: Features of captions, `(P, E)`.
        class_ids: Class of each caption, if wrong captions should be of other classes as far as there are enough.
        captions: The captions, if those of the same words should not be wrong captions for each other.
        own: The number of each image's caption; by default image k has caption k.
        candidates: Captions for each image, its own included; fewer where the set holds fewer.
        seed: Seed of the choice of wrong captions.

    Returns:
        From 0 to 1; 1 / `candidates` at chance; NaN without images, or if all captions have the same words.
    """
    count = len(sentences)
    classes = torch.arange(count) if class_ids is None else torch.as_tensor(class_ids)
    first: dict[tuple[str, ...], int] = {}
    words = None if captions is None else [tuple(tokenize(caption)) for caption in captions]
    names = torch.as_tensor(range(count) if words is None else [first.setdefault(each, len(first)) for each in words])
    if not len(images) or (names == names[0]).all():
        return math.nan
    generator = torch.Generator().manual_seed(seed)
    sentences = F.normalize(sentences, dim=1)
    found = []
    numbers = torch.arange(count) if own is None else torch.as_tensor(own)
    for rows, right in zip(images.split(ROW_BLOCK), numbers.split(ROW_BLOCK), strict=True):
        cosines = (F.normalize(rows, dim=1) @ sentences.T).cpu()
        is_right = names[right, None] == names
        # A random order of the captions: those of other classes first, then those of the same, the right ones last.
        keys = torch.rand(len(rows), count, generator=generator)
        keys = keys + 1.0 * (classes[right, None] == classes) + 2.0 * is_right
        chosen = keys.topk(min(candidates - 1, count), largest=False).indices
        best = cosines.masked_fill(is_right, -torch.inf).gather(1, chosen).amax(1)
        found.append(cosines.gather(1, right[:, None])[:, 0] > best)
    return torch.cat(found).double().mean().item()

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


def r_precision(
    images: Tensor,
    sentences: Tensor,
    class_ids: Sequence[int] | None = None,
    *,
    captions: Sequence[str] | None = None,
    candidates: int = 100,
    seed: int = 0,
) -> float:
    """Return the share of images whose own caption is the most similar of the candidates.

    Args:
        images: Features `(P, E)`.
        sentences: Features of their captions, `(P, E)`, row by row.
        class_ids: Class of each, if wrong captions should be of other classes as far as there are enough.
        captions: The captions, if equal ones should not be wrong captions for each other.
        candidates: Captions for each image, its own included; fewer where the set holds fewer.
        seed: Seed of the choice of wrong captions.

    Returns:
        From 0 to 1; 1 / `candidates` at chance. Images without a wrong caption do not count; NaN if none has one.
    """
    cosines = (F.normalize(images, dim=1) @ F.normalize(sentences, dim=1).T).cpu()
    count = len(cosines)
    if not count:
        return math.nan
    classes = torch.arange(count) if class_ids is None else torch.as_tensor(class_ids)
    same_class = classes[:, None] == classes
    first: dict[str, int] = {}
    names = range(count) if captions is None else [first.setdefault(caption, len(first)) for caption in captions]
    same_caption = torch.tensor(names)[:, None] == torch.tensor(names)
    # A random order of the captions: those of other classes first, then those of the same, the right ones last.
    keys = torch.rand(count, count, generator=torch.Generator().manual_seed(seed))
    keys = keys + 1.0 * same_class + 2.0 * same_caption
    chosen = keys.argsort(1)[:, : candidates - 1]
    best = cosines.masked_fill(same_caption, -torch.inf).gather(1, chosen).amax(1)
    counted = best > -torch.inf
    return (cosines.diagonal() > best)[counted].double().mean().item()

"""R-precision: does an image find its caption among mismatched ones?

T. Xu et al., "AttnGAN", CVPR 2018, section 4: of 100 captions, one of them the image's own, the most similar should
be that one. The encoder that judges is the one that training was guided by: scores of different encoders do not
compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def r_precision(
    images: Tensor, sentences: Tensor, class_ids: Sequence[int] | None = None, *, candidates: int = 100, seed: int = 0
) -> float:
    """Share of images whose own caption is the most similar of the candidates.

    Args:
        images: Features `(P, E)`.
        sentences: Features of their captions, `(P, E)`, row by row.
        class_ids: Class of each, if mismatched captions should be of other classes as far as there are enough.
        candidates: Captions for each image, its own included; fewer where the set holds fewer.
        seed: Seed of the mismatched captions.

    Returns:
        From 0 to 1; 1 / `candidates` at chance. NaN for no images.
    """
    cosines = F.normalize(images, dim=1) @ F.normalize(sentences, dim=1).T
    count = len(cosines)
    wrong = max(min(candidates, count) - 1, 0)
    own = torch.eye(count, dtype=torch.bool)
    classes = torch.arange(count) if class_ids is None else torch.as_tensor(class_ids)
    same = classes[:, None] == classes
    # A random order of the captions: those of other classes first, then those of the same, the own one last.
    keys = torch.rand(count, count, generator=torch.Generator().manual_seed(seed)) + 1.0 * same + 1.0 * own
    mismatched = keys.argsort(1)[:, :wrong]
    best = cosines.cpu().gather(1, mismatched).amax(1) if wrong else torch.full((count,), -torch.inf)
    return (cosines.cpu().diagonal() > best).double().mean().item()

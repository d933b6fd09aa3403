"""The vision foundation model loss of VA-VAE (Yao, Yang & Wang, CVPR 2025), from the code of LightningDiT."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from icsd import ops
from icsd.compat.tokens import NORMALIZE_EPS, tokens_of_maps
from icsd.losses import SmoothL1
from icsd.losses.gram import compute_dtype, inverse_norms


class VFLoss(nn.Module):
    """The terms of the loss of VA-VAE that compare its latents with features of a foundation model.

    They are `distmat_weight` times the mean of max(|S - T| - `distmat_margin`, 0) over the cosine similarities of the
    positions of each image, plus `cos_weight` times the mean of max(1 - `cos_margin` - cos(z, f), 0) over positions.

    The arguments have the names that they have in the original's `LPIPSWithDiscriminator`.

    Raises:
        ValueError: A margin or a weight is out of range.
    """

    def __init__(
        self,
        distmat_margin: float = 0,
        cos_margin: float = 0,
        distmat_weight: float = 1.0,
        cos_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= distmat_margin < 2:
            raise ValueError(
                f"distmat_margin must be in [0, 2), got {distmat_margin!r}: similarities differ by up to 2"
            )
        if not 0 <= cos_margin < 2:
            raise ValueError(f"cos_margin must be in [0, 2), got {cos_margin!r}: 1 - cosine is at most 2")
        for name, weight in (("distmat_weight", distmat_weight), ("cos_weight", cos_weight)):
            if not -math.inf < weight < math.inf:
                raise ValueError(f"{name} must be finite, got {weight!r}")
        self.distmat_margin = distmat_margin
        self.cos_margin = cos_margin
        self.distmat_weight = distmat_weight
        self.cos_weight = cos_weight
        self.loss = SmoothL1(beta=0, margin=distmat_margin)

    def forward(self, z: Tensor, aux_feature: Tensor) -> Tensor:
        """Return the loss of latents and features `(B, C, H, W)`, which is differentiable in both.

        Raises:
            ValueError: The shapes differ, or are no shapes of maps.
        """
        tokens = tokens_of_maps("z", z), tokens_of_maps("aux_feature", aux_feature)
        if z.shape != aux_feature.shape:
            raise ValueError(
                f"z and aux_feature must have the same shape, got {tuple(z.shape)} and {tuple(aux_feature.shape)}: "
                "project the latents to the channels of the features, and resize one to the other's positions"
            )
        distances = ops.similarity_distillation_loss(*tokens, self.loss, detach_teacher=False, eps=NORMALIZE_EPS)
        units, targets = map(_unit_tokens, tokens)
        cosines = F.relu(1 - self.cos_margin - (units * targets).sum(-1)).mean()
        return self.distmat_weight * distances + self.cos_weight * cosines


def _unit_tokens(tokens: Tensor) -> Tensor:
    """Return tokens at norm 1 in compute dtype. Zeros stay zeros, and their gradient is 0."""
    tokens = tokens.to(compute_dtype(tokens))
    return tokens * inverse_norms(tokens.square().sum(-1), NORMALIZE_EPS).unsqueeze(-1)

"""Interstage cross-sample similarity distillation blocks (Mao et al. 2021, doi 10.1007/s11432-020-2900-x)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from icsd.errors import InputError
from icsd.losses import make_loss
from icsd.modules import InterstageDistillationLoss
from icsd.ops import cross_sample_similarity, flatten_samples, interstage_distillation_loss


@dataclass
class SideDistillationConfig:
    """Distillation between the stages of one side."""

    weighting: Literal["share", "weight"] = "share"
    """Meaning of losses.SIDE.distillation: with share, the norm of the distillation's gradient, divided by that of the
    gradient of the other losses, in every step; with weight, a fixed weight."""

    loss: str = "mse"
    """Loss between the similarity matrices: mse, kl, smooth_l1 or any other of docs/losses.md."""

    parameters: dict[str, float | str] = field(default_factory=dict)
    """Parameters of the loss by name, such as {"student_temperature": 0.1} for kl."""

    direction: Literal["refined-to-coarse", "coarse-to-refined"] = "refined-to-coarse"
    """refined-to-coarse has the last stage teach all others, coarse-to-refined the first one."""

    stage_weights: list[float] | None = None
    """Weights of the stages that are taught, from coarse to fine, beside the weight of the side in losses; 1 each by
    default."""

    def __post_init__(self) -> None:
        try:
            make_loss(self.loss, **self.parameters)
        except ValueError as error:
            raise InputError(f"distillation.*.loss and parameters do not fit: {error}") from error


@dataclass
class GeneratorDistillationConfig(SideDistillationConfig):
    """Distillation between the stages of the generator."""

    source: Literal["rgb", "hidden", "discriminator"] = "discriminator"
    """Features compared: the images (rgb), the generator's hidden maps (hidden), or what the discriminators see in
    the images (discriminator)."""


@dataclass
class DistillationConfig:
    """Interstage cross-sample similarity distillation; see losses for its weights."""

    generator: GeneratorDistillationConfig = field(default_factory=GeneratorDistillationConfig)
    """Distillation between the stages of the generator, on the generated images."""

    discriminator: SideDistillationConfig = field(default_factory=SideDistillationConfig)
    """Distillation between the discriminators of the stages, on their features of the real images."""


class InterstageDistillation(nn.Module):
    """The distillation block of one side: similarities between the samples of a batch should agree between the stages.

    Args:
        config: Loss, direction and weights of the stages.
    """

    def __init__(self, config: SideDistillationConfig) -> None:
        super().__init__()
        self.loss = InterstageDistillationLoss(
            make_loss(config.loss, **config.parameters),
            weights=config.stage_weights,
            teacher=-1 if config.direction == "refined-to-coarse" else 0,
        )

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """Return the loss of the student stages; the teacher stage gets no gradient.

        Args:
            stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine.

        Returns:
            A scalar.
        """
        return self.loss([flatten_samples(stage) for stage in stages])


@torch.no_grad()
def inconsistency(stages: Sequence[Tensor]) -> Tensor:
    """Return the mean of (S - T)² over the coarse stages: how much their similarities differ from the refined ones.

    Args:
        stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine, at least two stages.

    Returns:
        A scalar.
    """
    return interstage_distillation_loss([flatten_samples(stage) for stage in stages]) / (len(stages) - 1)


@torch.no_grad()
def similarity_matrices(stages: Sequence[Tensor]) -> list[Tensor]:
    """Return the similarities between the samples of a batch at each stage.

    Args:
        stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine.

    Returns:
        The cosine similarities of the samples at each stage, `(N, N)` each.
    """
    return [cross_sample_similarity(flatten_samples(stage)) for stage in stages]

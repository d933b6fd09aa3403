"""Interstage cross-sample similarity distillation blocks (Mao et al. 2021, doi 10.1007/s11432-020-2900-x)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

import icsd
from icsd.errors import InputError


@dataclass
class CSDConfig:
    """One side's distillation between the stages."""

    weight: float = 1.0
    """Weight of the loss; 0 leaves this side out."""

    divergence: Literal["mse", "kl", "smooth_l1"] = "mse"
    """Distance of the similarity matrices."""

    parameters: dict[str, float] = field(default_factory=dict)
    """Parameters of the divergence by name, such as {"student_temperature": 0.1} for kl."""

    direction: Literal["refined-to-coarse", "coarse-to-refined"] = "refined-to-coarse"
    """refined-to-coarse has the last stage teach all others, coarse-to-refined the first one."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise InputError(f"distillation weight is {self.weight}: give 0 or more")


@dataclass
class GeneratorCSDConfig(CSDConfig):
    """Distillation between the stages of the generator."""

    source: Literal["rgb", "hidden", "discriminator"] = "discriminator"
    """Features compared: the pictures (rgb), the generator's hidden maps (hidden), or what the discriminators see in
    the pictures (discriminator)."""


@dataclass
class DistillationConfig:
    """Interstage cross-sample similarity distillation."""

    enabled: bool = True
    """Whether there is any."""

    generator: GeneratorCSDConfig = field(default_factory=GeneratorCSDConfig)
    """Between the stages of the generator, on the generated pictures."""

    discriminator: CSDConfig = field(default_factory=CSDConfig)
    """Between the stages' discriminators, on their features of the real pictures."""


def rows(features: Tensor) -> Tensor:
    """A batch of maps as one row per sample, a view whether the memory is contiguous or channels_last.

    The order within a row does not matter: every sample has the same, and similarities are sums over it.

    Args:
        features: `(N, C, H, W)`.

    Returns:
        `(N, C * H * W)`.
    """
    return features.flatten(1) if features.is_contiguous() else features.permute(0, 2, 3, 1).flatten(1)


class InterstageDistillation(nn.Module):
    """The CSD block of one side: what the samples of a batch are to each other should agree between the stages.

    Args:
        config: Weight, divergence and direction.
    """

    def __init__(self, config: CSDConfig) -> None:
        super().__init__()
        self.weight = config.weight
        self.divergence = config.divergence
        self.parameters_of_divergence = dict(config.parameters)
        self.teacher = -1 if config.direction == "refined-to-coarse" else 0

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """The weighted loss of the student stages; the teacher stage gets no gradient.

        Args:
            stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine.

        Returns:
            A scalar.
        """
        return self.weight * icsd.interstage_distillation_loss(
            [rows(stage) for stage in stages], self.divergence, teacher=self.teacher, **self.parameters_of_divergence
        )


@torch.no_grad()
def similarity_matrices(stages: Sequence[Tensor]) -> list[Tensor]:
    """What the blocks compare, for looking at.

    Args:
        stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine.

    Returns:
        The cosine similarities of the samples at each stage, `(N, N)` each.
    """
    return [icsd.cross_sample_similarity(rows(stage)) for stage in stages]

"""Interstage cross-sample similarity distillation blocks (Mao et al. 2021, doi 10.1007/s11432-020-2900-x)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from icsd.errors import InputError
from icsd.losses import make_loss
from icsd.modules import InterstageDistillationLoss
from icsd.ops import cross_sample_similarity, flatten_samples


@dataclass
class CSDConfig:
    """One side's distillation between the stages."""

    weight: float = 1.0
    """Weight of the loss; 0 leaves this side out."""

    loss: str = "mse"
    """Distance of the similarity matrices: mse, kl, smooth_l1 or any other of docs/losses.md."""

    parameters: dict[str, float | str] = field(default_factory=dict)
    """Parameters of the loss by name, such as {"student_temperature": 0.1} for kl."""

    direction: Literal["refined-to-coarse", "coarse-to-refined"] = "refined-to-coarse"
    """refined-to-coarse has the last stage teach all others, coarse-to-refined the first one."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise InputError(f"distillation.*.weight is {self.weight}: give 0 or more")
        try:
            make_loss(self.loss, **self.parameters)
        except ValueError as error:
            raise InputError(f"distillation.*.loss and parameters do not fit: {error}") from error


@dataclass
class GeneratorCSDConfig(CSDConfig):
    """Distillation between the stages of the generator."""

    source: Literal["rgb", "hidden", "discriminator"] = "discriminator"
    """Features compared: the images (rgb), the generator's hidden maps (hidden), or what the discriminators see in
    the images (discriminator)."""


@dataclass
class DistillationConfig:
    """Interstage cross-sample similarity distillation."""

    enabled: bool = True
    """Whether there is any."""

    generator: GeneratorCSDConfig = field(default_factory=GeneratorCSDConfig)
    """Between the stages of the generator, on the generated images."""

    discriminator: CSDConfig = field(default_factory=CSDConfig)
    """Between the stages' discriminators, on their features of the real images."""


class InterstageDistillation(nn.Module):
    """The CSD block of one side: what the samples of a batch are to each other should agree between the stages.

    Args:
        config: Weight, loss and direction.
    """

    def __init__(self, config: CSDConfig) -> None:
        super().__init__()
        self.weight = config.weight
        teacher = -1 if config.direction == "refined-to-coarse" else 0
        self.loss = InterstageDistillationLoss(make_loss(config.loss, **config.parameters), teacher=teacher)

    def forward(self, stages: Sequence[Tensor]) -> Tensor:
        """The weighted loss of the student stages; the teacher stage gets no gradient.

        Args:
            stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine.

        Returns:
            A scalar.
        """
        return self.weight * self.loss([flatten_samples(stage) for stage in stages])


@torch.no_grad()
def similarity_matrices(stages: Sequence[Tensor]) -> list[Tensor]:
    """What the blocks compare, for looking at.

    Args:
        stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine.

    Returns:
        The cosine similarities of the samples at each stage, `(N, N)` each.
    """
    return [cross_sample_similarity(flatten_samples(stage)) for stage in stages]

"""Interstage cross-sample similarity distillation blocks (Mao et al. 2021, doi 10.1007/s11432-020-2900-x)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from icsd.errors import InputError
from icsd.losses import make_loss
from icsd.modules import InterstageDistillationLoss, SampleQueue, SimilarityDistillationLoss
from icsd.ops import (
    cross_sample_similarity,
    flatten_samples,
    interstage_distillation_loss,
    similarity_distillation_loss,
)
from icsd.ops.distributed import ProcessGroupLike, gathered


@dataclass
class SideDistillationConfig:
    """Distillation between the stages of one side."""

    weighting: Literal["share", "weight"] = "share"
    """Meaning of losses.SIDE.distillation: with share, the norm of the distillation's gradient, divided by that of the
    gradient of the other losses, in every step; with weight, a fixed weight."""

    loss: str = "mse"
    """Loss between the similarity matrices: mse, kl, smooth_l1 or any other of docs/losses.md."""

    parameters: dict[str, bool | float | str] = field(default_factory=dict)
    """Parameters of the loss by name, such as {"student_temperature": 0.1} for kl."""

    direction: Literal["refined-to-coarse", "coarse-to-refined"] = "refined-to-coarse"
    """refined-to-coarse has the last stage teach all others, coarse-to-refined the first one."""

    stage_weights: list[float] | None = None
    """Weights of the stages that are taught, from coarse to fine, beside the weight of the side in losses; 1 each by
    default."""

    center: bool = False
    """Subtract the mean of the batch from the features before they are compared."""

    queue: int = 0
    """Number of samples of earlier batches that each sample is compared with too."""

    def __post_init__(self) -> None:
        if self.queue < 0:
            raise InputError(f"distillation.*.queue is {self.queue}: give 0 or more")
        try:
            loss = make_loss(self.loss, **self.parameters)
            if self.queue:
                one = torch.ones(1, 1)
                similarity_distillation_loss(one, one, loss, student_bank=one, teacher_bank=one)  # raises
        except ValueError as error:
            raise InputError(f"distillation.*.loss, parameters and queue do not fit: {error}") from error


@dataclass
class GeneratorDistillationConfig(SideDistillationConfig):
    """Distillation between the stages of the generator."""

    source: Literal["rgb", "hidden", "discriminator"] = "discriminator"
    """Features compared: the images (rgb), the generator's hidden maps (hidden), or what the discriminators see in
    the images (discriminator)."""

    teacher: Literal["stage", "average", "real"] = "stage"
    """Features that teach: those of the teaching stage of the generator itself (stage), of the same stage of the
    generator's moving average with the same noise (average), or of the real images of the captions (real)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher == "real" and self.source == "hidden":
            raise InputError(
                "distillation.generator.teacher is real, but real images have no hidden maps: set "
                "distillation.generator.source to discriminator or rgb"
            )


@dataclass
class DistillationConfig:
    """Interstage cross-sample similarity distillation; see losses for its weights."""

    generator: GeneratorDistillationConfig = field(default_factory=GeneratorDistillationConfig)
    """Distillation between the stages of the generator, on the generated images."""

    discriminator: SideDistillationConfig = field(default_factory=SideDistillationConfig)
    """Distillation between the discriminators of the stages, on their features of the real images."""


class InterstageDistillation(nn.Module):
    """The distillation block of one side: similarities between samples should agree between the stages.

    Attributes:
        teacher: Index of the stage that teaches.
        queues: A queue of samples of earlier batches for each stage; there are none before the first batch, and none
            without `queue` in the configuration. Their samples belong to the state of training.

    Args:
        config: Loss, direction, weights of the stages and length of the queue.
        process_group: The ranks whose samples are compared with each other; by default those of this process alone.
    """

    def __init__(self, config: SideDistillationConfig, process_group: "ProcessGroupLike | None" = None) -> None:
        super().__init__()
        self.process_group = process_group
        self.teacher = -1 if config.direction == "refined-to-coarse" else 0
        self.queue = config.queue
        self.queues: list[SampleQueue] = []
        loss = make_loss(config.loss, **config.parameters)
        self.loss = InterstageDistillationLoss(
            loss,
            weights=config.stage_weights,
            teacher=self.teacher,
            center=config.center,
            process_group=process_group,
        )
        self.loss_to_banks = SimilarityDistillationLoss(loss, center=config.center, process_group=process_group)

    def forward(self, stages: Sequence[Tensor], teacher: Tensor | None = None) -> Tensor:
        """Return the loss of the student stages; the teacher gets no gradient.

        Args:
            stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine.
            teacher: Maps of the same samples that take the place of the stage that teaches.

        Returns:
            A scalar.
        """
        stages = list(stages)
        if teacher is not None:
            stages[self.teacher] = teacher
        if self.queue:  # its samples may come from maps of another memory format
            return self._loss_to_queue([stage.flatten(1) for stage in stages])
        return self.loss([flatten_samples(stage) for stage in stages])

    def _loss_to_queue(self, features: list[Tensor]) -> Tensor:
        """Compare the samples with each other and with those of the queue, to which they are added."""
        batches = [self._of_all_ranks(stage.detach()) for stage in features]
        if not self.queues:
            self.load_queued([batch[:0] for batch in batches])
        banks = []
        for queue, batch in zip(self.queues, batches, strict=True):
            banks.append(torch.cat((batch, *(samples.to(batch) for samples in queue.in_time))))
            queue.enqueue(batch)
        teacher, teacher_bank = features.pop(self.teacher), banks.pop(self.teacher)
        weights = self.loss.weights or [1.0] * len(features)
        return sum(
            weight * self.loss_to_banks(student, teacher, bank, teacher_bank)
            for weight, student, bank in zip(weights, features, banks, strict=True)
        )

    def queued(self) -> list[Tensor]:
        """Return the samples in the queue of each stage, in the order of time, as `load_queued` takes them."""
        return [torch.cat(queue.in_time) for queue in self.queues]

    def load_queued(self, samples: Sequence[Tensor]) -> None:
        """Make a queue of samples `(Q, D_i)` for each stage."""
        self.queues = [SampleQueue(self.queue, x.shape[1], device=x.device, dtype=x.dtype) for x in samples]
        for queue, x in zip(self.queues, samples, strict=True):
            queue.enqueue(x)

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        """Return the samples of all ranks, which have the same number of them."""
        return x if self.process_group is None else gathered(self.process_group, x)


@torch.no_grad()
def inconsistency(stages: Sequence[Tensor], process_group: "ProcessGroupLike | None" = None) -> Tensor:
    """Return the mean of (S - T)² over the coarse stages: how much their similarities differ from the refined ones.

    Args:
        stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine, at least two stages.
        process_group: The ranks that have the samples.

    Returns:
        A scalar.
    """
    features = [flatten_samples(stage) for stage in stages]
    return interstage_distillation_loss(features, process_group=process_group) / (len(stages) - 1)


@torch.no_grad()
def similarity_matrices(stages: Sequence[Tensor]) -> list[Tensor]:
    """Return the similarities between the samples of a batch at each stage.

    Args:
        stages: Maps `(N, C, H, W)` of the same N samples, coarse to fine.

    Returns:
        The cosine similarities of the samples at each stage, `(N, N)` each.
    """
    return [cross_sample_similarity(flatten_samples(stage)) for stage in stages]

"""The configuration of a training run. Its defaults are the emoji demo; `configs/` holds the others."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from icsd.data import DataConfig
from icsd.errors import InputError
from icsd.models import DiscriminatorConfig, DistillationConfig, GeneratorConfig, TextConfig
from icsd.training.adversarial import AdversarialConfig
from icsd.training.losses import LossesConfig


@dataclass
class OptimizerConfig:
    """The optimizers."""

    generator_lr: float = 1e-3
    """Adam's learning rate of the generator."""

    discriminator_lr: float = 1e-3
    """Adam's learning rate of the discriminators, their matching heads and the text encoder."""

    betas: tuple[float, float] = (0.0, 0.99)
    """Adam's decay rates of gradient and squared gradient."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of both learning rates after the warm-up: constant, or down to 0 at the last step, straight or on half a
    cosine."""

    warmup: int = 0
    """Steps in which both learning rates rise from nearly 0."""

    clip: float | None = None
    """Largest norm of the generator's gradient, and of the discriminators'; null leaves gradients as they are."""

    ema_decay: float = 0.99
    """Share of the old average kept at each step in the averaged model, from which all images are made."""

    def __post_init__(self) -> None:
        for key in ("generator_lr", "discriminator_lr"):
            if not getattr(self, key) > 0:
                raise InputError(f"optimizer.{key} is {getattr(self, key)}: give a positive number")
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise InputError(f"optimizer.betas holds {beta}: give two numbers in [0, 1)")
        if self.warmup < 0:
            raise InputError(f"optimizer.warmup is {self.warmup}: give 0 or more")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"optimizer.clip is {self.clip}: give a positive number, or leave it out")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"optimizer.ema_decay is {self.ema_decay}: give a number in [0, 1)")


@dataclass
class GuidanceConfig:
    """Pretrained encoders that score how well each generated image matches its sentence and its words (DAMSM)."""

    checkpoint: Path | None = None
    """Run folder or checkpoint of `icsd pretrain`. Its text encoder is used as it is, in the place of text.*, and its
    image encoder in the place of the discriminators' matching heads. None: the text encoder learns with the
    discriminators."""


@dataclass
class TrainConfig:
    """A training run."""

    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=TextConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    damsm: GuidanceConfig = field(default_factory=GuidanceConfig)
    adversarial: AdversarialConfig = field(default_factory=AdversarialConfig)
    losses: LossesConfig = field(default_factory=LossesConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    output: Path = Path("runs")
    """Folder that gets the run's folder."""

    seed: int = 0
    """Seed of initial weights, noise and order of the data."""

    steps: int = 2500
    """Training steps, each one update of the discriminators and one of the generator."""

    batch_size: int = 16
    """Images that go through the networks together; batch statistics and cross-sample relations are among these."""

    accumulate: int = 1
    """Batches per step, whose gradients are averaged."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto: cuda where there is one."""

    threads: int | None = 1
    """CPU threads; null takes all cores. One is fastest for small images, and no busy neighbor slows it down."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of activations and products; weights, losses and penalties stay float32. bf16 pays on recent CPUs and GPUs, fp16
    (with scaled losses) on older GPUs."""

    compile: bool = False
    """Whether torch.compile translates generator and discriminators, a minute or more before the first step."""

    channels_last: bool = True
    """Whether maps lie in memory pixel by pixel, which most convolutions prefer."""

    workers: int = 0
    """Processes that load data; 0 loads in the main process, best for sets held in memory."""

    log_every: int = 20
    """Steps between two lines in the metrics file."""

    sample_every: int = 250
    """Steps between two image grids."""

    checkpoint_every: int = 500
    """Steps between two checkpoints."""

    evaluate_every: int | None = None
    """Steps between two scores on held-out captions; the best model is kept as checkpoints/best.safetensors."""

    evaluate: bool = True
    """Whether a data set with attributes is scored with the attribute classifier at the end."""

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise InputError(f"batch_size is {self.batch_size}: give at least 2, relations need two images")
        for side in (self.distillation.generator, self.distillation.discriminator):
            taught = len(self.generator.resolutions) - 1
            if side.stage_weights is not None and len(side.stage_weights) != taught:
                raise InputError(f"distillation.*.stage_weights is {side.stage_weights}: give {taught} weights")
        if self.compile and self.losses.discriminator.penalized:
            raise InputError(
                "compile does not work with a gradient penalty, which needs a second derivative: leave one of them out"
            )
        for key in ("steps", "accumulate", "log_every", "sample_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}: give at least 1")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise InputError(f"evaluate_every is {self.evaluate_every}: give at least 1, or leave it out")
        if self.workers < 0:
            raise InputError(f"workers is {self.workers}: give 0 or more")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"threads is {self.threads}: give at least 1, or leave it out")

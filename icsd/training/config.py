"""The configurations of training and pretraining."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from icsd.data import DataConfig
from icsd.errors import InputError
from icsd.models import DiscriminatorConfig, DistillationConfig, GeneratorConfig, TextConfig
from icsd.models.damsm import DAMSMConfig
from icsd.models.image_encoder import ImageEncoderConfig
from icsd.training.adversarial import AdversarialConfig
from icsd.training.losses import LossesConfig

LARGEST_BATCH = 1 << 16
LARGEST_WORKERS = 256
LARGEST_THREADS = 1024


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
    """Both learning rates after the warm-up: constant, or falling to 0 at the last step, linearly or on half a
    cosine."""

    warmup: int = 0
    """Steps in which both learning rates rise from nearly 0."""

    clip: float | None = None
    """Largest norm of the generator's gradient, and of that of the discriminators; null does not clip."""

    ema_decay: float = 0.99
    """Decay rate of the moving average of the model, which generates all images."""

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
    """Run folder or checkpoint of `icsd pretrain`, or the folder of AttnGAN's released encoders. The text encoder is
    used as it is, in the place of text.*, and the image encoder in the place of the discriminators' matching heads.
    null: the text encoder learns with the discriminators."""


@dataclass
class RunConfig:
    """The keys that all runs share."""

    output: Path = Path("runs")
    """Folder that gets the run folder."""

    name: str | None = None
    """Name of the run folder, which must be new; by default that of the data set, with a number if there is one."""

    seed: int = 0
    """Seed of initial weights, noise and order of the data."""

    steps: int = 2500
    """Training steps."""

    batch_size: int = 16
    """Images that go through the networks together, on all ranks in sum."""

    device: str = "auto"
    """cpu, cuda, cuda:1, ... or auto: cuda where there is one."""

    threads: int | None = 1
    """CPU threads; null takes all cores."""

    workers: int = 0
    """Processes that load data; 0 loads in the main process."""

    log_every: int = 20
    """Steps between two lines of metrics."""

    checkpoint_every: int = 500
    """Steps between two checkpoints."""

    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    """Loggers of metrics beside metrics.jsonl: tensorboard, wandb (Weights & Biases, pip install wandb), or both."""

    def __post_init__(self) -> None:
        if self.name is not None and (not self.name.strip(". ") or Path(self.name).name != self.name):
            raise InputError(f"name is {self.name!r}: give the name of a folder, without a path")
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed is {self.seed}: give a number from 0 to 2**63 - 1")
        if self.batch_size < 2:
            raise InputError(f"batch_size is {self.batch_size}: give at least 2, losses compare images of a batch")
        if self.batch_size > LARGEST_BATCH:
            raise InputError(f"batch_size is {self.batch_size}: give at most {LARGEST_BATCH}")
        for key in ("steps", "log_every", "checkpoint_every"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}: give at least 1")
        if not 0 <= self.workers <= LARGEST_WORKERS:
            raise InputError(f"workers is {self.workers}: give a number from 0 to {LARGEST_WORKERS}")
        if self.threads is not None and not 1 <= self.threads <= LARGEST_THREADS:
            raise InputError(
                f"threads is {self.threads}: give a number from 1 to {LARGEST_THREADS}, or null for all cores"
            )


@dataclass
class TrainConfig(RunConfig):
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

    accumulate: int = 1
    """Batches per step, whose gradients are averaged; relations between images stay within a batch."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of activations and products; weights, losses and penalties stay float32. bf16 suits recent CPUs and
    GPUs, fp16 (with scaled losses) older GPUs."""

    sync_batch_norm: bool = False
    """Normalize by the statistics of the images of all ranks instead of those of each rank. Without it, training on
    several ranks differs from training on one in these statistics alone."""

    compile: bool = False
    """Compile generator and discriminators with torch.compile, which takes a minute or more before the first step. It
    cannot be combined with r1, matching_penalty or sync_batch_norm."""

    channels_last: bool = True
    """Store feature maps channels-last, which most convolutions prefer."""

    sample_every: int = 250
    """Steps between two image grids."""

    evaluate_every: int | None = None
    """Steps between two scores on held-out captions; the best model is kept as checkpoints/best.safetensors.
    The scores need pip install -e ".[evaluate]" in the checkout."""

    evaluate: bool = True
    """Score the model with an attribute classifier at the end, if the data set has attributes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        taught = len(self.generator.resolutions) - 1
        for side in (self.distillation.generator, self.distillation.discriminator):
            if side.stage_weights is not None and len(side.stage_weights) != taught:
                raise InputError(f"distillation.*.stage_weights is {side.stage_weights}: give {taught} weights")
        if self.compile and self.sync_batch_norm:
            raise InputError(
                "compile does not work with sync_batch_norm, which sends sums in between: leave one of them out"
            )
        if self.compile and self.losses.discriminator.penalized:
            raise InputError(
                "compile does not work with a gradient penalty, which needs a second derivative: leave one of them out"
            )
        sides = {side: self._weights(side) for side in ("generator", "discriminator")}
        if not any(weight for weights in sides.values() for weight in weights.values()):
            raise InputError(
                "losses.* are 0 for all losses that this run can have, so there is nothing to learn: give "
                "losses.generator.adversarial and losses.discriminator.adversarial a weight"
            )
        for side, weights in sides.items():
            share = weights.pop("distillation", 0)
            if share and getattr(self.distillation, side).weighting == "share" and not any(weights.values()):
                raise InputError(
                    f"losses.{side}.distillation is {share}, a share of the gradient of the other losses that this run "
                    f"can have ({', '.join(weights)}), which are all 0: give one of them a weight, or set "
                    f"distillation.{side}.weighting to weight"
                )
        for key in ("accumulate", "sample_every"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}: give at least 1")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise InputError(f"evaluate_every is {self.evaluate_every}: give at least 1, or leave it out")

    def _weights(self, side: str) -> dict[str, float]:
        """Return the weights of the losses of one side that this run can have, by name."""
        without = {"damsm" if self.damsm.checkpoint is None else "matching"}
        if len(self.generator.resolutions) == 1:
            without.add("distillation")
        return {name: weight for name, weight in asdict(getattr(self.losses, side)).items() if name not in without}


@dataclass
class PretrainLosses:
    """The weight of every loss; a weight of 0 leaves a loss out."""

    words: float = 1.0
    """Weight of the loss of words and regions, L1w + L2w of the paper."""

    sentence: float = 1.0
    """Weight of the loss of sentences and whole images, L1s + L2s of the paper."""

    def __post_init__(self) -> None:
        for name in ("words", "sentence"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"losses.{name} is {getattr(self, name)}: give 0, which leaves it out, or a weight")
        if not self.words + self.sentence:
            raise InputError("losses.words and losses.sentence are 0: there is nothing to learn")


@dataclass
class PretrainConfig(RunConfig):
    """A pretraining run. Its defaults are those of AttnGAN (Xu et al. 2018), except for the number of steps."""

    steps: int = 40000
    """Training steps."""

    batch_size: int = 48
    """Pairs per step; the captions of the other images are the wrong answers for an image."""

    threads: int | None = None
    """CPU threads; null takes all cores."""

    data: DataConfig = field(default_factory=DataConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(dim=256, embedding_dim=300, dropout=0.5))
    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    damsm: DAMSMConfig = field(default_factory=DAMSMConfig)
    losses: PretrainLosses = field(default_factory=PretrainLosses)

    resolution: int = 299
    """Side of the images in pixels."""

    sync_batch_norm: bool = False
    """Normalize by the statistics of the images of all ranks instead of those of each rank."""

    lr: float = 0.002
    """Adam's learning rate at the beginning."""

    lr_decay: float = 0.98
    """Factor on the learning rate after each pass over the data."""

    clip: float = 0.25
    """Largest norm of the text encoder's gradient."""

    evaluate_every: int = 500
    """Steps between two measurements of R-precision on held-out pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("resolution", "evaluate_every"):
            if getattr(self, key) < 1:
                raise InputError(f"{key} is {getattr(self, key)}: give at least 1")
        for key in ("lr", "lr_decay", "clip"):
            if not getattr(self, key) > 0:
                raise InputError(f"{key} is {getattr(self, key)}: give a positive number")

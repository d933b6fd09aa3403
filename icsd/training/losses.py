"""The weights of all losses of GAN training."""

from dataclasses import asdict, dataclass, field

from icsd.errors import InputError


@dataclass
class GeneratorLosses:
    """Weights of the generator's losses."""

    adversarial: float = 1.0
    """Weight of the adversarial loss of every stage, with and without the caption."""

    matching: float = 15.0
    """Weight of the loss by which each generated image should find its caption among those of the batch, as the
    matching heads see it; without damsm.checkpoint."""

    damsm: float = 5.0
    """Weight of the DAMSM loss of the finest images (lambda); with damsm.checkpoint."""

    condition_kl: float = 1.0
    """Weight of the KL divergence of the augmented condition from a standard normal distribution."""

    distillation: float = 0.1
    """Share or weight of the distillation between the stages of the generator; see distillation.generator."""


@dataclass
class DiscriminatorLosses:
    """Weights of the discriminators' losses."""

    adversarial: float = 1.0
    """Weight of the adversarial loss of every stage, with and without the caption."""

    matching: float = 1.0
    """Weight of the loss that teaches matching heads and text encoder on real images; without damsm.checkpoint."""

    distillation: float = 0.1
    """Share or weight of the distillation between the discriminators; see distillation.discriminator."""

    matching_penalty: float = 0.0
    """Weight k of the matching-aware gradient penalty (DF-GAN: 2)."""

    r1: float = 0.0
    """Weight gamma of the R1 penalty (Mescheder et al. 2018), half of which multiplies the squared gradient."""

    @property
    def penalized(self) -> bool:
        """True if gradients of the discriminators are themselves part of the loss."""
        return self.matching_penalty > 0 or self.r1 > 0


@dataclass
class LossesConfig:
    """The weight of every loss; a weight of 0 leaves a loss out."""

    generator: GeneratorLosses = field(default_factory=GeneratorLosses)
    discriminator: DiscriminatorLosses = field(default_factory=DiscriminatorLosses)

    ramp: int = 0
    """Steps in which the weights of matching and damsm of the generator, and those of distillation, rise from 0."""

    def __post_init__(self) -> None:
        if self.ramp < 0:
            raise InputError(f"losses.ramp is {self.ramp}: give 0 or more")
        for side in ("generator", "discriminator"):
            for name, weight in asdict(getattr(self, side)).items():
                if not 0 <= weight < float("inf"):
                    raise InputError(f"losses.{side}.{name} is {weight}: give 0, which leaves it out, or a weight")

"""The networks: text encoders, generator, discriminators and the distillation blocks between the stages."""

from icsd.models.discriminator import Discriminator, DiscriminatorConfig, build_discriminators
from icsd.models.distillation import (
    DistillationConfig,
    GeneratorDistillationConfig,
    InterstageDistillation,
    SideDistillationConfig,
    inconsistency,
    similarity_matrices,
)
from icsd.models.generator import Generator, GeneratorConfig, GeneratorOutput, image_pyramid
from icsd.models.matching import MatchingHead, matching_loss
from icsd.models.text import TextConfig, TextEncoder, TextFeatures, build_text_encoder, restore_text_encoder
from icsd.models.text_to_image import TextToImage

__all__ = [
    "Discriminator",
    "DiscriminatorConfig",
    "DistillationConfig",
    "Generator",
    "GeneratorConfig",
    "GeneratorDistillationConfig",
    "GeneratorOutput",
    "InterstageDistillation",
    "MatchingHead",
    "SideDistillationConfig",
    "TextConfig",
    "TextEncoder",
    "TextFeatures",
    "TextToImage",
    "build_discriminators",
    "build_text_encoder",
    "image_pyramid",
    "inconsistency",
    "matching_loss",
    "restore_text_encoder",
    "similarity_matrices",
]

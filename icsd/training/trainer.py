"""One training step, from captions to losses."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from icsd.errors import InputError
from icsd.models import (
    CSDConfig,
    GeneratorOutput,
    InterstageDistillation,
    MatchingHead,
    TextEncoder,
    TextToImage,
    build_discriminators,
    image_pyramid,
    matching_loss,
)
from icsd.models.conditioning import kl_to_standard_normal
from icsd.training.adversarial import ADVERSARIAL, discriminator_loss, generator_loss
from icsd.training.config import TrainConfig


def choose_device(name: str) -> torch.device:
    """The device a configuration names.

    Raises:
        InputError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}, which is not available here: give cpu, cuda or auto") from error


class Trainer:
    """Networks, averages and optimisers, and the step that trains them.

    Attributes:
        model: Text encoder and generator in training.
        ema: Their moving average, buffers too; the one to paint with.
        discriminators: One per stage.
        matching: Their matching heads.
        step_count: Steps taken so far.

    Args:
        config: The whole configuration.
        text_encoder: Reads the captions; trained with the discriminators.
    """

    def __init__(self, config: TrainConfig, text_encoder: TextEncoder) -> None:
        self.config = config
        self.device = choose_device(config.device)
        self.resolutions = config.generator.resolutions
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = TextToImage(text_encoder, config.generator).to(self.device, memory_format=layout)
        self.discriminators = build_discriminators(config.discriminator, self.resolutions, text_encoder.dim)
        self.discriminators.to(self.device, memory_format=layout)
        channels = [discriminator.channels for discriminator in self.discriminators]
        self.matching = nn.ModuleList(MatchingHead(width, text_encoder.dim) for width in channels)
        self.matching.to(self.device, memory_format=layout)
        average = get_ema_multi_avg_fn(config.optimiser.ema_decay)
        self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.adversarial = ADVERSARIAL[config.optimiser.adversarial]
        self.distil_generator = self._distillation(config.distillation.generator)
        self.distil_discriminators = self._distillation(config.distillation.discriminator)
        options = config.optimiser
        self.generator_optimiser = torch.optim.Adam(
            self.model.generator.parameters(), options.generator_lr, options.betas
        )
        judges = (self.discriminators, self.matching, text_encoder)
        self.discriminator_optimiser = torch.optim.Adam(
            [weight for module in judges for weight in module.parameters()], options.discriminator_lr, options.betas
        )
        self.step_count = 0

    def _distillation(self, side: CSDConfig) -> InterstageDistillation | None:
        """The block of one side, or None where it would do nothing."""
        active = self.config.distillation.enabled and side.weight > 0 and len(self.resolutions) > 1
        return InterstageDistillation(side) if active else None

    def step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Updates the discriminators and the text encoder, then the generator, then the average.

        Args:
            batch: "image", `(B, 3, r, r)` in [-1, 1] at the finest side, and "caption", B sentences.

        Returns:
            Losses by name: scalars on the device, without graph.
        """
        images = image_pyramid(batch["image"].to(self.device), self.resolutions)
        text = self.model.text_encoder(batch["caption"])
        z = torch.randn(len(images[0]), self.model.generator.noise_dim, device=self.device)
        painted = self.model.generator(z, text.detach())

        losses = self._discriminator_losses(images, painted.images, text.sentence)
        self._update(self.discriminator_optimiser, losses)

        self._freeze_judges(True)
        generator_losses = self._generator_losses(painted, text.sentence.detach())
        self._update(self.generator_optimiser, generator_losses)
        self._freeze_judges(False)

        self.ema.update_parameters(self.model)
        self.step_count += 1
        return {name: loss.detach() for name, loss in (losses | generator_losses).items()}

    def _discriminator_losses(self, images: list[Tensor], painted: list[Tensor], sentence: Tensor) -> dict[str, Tensor]:
        real = [d.features(image) for d, image in zip(self.discriminators, images, strict=True)]
        fake = [d.features(image.detach()) for d, image in zip(self.discriminators, painted, strict=True)]
        losses = {
            f"discriminator/{side}": discriminator_loss(self.adversarial, *stage, sentence)
            for side, *stage in zip(self.resolutions, self.discriminators, real, fake, strict=True)
        }
        losses["discriminator/matching"] = self._matching(real, sentence)
        if self.distil_discriminators:
            losses["discriminator/csd"] = self.distil_discriminators(real)
        return losses

    def _generator_losses(self, painted: GeneratorOutput, sentence: Tensor) -> dict[str, Tensor]:
        fake = [d.features(image) for d, image in zip(self.discriminators, painted.images, strict=True)]
        losses = {
            f"generator/{side}": generator_loss(self.adversarial, *stage, sentence)
            for side, *stage in zip(self.resolutions, self.discriminators, fake, strict=True)
        }
        losses["generator/matching"] = self.config.optimiser.matching_weight * self._matching(fake, sentence)
        losses["generator/kl"] = self.config.optimiser.kl_weight * kl_to_standard_normal(painted.mu, painted.logvar)
        if self.distil_generator:
            sources = {"rgb": painted.images, "hidden": painted.hidden, "discriminator": fake}
            losses["generator/csd"] = self.distil_generator(sources[self.config.distillation.generator.source])
        return losses

    def _matching(self, features: list[Tensor], sentence: Tensor) -> Tensor:
        """The stages' matching losses together."""
        return sum(matching_loss(head(stage), sentence) for head, stage in zip(self.matching, features, strict=True))

    def _freeze_judges(self, frozen: bool) -> None:
        """Spares the generator's backward pass the gradients of what judges it."""
        self.discriminators.requires_grad_(not frozen)
        self.matching.requires_grad_(not frozen)

    @staticmethod
    def _update(optimiser: torch.optim.Optimizer, losses: dict[str, Tensor]) -> None:
        optimiser.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimiser.step()

    def paint(self, captions: list[str], seed: int = 0) -> list[Tensor]:
        """Paints captions with the averaged model; see `TextToImage.paint`."""
        return self.ema.module.paint(captions, seed)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on but configuration and data: nested dicts of tensors and JSON values.

        Returns:
            Among others "text", the text encoder's description, and "ema", the state of the `TextToImage` that paints.
        """
        state = {
            "step": self.step_count,
            "text": self.model.text_encoder.description(),
            "ema": self.ema.module.state_dict(),
            "model": self.model.state_dict(),
            "discriminators": self.discriminators.state_dict(),
            "matching": self.matching.state_dict(),
            "generator_optimiser": self.generator_optimiser.state_dict()["state"],
            "discriminator_optimiser": self.discriminator_optimiser.state_dict()["state"],
            "rng": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, on a trainer of the same configuration and vocabulary.

        Args:
            state: What `state_dict` gave.
        """
        self.step_count = state["step"]
        self.ema.module.load_state_dict(state["ema"])
        self.ema.n_averaged.fill_(self.step_count)
        self.model.load_state_dict(state["model"])
        self.discriminators.load_state_dict(state["discriminators"])
        self.matching.load_state_dict(state["matching"])
        for name in ("generator_optimiser", "discriminator_optimiser"):
            optimiser = getattr(self, name)
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": state[name], "param_groups": groups})
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

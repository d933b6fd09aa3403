"""A step of GAN training, from captions to losses."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from icsd.errors import InputError
from icsd.models import (
    GeneratorOutput,
    InterstageDistillation,
    MatchingHead,
    SideDistillationConfig,
    TextEncoder,
    TextFeatures,
    TextToImage,
    build_discriminators,
    image_pyramid,
    inconsistency,
    matching_loss,
)
from icsd.models.batch_norm import normalize_over_ranks
from icsd.models.conditioning import kl_to_standard_normal
from icsd.models.damsm import DAMSM
from icsd.team import Team
from icsd.training.adversarial import (
    ADVERSARIAL,
    PENALTIES,
    Mismatched,
    discriminator_loss,
    generator_loss,
    gradient_penalties,
)
from icsd.training.augment import augment
from icsd.training.balance import BalancedLosses
from icsd.training.batches import Batch
from icsd.training.checkpoint import load_adam, load_module
from icsd.training.config import OptimizerConfig, TrainConfig
from icsd.training.launch import check_share
from icsd.training.parts import REST, part
from icsd.training.randomness import random_state, restore_random_state

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device that a configuration names.

    Raises:
        InputError: There is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        device = torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}, which is not available here: give cpu, cuda or auto") from error
    if device.type == "meta":
        raise InputError("device is 'meta', which computes nothing: give cpu, cuda or auto")
    return device


def learning_rate_factor(config: OptimizerConfig, steps: int, step: int) -> float:
    """Return the factor on a learning rate.

    Args:
        config: Schedule and warm-up.
        steps: Steps of the whole training.
        step: Steps taken.

    Returns:
        A number in [0, 1].
    """
    warmth = min(1.0, (step + 1) / (config.warmup + 1))
    done = min(1.0, max(0.0, (step - config.warmup) / max(1, steps - config.warmup)))
    return warmth * {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]


class Generated(NamedTuple):
    """Generated images of a micro-batch."""

    output: GeneratorOutput
    """The output of the generator in training."""
    averaged: GeneratorOutput | None
    """That of its moving average from the same noise, without graph, if it teaches."""


class MicroBatch(NamedTuple):
    """A batch as the losses take it, on the device."""

    real: list[Tensor]
    """Real images of every stage."""
    text: TextFeatures
    """Features of the captions."""
    everyone: TextFeatures
    """Features of the captions of all ranks. Each rank encodes them all, so all draw the same dropout."""
    class_ids: Tensor
    """Classes of the images of all ranks, `(N,)`."""
    caption_ids: Tensor
    """`(N,)`, equal for captions of the same words."""
    mismatched: Mismatched
    """Wrong captions of the images."""


class Trainer:
    """The networks, their averages and optimizers, and the step that trains them.

    Attributes:
        model: Text encoder and generator in training.
        ema: The moving average of both, buffers too; the one to generate with.
        discriminators: One per stage.
        matching: The matching heads of the discriminators; none with DAMSM.
        step_count: Steps taken so far.

    Args:
        config: The whole configuration.
        text_encoder: The text encoder, trained with the discriminators unless it is frozen.
        damsm: Frozen encoders, of which `text_encoder` is one, for the DAMSM loss of the generated images.
        team: The ranks that train together; by default, this process alone.
    """

    def __init__(
        self, config: TrainConfig, text_encoder: TextEncoder, damsm: DAMSM | None = None, team: Team | None = None
    ) -> None:
        self.config = config
        self.team = team or Team()
        check_share(config, self.team)
        self.device = choose_device(config.device)
        self.resolutions = config.generator.resolutions
        self.layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = self._placed(TextToImage(text_encoder, config.generator))
        self.discriminators = self._placed(
            build_discriminators(config.discriminator, self.resolutions, text_encoder.dim)
        )
        self.damsm = None if damsm is None else self._placed(damsm)
        channels = [discriminator.channels for discriminator in self.discriminators if damsm is None]
        self.matching = self._placed(nn.ModuleList(MatchingHead(width, text_encoder.dim) for width in channels))
        self.ema = AveragedModel(self.model, multi_avg_fn=self._average, use_buffers=True).eval()
        if config.sync_batch_norm and self.team.size > 1:  # not in the average, which never normalizes by a batch
            for network in (self.model, self.discriminators):
                normalize_over_ranks(network, self.team.ranks)
        self.adversarial = ADVERSARIAL[config.adversarial.loss]
        weights, sides = config.losses, config.distillation
        self.generator_distillation = self._distillation(weights.generator.distillation, sides.generator)
        self.discriminator_distillation = self._distillation(weights.discriminator.distillation, sides.discriminator)
        self.measured: dict[str, Tensor] = {}
        networks = nn.ModuleList([self.discriminators, self.matching, *([] if text_encoder.frozen else [text_encoder])])
        self.generator_optimizer = self._optimizer(self.model.generator, config.optimizer.generator_lr)
        self.discriminator_optimizer = self._optimizer(networks, config.optimizer.discriminator_lr)
        self.schedules = self._schedules()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.generator_losses = self._balanced("generator", {"generator": self.model.generator})
        discriminators = zip(self.resolutions, self.discriminators, strict=True)
        self.discriminator_losses = self._balanced(
            "discriminator", {f"discriminator/{resolution}": network for resolution, network in discriminators}
        )
        self.step_count = 0
        if config.compile:
            torch._functorch.config.donated_buffer = False  # a compiled graph is differentiated loss by loss
            self.model.generator.compile()
            for discriminator in self.discriminators:
                discriminator.compile_heads()

    def _placed(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, memory_format=self.layout)

    def _optimizer(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr, self.config.optimizer.betas, fused=True)

    def _schedules(self, last_step: int = -1) -> list[LambdaLR]:
        course = functools.partial(learning_rate_factor, self.config.optimizer, self.config.steps)
        optimizers = (self.generator_optimizer, self.discriminator_optimizer)
        return [LambdaLR(optimizer, course, last_step) for optimizer in optimizers]

    def _distillation(self, weight: float, side: SideDistillationConfig) -> InterstageDistillation | None:
        """Return the distillation block of one side, or None where it would do nothing."""
        if weight <= 0 or len(self.resolutions) == 1:
            return None
        return InterstageDistillation(side, self.team.process_group)

    def _blocks(self) -> dict[str, InterstageDistillation]:
        """Return the distillation blocks by their side."""
        blocks = {"generator": self.generator_distillation, "discriminator": self.discriminator_distillation}
        return {side: block for side, block in blocks.items() if block is not None}

    def _balanced(self, side: str, networks: dict[str, nn.Module]) -> BalancedLosses:
        """Return the losses of one side, among them a distillation with a weight or a share."""
        by_share = getattr(self.config.distillation, side).weighting == "share"
        shares = {"distillation": getattr(self.config.losses, side).distillation} if by_share else {}
        weights = {name: list(network.parameters()) for name, network in networks.items()}
        return BalancedLosses(weights, shares)

    def parts(self) -> list[str]:
        """Return the names of the parts of a step, see `icsd.training.parts`, in the order in which they are shown."""
        discriminators = [f"discriminator {resolution}" for resolution in self.resolutions]
        matching = "matching" if self.damsm is None else "DAMSM"
        return ["text encoder", "generator", *discriminators, "distillation", matching, "average"]

    @part(REST)
    def step(self, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Update the discriminators and the text encoder, then the generator, then the average.

        Args:
            batches: One batch for each that the configuration accumulates, with images of the finest resolution.

        Returns:
            Weighted losses by name, their means over the batches: scalars on the device, without graph.
        """
        self.measured = {}
        micro_batches = [self._read(batch) for batch in batches]
        generate_once = len(micro_batches) == 1  # the graphs of several would not fit into memory
        for number, micro_batch in enumerate(micro_batches, 1):
            text = micro_batch.text
            with self._autocast(), torch.set_grad_enabled(generate_once):
                generated = self._generate(text)
            with self._autocast():
                terms = self._discriminator_losses(micro_batch, generated.output.images)
            arrive = self._backward(self.discriminator_losses, terms, number == len(micro_batches))
        losses = self._update("discriminator", self.discriminator_losses, self.discriminator_optimizer, arrive)

        self._freeze_discriminators(True)
        for number, micro_batch in enumerate(micro_batches, 1):
            micro_batch = micro_batch._replace(text=micro_batch.text.detach(), everyone=micro_batch.everyone.detach())
            with self._autocast():
                generated = generated if generate_once else self._generate(micro_batch.text)
                terms = self._generator_losses(generated, micro_batch)
            arrive = self._backward(self.generator_losses, terms, number == len(micro_batches))
        losses |= self._update("generator", self.generator_losses, self.generator_optimizer, arrive)
        self._freeze_discriminators(False)

        self.scaler.update()
        for schedule in self.schedules:
            schedule.step()
        with part("average"):
            self.team.average(self._buffers())
            self.ema.update_parameters(self.model)
        self.step_count += 1
        return losses

    @property
    def _measures(self) -> bool:
        """Return whether the numbers of `measured` are taken in this step."""
        step = self.step_count + 1
        return step % self.config.log_every == 0 or step == self.config.steps

    @property
    def _average_teaches(self) -> bool:
        """Return whether the moving average of the generator teaches its stages."""
        return self.generator_distillation is not None and self.config.distillation.generator.teacher == "average"

    @property
    def _ramp(self) -> float:
        """Return the factor on the weights or shares of the losses that rise from 0 at the beginning."""
        return min(1.0, (self.step_count + 1) / (self.config.losses.ramp + 1))

    def _read(self, batch: Batch) -> MicroBatch:
        """Move a batch to the device, reduce its images and encode its captions."""
        images = batch.images.to(self.device, memory_format=self.layout, non_blocking=True)
        with part("text encoder"):
            everyone = self.model.text_encoder(batch.ids, batch.lengths)
        own = self.team.own(len(batch.captions))
        return MicroBatch(
            real=image_pyramid(images, self.resolutions),
            text=everyone if self.team.size == 1 else TextFeatures(*(each[own] for each in everyone)),
            everyone=everyone,
            class_ids=batch.class_ids.to(self.device, non_blocking=True),
            caption_ids=batch.caption_ids.to(self.device, non_blocking=True),
            mismatched=Mismatched.of(batch.mismatched, self.device, own),
        )

    def _generate(self, text: TextFeatures) -> Generated:
        size, generator = len(text.sentence) * self.team.size, self.model.generator
        # Drawn outside: a compiled graph that draws noise has other gradients when it is differentiated again.
        # Each rank draws the noise of the images of all ranks, so its own get what one process would give them.
        z, condition = (
            torch.randn(size, dim, device=self.device)[self.team.own(size)]
            for dim in (generator.noise_dim, generator.condition_dim)
        )
        text, averaged = text.detach(), None
        with part("generator"):
            output = generator(z, text, condition)
            if self._average_teaches and torch.is_grad_enabled():
                with torch.no_grad():
                    averaged = self.ema.module.generator(z, text, condition)
        return Generated(output, averaged)

    def _discriminator_losses(self, batch: MicroBatch, generated: list[Tensor]) -> dict[str, Tensor]:
        """Return the weighted losses of the discriminators by name."""
        weights, sentence = self.config.losses.discriminator, batch.text.sentence
        kinds = self.config.adversarial.augment
        real, generated = (
            augment(images, kinds, self.team) for images in (batch.real, [image.detach() for image in generated])
        )
        pairs = []
        for resolution, discriminator, *images in zip(
            self.resolutions, self.discriminators, real, generated, strict=True
        ):
            both = torch.cat([each.to(images[0].dtype) for each in images])
            with part(f"discriminator {resolution}"):
                pairs.append(discriminator.features(both, parts=2).chunk(2))
        losses = {}
        if weights.adversarial:
            for resolution, discriminator, pair in zip(self.resolutions, self.discriminators, pairs, strict=True):
                with part(f"discriminator {resolution}"):
                    loss = discriminator_loss(
                        self.adversarial, discriminator, *pair, sentence, batch.mismatched, batch.everyone.sentence
                    )
                losses[f"adversarial/{resolution}"] = weights.adversarial * loss
        seen = [features for features, _ in pairs]
        if self.damsm is None and weights.matching:
            with part("matching"):
                losses["matching"] = weights.matching * self._matching(seen, batch)
        with part("distillation"):
            losses |= self._distill("discriminator", self.discriminator_distillation, seen)
        if weights.penalized:
            losses |= self._penalties(real, sentence)
        return losses

    def _penalties(self, real: list[Tensor], sentence: Tensor) -> dict[str, Tensor]:
        """Return the weighted penalties of all discriminators by name, computed in float32."""
        weights, options = self.config.losses.discriminator, self.config.adversarial
        if (self.step_count + 1) % options.penalty_every:
            return {name: torch.zeros((), device=self.device) for name in PENALTIES if getattr(weights, name)}
        total = Counter()
        with torch.autocast(self.device.type, enabled=False):
            for resolution, discriminator, images in zip(self.resolutions, self.discriminators, real, strict=True):
                with part(f"discriminator {resolution}"):
                    power = options.matching_penalty_power
                    total.update(gradient_penalties(weights, power, discriminator, images, sentence))
        return {name: options.penalty_every * penalty for name, penalty in total.items()}

    def _generator_losses(self, generated: Generated, batch: MicroBatch) -> dict[str, Tensor]:
        """Return the weighted losses of the generator by name."""
        weights, text, (output, averaged) = self.config.losses.generator, batch.text, generated
        teaching = self._teaching_images(averaged, batch.real)
        shown = augment([*output.images, *teaching], self.config.adversarial.augment, self.team)
        fake, seen = self._features(shown[: len(self.resolutions)]), shown[len(self.resolutions) :]
        losses = {}
        if weights.adversarial:
            real = self._features_of_real(batch.real)
            for resolution, *stage in zip(self.resolutions, self.discriminators, fake, real, strict=True):
                with part(f"discriminator {resolution}"):
                    loss = generator_loss(self.adversarial, *stage, text.sentence)
                losses[f"adversarial/{resolution}"] = weights.adversarial * loss
        if self.damsm is None and weights.matching:
            with part("matching"):
                losses["matching"] = self._ramp * weights.matching * self._matching(fake, batch)
        if self.damsm is not None and weights.damsm:
            images = output.images[-1].float()
            with part("DAMSM"):
                loss = sum(self.damsm(images, batch.everyone, batch.class_ids, batch.caption_ids, self._gathered))
            losses["damsm"] = self._ramp * weights.damsm * loss
        if weights.condition_kl:
            losses["condition_kl"] = weights.condition_kl * kl_to_standard_normal(output.mu, output.logvar)
        sources = {"rgb": output.images, "hidden": output.hidden, "discriminator": fake}
        stages = sources[self.config.distillation.generator.source]
        teacher = self._teacher(averaged, teaching, seen)
        with part("distillation"):
            losses |= self._distill("generator", self.generator_distillation, stages, teacher)
        return losses

    def _teaching_images(self, averaged: GeneratorOutput | None, real: list[Tensor]) -> list[Tensor]:
        """Return the images of every stage that teach the generator, none if its own stage does."""
        if self.generator_distillation is None or self.config.distillation.generator.teacher == "stage":
            return []
        return real if averaged is None else averaged.images

    @torch.no_grad()
    def _teacher(self, averaged: GeneratorOutput | None, teaching: list[Tensor], seen: list[Tensor]) -> Tensor | None:
        """Return the features that teach the generator; None for those of its own stage.

        Args:
            averaged: Output of the moving average, if it teaches.
            teaching: The images that teach.
            seen: The same as the discriminators see them.
        """
        if not teaching:
            return None
        source, stage = self.config.distillation.generator.source, self.generator_distillation.teacher
        if source == "hidden":
            return averaged.hidden[stage]
        return teaching[stage] if source == "rgb" else self.discriminators[stage].features(seen[stage])

    def _distill(
        self,
        side: str,
        distillation: InterstageDistillation | None,
        stages: list[Tensor],
        teacher: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of the distillation between the stages of one side, and measure their inconsistency."""
        if self._measures and len(stages) > 1:
            self.measured[f"inconsistency/{side}"] = inconsistency(stages, self.team.process_group)
        if distillation is None:
            return {}
        loss = distillation(stages, teacher)
        if getattr(self.config.distillation, side).weighting == "weight":
            loss = self._ramp * getattr(self.config.losses, side).distillation * loss
        return {"distillation": loss}

    def _features(self, images: list[Tensor]) -> list[Tensor]:
        """Return the discriminators' features of the images of all stages."""
        features = []
        for resolution, discriminator, stage in zip(self.resolutions, self.discriminators, images, strict=True):
            with part(f"discriminator {resolution}"):
                features.append(discriminator.features(stage))
        return features

    @torch.no_grad()
    def _features_of_real(self, real: list[Tensor]) -> list[Tensor | None]:
        """Return the discriminators' features of real images if the adversarial loss of the generator needs them."""
        if not self.adversarial.compares:
            return [None] * len(real)
        return self._features(augment(real, self.config.adversarial.augment, self.team))

    def _matching(self, features: list[Tensor], batch: MicroBatch) -> Tensor:
        """Return the sum of the stages' matching losses."""
        return sum(
            matching_loss(self._gathered(head(stage)), batch.everyone.sentence, batch.caption_ids)
            for head, stage in zip(self.matching, features, strict=True)
        )

    def _gathered(self, x: Tensor) -> Tensor:
        """Return the rows of the images of all ranks, `(N, ...)` of `(n, ...)`."""
        return self.team.samples(x)

    def _buffers(self) -> list[Tensor]:
        """Return the statistics of the batches, which are averaged over the ranks."""
        buffers = (buffer for network in (self.model, self.discriminators) for buffer in network.buffers())
        return [buffer for buffer in buffers if buffer.is_floating_point()]

    def _freeze_discriminators(self, frozen: bool) -> None:
        """Freeze the discriminators, whose gradients the generator's update does not need."""
        self.discriminators.requires_grad_(not frozen)
        self.matching.requires_grad_(not frozen)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, PRECISIONS[self.config.precision], self.config.precision != "fp32")

    def _backward(self, losses: BalancedLosses, terms: dict[str, Tensor], last: bool) -> Callable[[], None] | None:
        """Accumulate the gradient of a micro-batch's losses.

        In the last one, the gradients of single losses travel to the other ranks during the backward pass of the rest.
        The result is the function that waits for them then.
        """
        arrivals = []

        def send(kept: list[Tensor]) -> None:
            arrivals.append(self.team.start_average(kept))

        averaged = {name: loss / self.config.accumulate for name, loss in terms.items()}
        losses.backward(averaged, self.scaler, self._measures, send if last else None)
        return arrivals[0] if last else None

    def _update(
        self, side: str, losses: BalancedLosses, optimizer: torch.optim.Optimizer, arrive: Callable[[], None]
    ) -> dict[str, Tensor]:
        """Take a step of an optimizer; return the weighted losses of the step, named by their side.

        Args:
            side: "generator" or "discriminator".
            losses: Its losses and gradients.
            optimizer: Its optimizer.
            arrive: See `_backward`.
        """
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        arrive()
        self.team.average([weight.grad for weight in weights if weight.grad is not None])
        losses.balance(self._ramp)
        if self._measures:
            self.measured |= {f"share/{name}": share for name, share in losses.measured().items()}
        self._apply_gradient(optimizer)
        return {f"{side}/{name}": loss for name, loss in losses.take().items()}

    def _apply_gradient(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights; without any loss there is no gradient, and they stay as they are."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if all(weight.grad is None for weight in weights):
            optimizer.step()
            return
        if self.config.optimizer.clip is not None:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(weights, self.config.optimizer.clip)
        self.scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)

    def _average(self, averages: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
        """Move the averages of weights or buffers towards their values, faster in the first steps."""
        decay = min(self.config.optimizer.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        get_ema_multi_avg_fn(decay)(averages, values, count)

    def measurements(self) -> dict[str, float]:
        """Return further numbers of the last step, if it is one with a line of metrics.

        Returns:
            By `share/NETWORK/LOSS`, the share of each loss in the gradient of each network (see
            `icsd.training.balance`); by `inconsistency/SIDE`, the mean (S - T)² between the coarse stages and the
            refined one of the features that the distillation of this side compares.
        """
        values = {name: value.item() for name, value in self.measured.items()}
        return {name: value for name, value in values.items() if math.isfinite(value)}

    def generate(self, captions: list[str], seed: int = 0) -> list[Tensor]:
        """Generate images of captions with the averaged model; see `TextToImage.generate`."""
        return self.ema.module.generate(captions, seed)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of model, discriminators and matching heads with their names."""
        for network in (self.model, self.discriminators, self.matching):
            yield from network.named_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on except configuration and data: tensors and JSON values.

        Returns:
            Among others "text", the text encoder's description, and "ema", the averaged `TextToImage`.
        """
        return {
            "step": self.step_count,
            "text": self.model.text_encoder.description(),
            "ema": self.ema.module.state_dict(),
            "model": self.model.state_dict(),
            "discriminators": self.discriminators.state_dict(),
            "matching": self.matching.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict()["state"],
            "discriminator_optimizer": self.discriminator_optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "queued_samples": {side: block.queued() for side, block in self._blocks().items()},
            "random": random_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, on a trainer of the same configuration and vocabulary.

        Args:
            state: The result of `state_dict`.
        """
        self.step_count = state["step"]
        load_module(self.ema.module, state["ema"], "ema")
        self.ema.n_averaged.fill_(self.step_count)
        for name in ("model", "discriminators", "matching"):
            load_module(getattr(self, name), state[name], name)
        for name in ("generator_optimizer", "discriminator_optimizer"):
            optimizer = getattr(self, name)
            load_adam(optimizer, state[name], name)
            for weight, moments in optimizer.state.items():  # the fused kernel expects one memory layout
                aligned = {key: torch.empty_like(weight).copy_(moments[key]) for key in ("exp_avg", "exp_avg_sq")}
                moments.update(aligned)
        self.schedules = self._schedules(self.step_count - 1)  # of this configuration, whose rates may be new
        if state["scaler"]:  # that of a run in another precision is empty, and the losses are scaled anew
            self.scaler.load_state_dict(state["scaler"])
        for side, samples in state.get("queued_samples", {}).items():
            self._blocks()[side].load_queued([stage.to(self.device) for stage in samples])
        restore_random_state(state["random"], self.device)

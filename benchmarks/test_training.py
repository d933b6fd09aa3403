"""Training steps: of the emoji demo with the part that is distillation, and of the field's scale beside AttnGAN's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

import icsd
from benchmarks.attngan_step import RESOLUTIONS, AttnGANStep
from benchmarks.workloads import in_turns
from icsd.cli.configuration import load_configuration
from icsd.models import build_text_encoder
from icsd.training.batches import Batch
from icsd.training.config import TrainConfig
from icsd.training.trainer import Trainer

CAPTION = "a woman with dark skin, firefighter"
BACKENDS = ["cpu", "reference"]
BIRDS = Path(__file__).parents[1] / "configs" / "birds.yaml"
FIELD = ["icsd", "icsd fp32", "attngan bf16", "attngan", "attngan 3 passes"]


class Training:
    """A trainer on one batch, and what its distillation blocks were given in the first step."""

    def __init__(self) -> None:
        config = TrainConfig(device="cpu")
        torch.manual_seed(0)
        self.trainer = Trainer(config, build_text_encoder(config.text, [CAPTION]))
        side = config.generator.resolutions[-1]
        images = torch.rand(config.batch_size, 3, side, side).mul_(2).sub_(1)
        captions = [f"{CAPTION} {word}" for word in range(config.batch_size)]
        tokens = self.trainer.model.text_encoder.tokenizer(captions)
        self.batch = Batch.of(images, captions, list(range(config.batch_size)), tokens)
        self.blocks = [self.trainer.generator_distillation, self.trainer.discriminator_distillation]
        self.stages = {}
        hooks = [block.register_forward_pre_hook(self._keep) for block in self.blocks]
        self.step()
        for hook in hooks:
            hook.remove()

    def _keep(self, block, arguments):
        (stages,) = arguments
        self.stages[block] = [stage.detach().requires_grad_() for stage in stages]

    def step(self):
        """Take a whole training step."""
        return self.trainer.step([self.batch])

    def distillation(self):
        """Run forward and backward of the distillation blocks alone."""
        for block, stages in self.stages.items():
            torch.autograd.grad(block(stages), stages[:-1])


@pytest.fixture(scope="module")
def training():
    return Training()


@pytest.mark.parametrize(("turn", "backend"), in_turns(BACKENDS))
@pytest.mark.parametrize("work", ["distillation", "step"])
def test_training(training, work, turn, backend, measure):
    with icsd.use_backend(backend):
        measure(
            getattr(training, work),
            benchmark="training",
            work=work,
            groups=1,
            samples=len(training.batch.images),
            dim=max(stage[0].numel() for stages in training.stages.values() for stage in stages),
            dtype=torch.float32,
            loss=training.trainer.config.distillation.generator.loss,
            implementation="icsd" if backend == "cpu" else backend,
        )


def birds() -> TrainConfig:
    """Return the configuration of the field's scale, with a batch of four on the CPU."""
    parser = ArgumentParser()
    parser.add_class_arguments(TrainConfig)
    values = load_configuration(BIRDS) | {"batch_size": 4, "device": "cpu"}
    return TrainConfig(**parser.instantiate(parser.parse_object(values)))


class FieldScale:
    """A batch of four at 64, 128 and 256 pixels, and every implementation of a step on it."""

    def __init__(self) -> None:
        self.config = birds()
        torch.manual_seed(0)
        captions = ["this bird has a red body and yellow wings", "a small bird, brown, its wings are grey"] * 2
        self.trainer = Trainer(self.config, build_text_encoder(self.config.text, captions))
        self.rival = AttnGANStep(wrong_pass=False)
        self.images = [torch.rand(4, 3, size, size).mul_(2).sub_(1) for size in RESOLUTIONS]
        tokens = self.trainer.model.text_encoder.tokenizer(captions)
        self.batch = Batch.of(self.images[-1], captions, list(range(4)), tokens)
        with torch.no_grad():
            self.text = self.trainer.model.text_encoder.encode(captions)
        self.steps: dict[str, Callable[[], object]] = {
            "icsd": lambda: self.ours("bf16"),
            "icsd fp32": lambda: self.ours("fp32"),
            "attngan bf16": lambda: self.theirs(bfloat16=True),
            "attngan": self.theirs,
            "attngan 3 passes": lambda: self.theirs(wrong_pass=True),
        }
        for step in self.steps.values():
            step()

    def ours(self, precision: str) -> object:
        """Return our step, its text encoder, matching heads and distillation included, which the rival lacks."""
        self.trainer.config = replace(self.config, precision=precision)
        return self.trainer.step([self.batch])

    def theirs(self, wrong_pass: bool = False, bfloat16: bool = False) -> object:
        """Return the step of the rival."""
        self.rival.wrong_pass, self.rival.bfloat16 = wrong_pass, bfloat16
        return self.rival(self.images, self.text.sentence, self.text.words, ~self.text.mask)


@pytest.fixture(scope="module")
def field_scale():
    return FieldScale()


@pytest.mark.parametrize(("turn", "implementation"), in_turns(FIELD))
def test_field_scale(field_scale, turn, implementation, benchmark, label):
    label(
        benchmark="field",
        work="step",
        groups=1,
        samples=4,
        dim=8192,
        dtype=torch.float32,
        loss="bce",
        implementation=implementation,
    )
    benchmark.pedantic(field_scale.steps[implementation])  # seconds long: once a turn

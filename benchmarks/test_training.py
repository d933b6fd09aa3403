"""A training step of the emoji demo, and the part of it that is distillation between the stages."""

import pytest
import torch

import icsd
from benchmarks.workloads import in_turns
from icsd.models import build_text_encoder
from icsd.training.config import TrainConfig
from icsd.training.trainer import Trainer

CAPTION = "a woman with dark skin, firefighter"
BACKENDS = ["cpu", "reference"]


class Training:
    """A trainer on one batch, and what its distillation blocks were given in the first step."""

    def __init__(self) -> None:
        config = TrainConfig(device="cpu")
        torch.manual_seed(0)
        self.trainer = Trainer(config, build_text_encoder(config.text, [CAPTION]))
        side = config.generator.resolutions[-1]
        images = torch.rand(config.batch_size, 3, side, side).mul_(2).sub_(1)
        class_ids = torch.arange(config.batch_size)
        self.batch = {"image": images, "caption": [CAPTION] * config.batch_size, "class_id": class_ids}
        self.blocks = [self.trainer.distil_generator, self.trainer.distil_discriminators]
        self.stages = {}
        hooks = [block.register_forward_pre_hook(self._keep) for block in self.blocks]
        self.step()
        for hook in hooks:
            hook.remove()

    def _keep(self, block, arguments):
        (stages,) = arguments
        self.stages[block] = [stage.detach().requires_grad_() for stage in stages]

    def step(self):
        """A whole training step."""
        return self.trainer.step([self.batch])

    def distillation(self):
        """Forward and backward of the distillation blocks alone."""
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
            samples=len(training.batch["image"]),
            features=max(stage[0].numel() for stages in training.stages.values() for stage in stages),
            dtype=torch.float32,
            loss=training.trainer.config.distillation.generator.divergence,
            implementation="icsd" if backend == "cpu" else backend,
        )

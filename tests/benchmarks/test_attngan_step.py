import pytest
import torch

from benchmarks import attngan_step
from benchmarks.test_training import birds
from icsd.models import DiscriminatorConfig, GeneratorConfig, TextConfig, TextFeatures
from icsd.models.text import TextEncoder
from icsd.models.tokens import Tokens
from icsd.training.adversarial import AdversarialConfig
from icsd.training.batches import Batch
from icsd.training.config import OptimizerConfig, TrainConfig
from icsd.training.losses import DiscriminatorLosses, GeneratorLosses, LossesConfig
from icsd.training.trainer import Trainer

RESOLUTIONS = (64, 128)


class Given(TextEncoder):
    """Features that are given, whatever the captions."""

    def __init__(self, features):
        super().__init__()
        self.features = features
        self.dim = features.sentence.shape[1]

    def forward(self, ids, lengths):
        return self.features

    def description(self):
        return {}


@pytest.mark.parametrize(("wrong_pass", "bfloat16"), [(True, False), (False, False), (False, True)])
def test_the_rival_and_our_step_have_the_same_losses(monkeypatch, wrong_pass, bfloat16):
    for name, value in {"NGF": 4, "NDF": 4, "TEXT": 8, "RESOLUTIONS": RESOLUTIONS}.items():
        monkeypatch.setattr(attngan_step, name, value)
    monkeypatch.setattr(Trainer, "_matching", lambda *arguments: torch.zeros(()))
    torch.manual_seed(0)
    lengths = torch.tensor([[5], [2], [3], [4]])
    text = TextFeatures(torch.randn(4, 8, 5), torch.randn(4, 8), torch.arange(5) < lengths)
    trainer = Trainer(
        TrainConfig(
            text=TextConfig(dim=8),
            generator=GeneratorConfig(
                list(RESOLUTIONS), 4, attngan_step.NOISE, attngan_step.CONDITION, residual_blocks=2
            ),
            discriminator=DiscriminatorConfig(4),
            losses=LossesConfig(GeneratorLosses(distillation=0), DiscriminatorLosses(distillation=0)),
            adversarial=AdversarialConfig(loss="bce"),
            optimizer=OptimizerConfig(2e-4, 2e-4, (0.5, 0.999)),
            device="cpu",
        ),
        Given(text),
    )
    rival = attngan_step.AttnGANStep(wrong_pass, bfloat16)
    copy_weights(trainer.model.generator, rival.generator)
    for ours, theirs in zip(trainer.discriminators, rival.discriminators, strict=True):
        copy_weights(ours, theirs)
    fine = torch.rand(4, 3, 128, 128) * 2 - 1
    tokens = Tokens(torch.ones(4, 5, dtype=torch.int64), lengths.squeeze(1))
    for _ in range(2):  # the second step sees the weights that the first one made
        torch.manual_seed(1)
        ours = trainer.step([Batch.of(fine, list("abcd"), list(range(4)), tokens)])
        torch.manual_seed(1)
        images = [torch.nn.functional.avg_pool2d(fine, 2), fine]
        theirs = rival(images, text.sentence, text.words, ~text.mask)
        tolerance = {"rtol": 0.05, "atol": 1e-3} if bfloat16 else {"rtol": 2e-3, "atol": 1e-4}
        for name, loss in theirs.items():
            torch.testing.assert_close(
                ours[name], loss.detach().float(), **tolerance, msg=lambda text, name=name: name + text
            )


def copy_weights(ours, theirs):
    """Copy our weights in the order of use."""
    mine = sorted(ours.named_parameters(), key=lambda item: order(item[0]))
    others = sorted(theirs.named_parameters(), key=lambda item: order(item[0]))
    assert len(mine) == len(others)
    for (name, weight), (_, other) in zip(mine, others, strict=True):
        assert weight.shape == other.shape, name
        other.data.copy_(weight.detach())


def order(name):
    """Parts that the two sides declare in another order or name otherwise."""
    parts = ["condition.", "initial.project", "project", "initial.up", "up.", "refine", "heads", "first", "blocks"]
    parts += ["features", "joint", "unconditional", "conditional"]
    return next((place for place, part in enumerate(parts) if name.startswith(part)), len(parts))


def test_the_field_scale_is_the_configuration_of_birds():
    config = birds()
    assert config.generator.resolutions == [64, 128, 256]
    assert config.batch_size == 4
    assert list(config.optimizer.betas) == [0.5, 0.999]  # of the file that birds.yaml extends

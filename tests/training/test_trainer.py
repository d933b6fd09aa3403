import dataclasses
import json

import pytest
import torch

from icsd.errors import InputError
from icsd.models import (
    DiscriminatorConfig,
    DistillationConfig,
    GeneratorConfig,
    GeneratorCSDConfig,
    TextConfig,
    build_text_encoder,
    restore_text_encoder,
)
from icsd.training.config import OptimiserConfig, TrainConfig
from icsd.training.trainer import Trainer

CAPTIONS = ["a red square", "a blue square", "one red disc", "one blue disc that is large"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config_of(**options):
    return TrainConfig(
        text=TextConfig(dim=8, embedding_dim=6),
        generator=GeneratorConfig([8, 16], width=8, noise_dim=4, condition_dim=4),
        discriminator=DiscriminatorConfig(width=4),
        device="cpu",
        **options,
    )


def trainer_of(config):
    torch.manual_seed(0)
    return Trainer(config, build_text_encoder(config.text, CAPTIONS))


def batch_of(size=8):
    """Pictures of one flat colour, red or blue as their captions say."""
    captions = [CAPTIONS[i % 4] for i in range(size)]
    colours = torch.tensor([[1.0, -1.0, -1.0] if "red" in caption else [-1.0, -1.0, 1.0] for caption in captions])
    return {"image": colours[:, :, None, None].expand(-1, -1, 16, 16).contiguous(), "caption": captions}


def test_losses_have_names_and_no_graph():
    losses = trainer_of(config_of()).step(batch_of())
    assert losses.keys() == {
        *("discriminator/8", "discriminator/16", "discriminator/matching", "discriminator/csd"),
        *("generator/8", "generator/16", "generator/matching", "generator/kl", "generator/csd"),
    }
    assert all(loss.isfinite() and loss.dim() == 0 and not loss.requires_grad for loss in losses.values())


def test_one_flag_leaves_distillation_out():
    losses = trainer_of(config_of(distillation=DistillationConfig(enabled=False))).step(batch_of())
    assert not any("csd" in name for name in losses)


@pytest.mark.parametrize("source", ["rgb", "hidden", "discriminator"])
def test_distillation_reaches_the_coarse_stage_alone(source):
    config = config_of(distillation=DistillationConfig(generator=GeneratorCSDConfig(source=source)))
    trainer = trainer_of(config)
    text = trainer.model.text_encoder(CAPTIONS)
    painted = trainer.model.generator(torch.randn(4, 4), text.detach())
    trainer._generator_losses(painted, text.sentence.detach())["generator/csd"].backward()
    generator = trainer.model.generator
    assert generator.initial.project[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in generator.refine.parameters())
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in generator.heads[-1].parameters())


def test_a_step_trains_everything():
    trainer = trainer_of(config_of())
    modules = {"model": trainer.model, "discriminators": trainer.discriminators, "matching": trainer.matching}
    before = {n: p.clone() for name, m in modules.items() for n, p in m.named_parameters(prefix=name)}
    for _ in range(2):
        trainer.step(batch_of())
    same = [n for name, m in modules.items() for n, p in m.named_parameters(prefix=name) if torch.equal(p, before[n])]
    assert same == []


def test_average_covers_parameters_and_buffers():
    decay = 0.8
    trainer = trainer_of(config_of(optimiser=OptimiserConfig(ema_decay=decay)))
    expected = None
    for _ in range(4):
        trainer.step(batch_of())
        state = {name: value.clone() for name, value in trainer.model.state_dict().items() if value.is_floating_point()}
        expected = expected or state
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in state.items()}
    averaged = trainer.ema.module.state_dict()
    assert any("running_var" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_restored_trainer_takes_the_very_same_step():
    config = config_of()
    first = trainer_of(config)
    for _ in range(3):
        first.step(batch_of())
    state = first.state_dict()
    json.dumps(state, default=lambda value: value.tolist())
    state = {key: _copied(value) for key, value in state.items()}
    expected = [first.step(batch_of()) for _ in range(2)]

    torch.manual_seed(99)
    second = Trainer(config, restore_text_encoder(config.text, state["text"]))
    second.load_state_dict(state)
    assert second.step_count == 3
    for losses in expected:
        again = second.step(batch_of())
        assert {name: loss.item() for name, loss in again.items()} == {name: v.item() for name, v in losses.items()}
    for name, value in first.state_dict()["ema"].items():
        assert torch.equal(value, second.state_dict()["ema"][name]), name


def _copied(value):
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_learns_the_colours_of_two_words():
    trainer = trainer_of(config_of(optimiser=OptimiserConfig(ema_decay=0.9, matching_weight=1.0)))
    for _ in range(200):
        trainer.step(batch_of(8))
    refined = trainer.paint(CAPTIONS, seed=1)[-1]
    red_over_blue = (refined[:, 0] - refined[:, 2]).mean(dim=(1, 2))
    assert red_over_blue[[0, 2]].min() > red_over_blue[[1, 3]].max() + 1


def test_unknown_device_is_refused():
    with pytest.raises(InputError, match="device"):
        trainer_of(dataclasses.replace(config_of(), device="abacus"))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: TrainConfig(batch_size=1), "batch_size"),
        (lambda: TrainConfig(steps=0), "steps"),
        (lambda: TrainConfig(threads=0), "threads"),
        (lambda: TrainConfig(workers=-1), "workers"),
        (lambda: OptimiserConfig(generator_lr=0.0), "optimiser.generator_lr"),
        (lambda: OptimiserConfig(betas=(0.5, 1.0)), "optimiser.betas"),
        (lambda: OptimiserConfig(ema_decay=1.0), "optimiser.ema_decay"),
        (lambda: OptimiserConfig(kl_weight=-1.0), "optimiser.kl_weight"),
        (lambda: OptimiserConfig(matching_weight=-1.0), "optimiser.matching_weight"),
    ],
)
def test_values_out_of_range_are_refused(make, key):
    with pytest.raises(InputError, match=key):
        make()

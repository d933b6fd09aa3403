import copy
import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing

from icsd.errors import InputError
from icsd.models import (
    DiscriminatorConfig,
    DistillationConfig,
    GeneratorConfig,
    GeneratorDistillationConfig,
    SideDistillationConfig,
    TextConfig,
    build_text_encoder,
    restore_text_encoder,
)
from icsd.models.damsm import DAMSM, DAMSMConfig
from icsd.models.image_encoder import CNNEncoder
from icsd.training.adversarial import AdversarialConfig
from icsd.training.batches import Batch
from icsd.training.config import GuidanceConfig, OptimizerConfig, TrainConfig
from icsd.training.losses import DiscriminatorLosses, GeneratorLosses, LossesConfig
from icsd.training.trainer import Trainer, learning_rate_factor

GUIDED = GuidanceConfig(Path("runs/damsm"))
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


def batch_of(trainer, size=8):
    """Images of one flat color, red or blue as their captions say."""
    captions = [CAPTIONS[i % 4] for i in range(size)]
    colors = torch.tensor([[1.0, -1.0, -1.0] if "red" in caption else [-1.0, -1.0, 1.0] for caption in captions])
    images = colors[:, :, None, None].expand(-1, -1, 16, 16).contiguous()
    tokens = trainer.model.text_encoder.tokenizer(captions)
    return Batch.of(images, captions, [i % 4 for i in range(size)], tokens)


def steps_of(trainer, count=1):
    """Take some steps; the losses of each."""
    return [trainer.step([batch_of(trainer)]) for _ in range(count)]


def guided_trainer(config):
    torch.manual_seed(0)
    encoder = build_text_encoder(config.text, CAPTIONS).freeze()
    image_encoder = CNNEncoder(config.text.dim, 4, 16).requires_grad_(False).eval()
    return Trainer(config, encoder, DAMSM(encoder, image_encoder, DAMSMConfig()))


def test_frozen_encoders_guide_training_and_stay_unchanged():
    trainer = guided_trainer(config_of())
    before = {name: value.clone() for name, value in trainer.damsm.state_dict().items()}
    generator = {name: value.clone() for name, value in trainer.model.generator.state_dict().items()}
    (losses,) = steps_of(trainer)
    assert "generator/damsm" in losses
    assert not any("matching" in name for name in losses)
    assert all(torch.equal(before[name], value) for name, value in trainer.damsm.state_dict().items())
    assert not all(torch.equal(generator[name], value) for name, value in trainer.model.generator.state_dict().items())


def test_losses_have_names_and_no_graph():
    (losses,) = steps_of(trainer_of(config_of()))
    assert losses.keys() == {
        *("discriminator/adversarial/8", "discriminator/adversarial/16"),
        *("discriminator/matching", "discriminator/distillation"),
        *("generator/adversarial/8", "generator/adversarial/16"),
        *("generator/matching", "generator/condition_kl", "generator/distillation"),
    }
    assert all(loss.isfinite() and loss.dim() == 0 and not loss.requires_grad for loss in losses.values())


@pytest.mark.parametrize(
    ("side", "name", "terms"),
    [
        ("generator", "adversarial", ("generator/adversarial/8", "generator/adversarial/16")),
        ("generator", "matching", ("generator/matching",)),
        ("generator", "condition_kl", ("generator/condition_kl",)),
        ("generator", "distillation", ("generator/distillation",)),
        ("discriminator", "adversarial", ("discriminator/adversarial/8", "discriminator/adversarial/16")),
        ("discriminator", "matching", ("discriminator/matching",)),
        ("discriminator", "distillation", ("discriminator/distillation",)),
        ("discriminator", "matching_penalty", ("discriminator/matching_penalty",)),
        ("discriminator", "r1", ("discriminator/r1",)),
    ],
)
def test_a_weight_scales_its_losses_and_0_leaves_them_out(side, name, terms):
    def losses_of(weight):
        losses = LossesConfig()
        setattr(getattr(losses, side), name, weight)
        distillation = DistillationConfig(
            GeneratorDistillationConfig(weighting="weight"), SideDistillationConfig(weighting="weight")
        )
        return steps_of(trainer_of(config_of(losses=losses, distillation=distillation)))[0]

    single, threefold, off = losses_of(1.0), losses_of(3.0), losses_of(0.0)
    assert set(terms) <= single.keys()
    assert off.keys() == single.keys() - set(terms)
    if side == "discriminator":  # the generator's losses of the same step depend on the discriminators' update
        assert all(threefold[term].item() == pytest.approx(3 * single[term].item(), rel=1e-6) for term in terms)
    else:
        assert all(threefold[term].item() == pytest.approx(3 * single[term].item(), rel=1e-5) for term in terms)


def test_a_weight_of_0_leaves_damsm_out():
    (losses,) = steps_of(guided_trainer(config_of(losses=LossesConfig(GeneratorLosses(damsm=0.0)))))
    assert not any("damsm" in name or "matching" in name for name in losses)


def test_a_side_without_losses_keeps_its_weights():
    trainer = trainer_of(config_of(losses=LossesConfig(GeneratorLosses(0, 0, 0, 0, 0))))
    before = [weight.clone() for weight in trainer.model.generator.parameters()]
    (losses,) = steps_of(trainer)
    assert all(name.startswith("discriminator/") for name in losses)
    assert all(torch.equal(*pair) for pair in zip(before, trainer.model.generator.parameters(), strict=True))


def test_no_loss_at_all_is_refused():
    losses = LossesConfig(GeneratorLosses(0, 0, 5.0, 0, 0), DiscriminatorLosses(0, 0, 0))
    with pytest.raises(InputError, match="there is nothing to learn: give losses"):
        config_of(losses=losses)  # without encoders, there is no DAMSM loss
    with pytest.raises(InputError, match="there is nothing to learn: give losses"):
        TrainConfig(losses=LossesConfig(GeneratorLosses(0, 5.0, 0, 0, 0), DiscriminatorLosses(0, 1.0, 0)), damsm=GUIDED)


def test_a_share_of_losses_that_the_run_cannot_have_is_refused():
    losses = LossesConfig(GeneratorLosses(0, 0, 5.0, 0, 0.1))  # without encoders, there is no DAMSM loss
    with pytest.raises(InputError, match=r"losses.generator.distillation is 0.1, .*\(adversarial, matching, "):
        config_of(losses=losses)
    losses = LossesConfig(discriminator=DiscriminatorLosses(0, 1.0, 0.1))  # with encoders, there are no matching heads
    with pytest.raises(InputError, match=r"losses.discriminator.distillation is 0.1, "):
        config_of(losses=losses, damsm=GUIDED)
    config_of(losses=LossesConfig(GeneratorLosses(0, 0, 5.0, 0, 0.1)), damsm=GUIDED)


def test_penalties_alone_train_discriminators_every_so_many_steps():
    losses = LossesConfig(discriminator=DiscriminatorLosses(0, 0, 0, r1=1.0))
    trainer = trainer_of(config_of(losses=losses, adversarial=AdversarialConfig(penalty_every=2)))
    first, second = steps_of(trainer, 2)
    assert first["discriminator/r1"] == 0 < second["discriminator/r1"]


@pytest.mark.parametrize("source", ["rgb", "hidden", "discriminator"])
def test_distillation_reaches_the_coarse_stage_alone(source):
    config = config_of(distillation=DistillationConfig(generator=GeneratorDistillationConfig(source=source)))
    trainer = trainer_of(config)
    batch = trainer._read(batch_of(trainer, 4))
    batch = batch._replace(text=batch.text.detach())
    generated = trainer._generate(batch.text)
    trainer._generator_losses(generated, batch)["distillation"].backward()
    generator = trainer.model.generator
    assert generator.initial.project[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in generator.refine.parameters())
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in generator.heads[-1].parameters())


def test_a_step_trains_everything():
    trainer = trainer_of(config_of())
    modules = {"model": trainer.model, "discriminators": trainer.discriminators, "matching": trainer.matching}
    before = {n: p.clone() for name, m in modules.items() for n, p in m.named_parameters(prefix=name)}
    steps_of(trainer, 2)
    same = [n for name, m in modules.items() for n, p in m.named_parameters(prefix=name) if torch.equal(p, before[n])]
    assert same == []


def test_average_covers_parameters_and_buffers():
    decay = 0.2
    trainer = trainer_of(config_of(optimizer=OptimizerConfig(ema_decay=decay)))
    expected = None
    for step in range(4):
        steps_of(trainer)
        state = {name: value.clone() for name, value in trainer.model.state_dict().items() if value.is_floating_point()}
        expected = expected or state
        now = min(decay, (1 + step) / (10 + step))
        expected = {name: now * expected[name] + (1 - now) * value for name, value in state.items()}
    averaged = trainer.ema.module.state_dict()
    assert any("running_var" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_restored_trainer_takes_the_very_same_step(precision, channels_last):
    options = OptimizerConfig(schedule="cosine", warmup=2, clip=1.0)
    config = config_of(precision=precision, channels_last=channels_last, optimizer=options)
    first = trainer_of(config)
    steps_of(first, 3)
    state = first.state_dict()
    json.dumps(state, default=lambda value: value.tolist())
    state = {key: _copied(value) for key, value in state.items()}
    expected = steps_of(first, 2)

    torch.manual_seed(99)
    second = Trainer(config, restore_text_encoder(config.text, state["text"]))
    second.load_state_dict(state)
    assert second.step_count == 3
    for losses in expected:
        (again,) = steps_of(second)
        assert {name: loss.item() for name, loss in again.items()} == {name: v.item() for name, v in losses.items()}
    for name, value in first.state_dict()["ema"].items():
        assert torch.equal(value, second.state_dict()["ema"][name]), name


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "bf16")])
def test_a_restored_trainer_may_have_another_precision(before, after):
    first, second = (trainer_of(config_of(precision=precision)) for precision in (before, after))
    steps_of(first)
    second.load_state_dict(first.state_dict())
    (losses,) = steps_of(second)
    assert all(loss.isfinite() for loss in losses.values())


def _contiguous(value):
    """Return the state as a checkpoint gives it back."""
    if isinstance(value, dict):
        return {key: _contiguous(item) for key, item in value.items()}
    return value.clone().contiguous() if isinstance(value, torch.Tensor) else value


def _copied(value):
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_learns_the_colors_of_two_words():
    trainer = trainer_of(
        config_of(optimizer=OptimizerConfig(ema_decay=0.9), losses=LossesConfig(GeneratorLosses(matching=1.0)))
    )
    steps_of(trainer, 200)
    refined = trainer.generate(CAPTIONS, seed=1)[-1]
    red_over_blue = (refined[:, 0] - refined[:, 2]).mean(dim=(1, 2))
    assert red_over_blue[[0, 2]].min() > red_over_blue[[1, 3]].max() + 1


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", ""])
def test_unusable_device_is_refused(name):
    with pytest.raises(InputError, match=f"device is '{name}'"):
        trainer_of(dataclasses.replace(config_of(), device=name))


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: TrainConfig(batch_size=1), "batch_size"),
        (lambda: TrainConfig(steps=0), "steps"),
        (lambda: TrainConfig(threads=0), "threads"),
        (lambda: TrainConfig(workers=-1), "workers"),
        (lambda: OptimizerConfig(generator_lr=0.0), "optimizer.generator_lr"),
        (lambda: OptimizerConfig(betas=(0.5, 1.0)), "optimizer.betas"),
        (lambda: TrainConfig(accumulate=0), "accumulate"),
        (lambda: OptimizerConfig(warmup=-1), "optimizer.warmup"),
        (lambda: OptimizerConfig(clip=0.0), "optimizer.clip"),
        (lambda: OptimizerConfig(ema_decay=1.0), "optimizer.ema_decay"),
        (lambda: LossesConfig(GeneratorLosses(condition_kl=-1.0)), "losses.generator.condition_kl"),
        (lambda: LossesConfig(GeneratorLosses(matching=float("nan"))), "losses.generator.matching"),
        (lambda: LossesConfig(ramp=-1), "losses.ramp"),
        (lambda: AdversarialConfig(penalty_every=0), "adversarial.penalty_every"),
        (lambda: TrainConfig(losses=LossesConfig(GeneratorLosses(0, 0, 0, 0, 0.1))), "losses.generator.distillation"),
        (lambda: LossesConfig(discriminator=DiscriminatorLosses(r1=float("inf"))), "losses.discriminator.r1"),
        (lambda: stage_weights([1.0, 1.0]), "distillation.*.stage_weights"),
        (lambda: stage_weights([]), "distillation.*.stage_weights"),
    ],
)
def test_values_out_of_range_are_refused(make, key):
    with pytest.raises(InputError, match=key):
        make()


def stage_weights(weights):
    return TrainConfig(distillation=DistillationConfig(GeneratorDistillationConfig(stage_weights=weights)))


def weights_after(steps, **options):
    trainer = trainer_of(config_of(**options))
    steps_of(trainer, steps)
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_goes_the_same_way(precision, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**8))
    start, full, lower = weights_after(0), weights_after(1), weights_after(1, precision=precision)
    assert lower.dtype == torch.float32
    assert not torch.equal(full, lower)
    assert torch.cosine_similarity(full - start, lower - start, dim=0) > 0.7


def test_half_precision_skips_a_step_that_overflows_and_lowers_the_scale():
    trainer = trainer_of(config_of(precision="fp16"))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = [p.clone() for p in trainer.model.generator.parameters()]
    steps_of(trainer)
    assert trainer.scaler.get_scale() == 2.0**119
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.generator.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_step_has_the_mean_gradient_of_its_batches(accumulate, monkeypatch):
    trainer = trainer_of(config_of(accumulate=accumulate))
    weight = next(trainer.discriminators.parameters())
    factors = iter([1.0, 5.0, -2.0])
    monkeypatch.setattr(trainer, "_discriminator_losses", lambda *_: {"adversarial/16": next(factors) * weight.sum()})
    seen = []
    monkeypatch.setattr(trainer, "_apply_gradient", lambda _: seen.append(weight.grad.clone()))
    trainer.schedules = []
    trainer.step([batch_of(trainer)] * accumulate)
    mean = sum([1.0, 5.0, -2.0][:accumulate]) / accumulate
    torch.testing.assert_close(seen[0], torch.full_like(weight, mean))


def test_accumulated_batches_reach_all_parameters():
    seen = {}
    trainer = trainer_of(config_of(accumulate=2))
    trainer.schedules = []
    trainer._apply_gradient = lambda optimizer: seen.update(
        {id(p): p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    )
    losses = trainer.step([batch_of(trainer)] * 2)
    assert losses["generator/adversarial/16"].isfinite()
    assert {id(p) for p in trainer.model.generator.parameters()} <= seen.keys()
    for name, parameter in trainer.discriminators.named_parameters():
        assert id(parameter) in seen, name


def test_relations_stay_within_a_batch_of_an_accumulated_step():
    trainer = trainer_of(config_of(accumulate=3))
    sizes = []
    for block in (trainer.generator_distillation, trainer.discriminator_distillation):
        block.register_forward_pre_hook(lambda block, stages: sizes.append(len(stages[0][0])))
    trainer.step([batch_of(trainer, 4)] * 3)
    assert sizes == [4] * 6


def test_clipping_bounds_the_gradient():
    trainer = trainer_of(config_of(optimizer=OptimizerConfig(clip=1e-3)))
    norms = []
    for optimizer in (trainer.generator_optimizer, trainer.discriminator_optimizer):
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_pre_hook(
            lambda *_, weights=weights: norms.append(torch.cat([p.grad.flatten() for p in weights]).norm().item())
        )
    steps_of(trainer)
    assert len(norms) == 2
    assert all(norm <= 1.001e-3 for norm in norms)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [1 / 3, 2 / 3, 1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0]),
    ],
)
def test_learning_rates_rise_and_fall(schedule, expected):
    options = OptimizerConfig(schedule=schedule, warmup=2)
    assert [learning_rate_factor(options, 6, step) for step in range(7)] == pytest.approx(expected)


def test_rates_follow_the_schedule_and_a_resumed_run_may_change_them():
    options = OptimizerConfig(generator_lr=0.1, discriminator_lr=0.2, schedule="linear")
    trainer = trainer_of(config_of(steps=4, optimizer=options))
    steps_of(trainer)
    assert trainer.generator_optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.75)
    assert trainer.discriminator_optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.75)
    slower = trainer_of(config_of(steps=4, optimizer=dataclasses.replace(options, generator_lr=0.01)))
    slower.load_state_dict(trainer.state_dict())
    assert slower.generator_optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.75)


def test_moments_of_a_restored_optimizer_lie_as_its_weights_do():
    trainer = trainer_of(config_of())
    steps_of(trainer)
    trainer.load_state_dict(_contiguous(trainer.state_dict()))
    strided = 0
    for weight, moments in trainer.generator_optimizer.state.items():
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == weight.stride()
        strided += not weight.is_contiguous()
    assert strided


@pytest.mark.parametrize("normalization", ["batch", "spectral", "none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_penalties_and_augmentation_train(normalization, precision):
    config = config_of(
        adversarial=AdversarialConfig(augment=["color", "translation", "cutout"]),
        losses=LossesConfig(discriminator=DiscriminatorLosses(matching_penalty=2.0, r1=1.0)),
        precision=precision,
    )
    config = dataclasses.replace(config, discriminator=DiscriminatorConfig(4, normalization))
    trainer = trainer_of(config)
    (losses,) = steps_of(trainer)
    assert losses["discriminator/matching_penalty"] > 0
    assert losses["discriminator/r1"] > 0
    assert all(loss.isfinite() for loss in steps_of(trainer)[0].values())


def test_compiled_networks_take_the_same_step(monkeypatch):
    torch.compiler.reset()
    translated = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")  # which takes seconds
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=translated))
    options = {"generator": GeneratorConfig([8, 16], width=4, noise_dim=4, condition_dim=4)}
    plain, compiled = (
        trainer.step([batch_of(trainer)])
        for trainer in (
            trainer_of(dataclasses.replace(config_of(compile=one, log_every=1), **options)) for one in (False, True)
        )
    )
    for name, loss in plain.items():
        torch.testing.assert_close(compiled[name], loss, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)
    assert translated.frame_count >= 4  # generator, features and two logits


def test_compiling_and_penalties_exclude_each_other():
    with pytest.raises(InputError, match="compile"):
        TrainConfig(compile=True, losses=LossesConfig(discriminator=DiscriminatorLosses(r1=1.0)))


def test_measuring_the_shares_changes_no_weight():
    def weights(log_every):
        trainer = trainer_of(config_of(log_every=log_every, losses=LossesConfig(ramp=2)))
        steps_of(trainer, 3)
        return trainer.state_dict()

    for name in ("model", "discriminators", "matching", "ema"):
        pairs = zip(weights(1)[name].values(), weights(100)[name].values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs), name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_distillation_has_its_share_of_the_gradient(accumulate, precision):
    losses = LossesConfig(GeneratorLosses(distillation=0.2), DiscriminatorLosses(distillation=0.05), ramp=1)
    trainer = trainer_of(config_of(losses=losses, log_every=1, accumulate=accumulate, precision=precision))
    for ramp in (0.5, 1.0):
        values = trainer.step([batch_of(trainer)] * accumulate)
        measured = trainer.measurements()
        assert measured["share/generator/distillation"] == pytest.approx(0.2 * ramp, rel=1e-3)
        assert measured["share/discriminator/8/distillation"] == pytest.approx(0.05 * ramp, rel=1e-3)
        assert "share/discriminator/16/distillation" not in measured  # it is the teacher
        assert measured["share/generator/matching"] > 0
        assert measured["inconsistency/generator"] > 0
        assert values["generator/distillation"] > 0


def test_inconsistency_is_measured_without_distillation():
    losses = LossesConfig(GeneratorLosses(distillation=0), DiscriminatorLosses(distillation=0))
    trainer = trainer_of(config_of(losses=losses, log_every=1))
    steps_of(trainer)
    measured = trainer.measurements()
    assert measured["inconsistency/generator"] > 0
    assert measured["inconsistency/discriminator"] > 0
    assert not any("distillation" in name for name in measured)


def test_real_images_teach_as_the_discriminators_see_them(monkeypatch):
    monkeypatch.setattr("icsd.training.trainer.augment", lambda stages, kinds, team: [each + 0.5 for each in stages])
    distillation = DistillationConfig(GeneratorDistillationConfig(source="discriminator", teacher="real"))
    trainer = trainer_of(config_of(distillation=distillation))
    batch, compared = batch_of(trainer), []

    def compare(block, inputs):
        compared.append((inputs[1], trainer.discriminators[-1].features(batch.images + 0.5)))

    trainer.generator_distillation.register_forward_pre_hook(compare)
    trainer.step([batch])
    ((taught, seen),) = compared
    torch.testing.assert_close(taught, seen)


@pytest.mark.parametrize("source", ["rgb", "hidden", "discriminator"])
@pytest.mark.parametrize("teacher", ["average", "real"])
@pytest.mark.parametrize("direction", ["refined-to-coarse", "coarse-to-refined"])
def test_average_and_real_images_teach(source, teacher, direction):
    if (source, teacher) == ("hidden", "real"):
        return
    side = GeneratorDistillationConfig(source=source, teacher=teacher, direction=direction)
    trainer = trainer_of(config_of(distillation=DistillationConfig(side)))
    steps_of(trainer, 2)
    taught = []
    trainer.generator_distillation.register_forward_pre_hook(lambda block, inputs: taught.append(inputs))
    average = copy.deepcopy(trainer.ema.module.generator)
    noise = []
    trainer.model.generator.register_forward_pre_hook(lambda generator, inputs: noise.append(inputs))
    batch = batch_of(trainer)
    trainer.step([batch])
    ((stages, seen),) = taught
    index = -1 if direction == "refined-to-coarse" else 0
    assert seen.shape == stages[index].shape
    assert not seen.requires_grad
    with torch.no_grad():
        output = average(*noise[0])
    if source == "rgb":
        real = batch.images if index == -1 else torch.nn.functional.avg_pool2d(batch.images, 2)
        torch.testing.assert_close(seen, output.images[index] if teacher == "average" else real)
    elif source == "hidden":
        torch.testing.assert_close(seen, output.hidden[index])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_queues_and_average_resume_exactly(accumulate):
    distillation = DistillationConfig(
        GeneratorDistillationConfig(queue=20, teacher="average", loss="kl", center=True),
        SideDistillationConfig(queue=5),
    )
    config = config_of(distillation=distillation, accumulate=accumulate)
    first = trainer_of(config)
    for _ in range(3):
        first.step([batch_of(first)] * accumulate)
    state = copy.deepcopy(first.state_dict())
    assert [len(queued) for queued in state["queued_samples"]["generator"]] == [20, 20]
    expected = [first.step([batch_of(first)] * accumulate) for _ in range(2)]
    second = Trainer(config, restore_text_encoder(config.text, state["text"]))
    second.load_state_dict(state)
    for losses in expected:
        again = second.step([batch_of(second)] * accumulate)
        assert {name: loss.item() for name, loss in again.items()} == {name: v.item() for name, v in losses.items()}


def test_lazy_penalties_are_taken_every_few_steps_with_a_larger_weight():
    losses = LossesConfig(discriminator=DiscriminatorLosses(r1=2.0, matching_penalty=0.5))

    def values(every):
        trainer = trainer_of(
            config_of(
                losses=losses,
                adversarial=AdversarialConfig(penalty_every=every),
                optimizer=OptimizerConfig(generator_lr=1e-12, discriminator_lr=1e-12),
            )
        )
        steps = [trainer.step([batch_of(trainer)]) for _ in range(6)]
        return {name: [step[f"discriminator/{name}"].item() for step in steps] for name in ("r1", "matching_penalty")}

    always, lazy = values(1), values(3)
    for name, penalties in lazy.items():
        assert [penalty > 0 for penalty in penalties] == [False, False, True] * 2
        for step in (2, 5):
            assert penalties[step] == pytest.approx(3 * always[name][step], rel=1e-4)

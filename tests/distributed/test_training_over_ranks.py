"""Steps of GAN training on several ranks, against one process with the whole batch."""

import contextlib
import io
import json
import os
import signal
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from icsd.cli.main import main
from icsd.data import DataConfig
from icsd.errors import InputError
from icsd.evaluation.extractors import Extractor
from icsd.models import (
    DiscriminatorConfig,
    DistillationConfig,
    GeneratorConfig,
    GeneratorDistillationConfig,
    SideDistillationConfig,
    TextConfig,
    build_text_encoder,
)
from icsd.models.damsm import DAMSM, DAMSMConfig
from icsd.models.image_encoder import CNNEncoder
from icsd.team import Team
from icsd.training import checkpoint, evaluation, launch, train
from icsd.training.adversarial import AdversarialConfig
from icsd.training.batches import Batch
from icsd.training.config import TrainConfig
from icsd.training.losses import DiscriminatorLosses, GeneratorLosses, LossesConfig
from icsd.training.trainer import Trainer

CAPTIONS = ["a red square", "a blue square", "one red disc", "one blue disc that is large"]
BATCH, STEPS = 8, 3

CASES = {
    "batch normalization, matching, augmentation": {
        "sync_batch_norm": True,
        "adversarial": AdversarialConfig(augment=["color", "translation", "cutout"]),
        "distillation": DistillationConfig(discriminator=SideDistillationConfig(loss="kl", center=True)),
    },
    "relativistic, penalties, queue, average, accumulation": {
        "sync_batch_norm": True,
        "accumulate": 2,
        "adversarial": AdversarialConfig(loss="relativistic", wrong_captions="similar"),
        "losses": LossesConfig(GeneratorLosses(matching=2), DiscriminatorLosses(r1=0.5), ramp=2),
        "distillation": DistillationConfig(GeneratorDistillationConfig(queue=5, loss="kl", teacher="average")),
    },
    "DAMSM": {
        "sync_batch_norm": True,
        "losses": LossesConfig(GeneratorLosses(adversarial=0.1, damsm=5)),
        "damsm": True,
    },
}


def trainer_of(options, team=None):
    options = {"batch_size": BATCH, "log_every": 2, **options}
    damsm, width = options.pop("damsm", None), options.pop("width", 8)
    residual_blocks, normalization = options.pop("residual_blocks", 1), options.pop("normalization", "batch")
    config = TrainConfig(
        text=TextConfig(dim=8, embedding_dim=6, dropout=0.2),
        generator=GeneratorConfig([8, 16], width, noise_dim=4, condition_dim=4, residual_blocks=residual_blocks),
        discriminator=DiscriminatorConfig(width // 2, normalization),
        device="cpu",
        **options,
    )
    torch.manual_seed(0)
    encoder = build_text_encoder(config.text, CAPTIONS)
    if damsm:
        image_encoder = CNNEncoder(config.text.dim, 4, 16).requires_grad_(False).eval()
        damsm = DAMSM(encoder.freeze(), image_encoder, DAMSMConfig())
    return Trainer(config, encoder, damsm, team)


def batch_of(trainer, step):
    """Return the part of this rank in a batch, with captions of several lengths, and images without a wrong one."""
    generator, size = torch.Generator().manual_seed(step), trainer.config.batch_size
    places = torch.randint(4, (size,), generator=generator).tolist()
    classes = [0] * (size - 2) + [1, 0] if step % 4 > 1 else places
    images = torch.rand(size, 3, 16, 16, generator=generator, dtype=torch.float64) * 2 - 1
    own, similar = trainer.team.own(size), trainer.config.adversarial.wrong_captions == "similar"
    captions = [CAPTIONS[place] for place in places][own]
    tokens = trainer.model.text_encoder.tokenizer(captions)
    batch = Batch.of(images[own], captions, classes[own], tokens, similar=similar)
    return batch.of_all_ranks(trainer.team, similar)


def trained(group, options, steps):
    """Return the state, the measurements and the losses of some steps, all in float64."""
    torch.set_default_dtype(torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        try:
            trainer = trainer_of(options, Team(group))
            losses = []
            for step in range(steps):
                batches = [batch_of(trainer, 2 * step + k) for k in range(trainer.config.accumulate)]
                taken = trainer.step(batches)
                trainer.team.average([*taken.values()])
                losses.append({name: value.item() for name, value in taken.items()})
            return trainer.state_dict(), trainer.measurements(), losses
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("size", "case"), [*zip([4, 2, 2], CASES, strict=True)])
def test_ranks_reach_the_weights_of_one_process(case, size, ranks):
    state, measurements, losses = trained(None, CASES[case], STEPS)
    results = ranks.run(size, trained, CASES[case], STEPS)
    for other, measured, taken in results:
        for part in ("model", "ema", "discriminators", "matching", "queued_samples", "generator_optimizer"):
            torch.testing.assert_close(other[part], state[part], rtol=1e-6, atol=1e-8)
        assert torch.equal(other["random"]["torch"], state["random"]["torch"])
        assert measured == pytest.approx(measurements, rel=1e-6)
        for mine, truth in zip(taken, losses, strict=True):
            assert mine == pytest.approx(truth, rel=1e-6)
    first, *others = (result[0] for result in results)
    for other in others:
        for part in ("model", "ema", "discriminators", "matching", "queued_samples", "generator_optimizer"):
            torch.testing.assert_close(other[part], first[part], rtol=0, atol=0)


def many_steps(group):
    """Return weights after 50 steps with a small network."""
    # Only the generator normalizes batches: the statistics of a layer travel four times in a step.
    small = {"width": 4, "residual_blocks": 0, "normalization": "none", "batch_size": 4, "log_every": 100}
    terms = LossesConfig(GeneratorLosses(matching=0), DiscriminatorLosses(matching=0, distillation=0))
    state, _, losses = trained(group, {"sync_batch_norm": True, "losses": terms, **small}, 50)
    return state["model"], state["ema"], state["discriminators"], losses[-1]


def test_ranks_reach_the_weights_of_one_process_after_fifty_steps(ranks):
    *weights, losses = many_steps(None)
    for size in (2, 4):
        for *others, taken in ranks.run(size, many_steps):
            torch.testing.assert_close(others, weights, rtol=1e-5, atol=1e-7)
            assert taken == pytest.approx(losses, rel=1e-5)


def order_of_a_step(group):
    """Return what a step begins, in order: the average of gradients over ranks, and backward passes."""
    begun, start, backward = [], Team.start_average, torch.Tensor.backward

    def starting(team, tensors):
        begun.append("average" if tensors else "nothing")
        return start(team, tensors)

    def running(loss):
        begun.append("backward")
        backward(loss)

    trainer = trainer_of({"width": 4, "log_every": 100}, Team(group))
    batch = batch_of(trainer, 0)
    batch.images = batch.images.float()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Team, "start_average", starting)
        patch.setattr(torch.Tensor, "backward", running)
        trainer.step([batch])
    return begun


def test_gradients_of_distillation_travel_during_the_backward_pass_of_the_other_losses(ranks):
    side = ["average", "backward", "average"]
    for begun in ranks.run(2, order_of_a_step):
        assert begun == [*side, *side, "average"]  # both sides, and the statistics of the batches


def too_few(group, batch_size):
    try:
        trainer = trainer_of({})
        trainer.config.batch_size = batch_size
        Trainer(trainer.config, trainer.model.text_encoder, team=Team(group))
    except InputError as error:
        return str(error)


@pytest.mark.parametrize(
    ("size", "batch_size", "message"),
    [(3, 8, "8, which 3 ranks cannot share evenly: give a multiple of 3"), (4, 4, "4, one image for each of 4 ranks")],
)
def test_ranks_that_cannot_share_a_batch(size, batch_size, message, ranks):
    for found in ranks.run(size, too_few, batch_size):
        assert message in found


def helped(group):
    team = Team(group)
    own = torch.full((3,), float(team.rank))
    many = [torch.full((2, 2), -float(team.rank)), torch.tensor(10.0 * team.rank, dtype=torch.float64)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("icsd.team.BUCKET_BYTES", 8)  # more than one bucket of a dtype
        team.average([own, *many])
    try:
        team.check_equal("the configuration", f"seed: 1\nsteps: {team.rank // 2}\n")
    except InputError as error:
        message = str(error)
    try:
        team.first(refuse)
    except InputError as error:
        refused = str(error)
    return (
        own.tolist(),
        [each.mean().item() for each in many],
        team.any(team.rank == 1),
        team.any(False),
        message,
        refused,
    )


def refuse():
    assert dist.get_rank() == 0
    raise InputError("no such folder")


def test_the_team_averages_agrees_and_finds_differences(ranks):
    for own, other, some, none, message, refused in ranks.run(3, helped):
        assert (own, other, some, none, refused) == ([1.0] * 3, [-1.0, 10.0], True, False, "no such folder")
        assert message.startswith("the configuration differs between ranks: rank 0 has steps: 0, rank 2 has steps: 1")


def run_of(output, **options):
    return TrainConfig(
        data=DataConfig(name="procedural-flowers", size=24, flip=True),
        text=TextConfig(dim=8, embedding_dim=8),
        generator=GeneratorConfig(resolutions=[8, 16], width=4, noise_dim=4, condition_dim=4),
        discriminator=DiscriminatorConfig(width=4),
        output=output,
        batch_size=8,
        sync_batch_norm=True,
        log_every=1,
        sample_every=100,
        loggers=[],
        evaluate=False,
        device="cpu",
        **options,
    )


def train_on_ranks(group, config, rank_of_another_seed=None):
    if dist.get_rank() == rank_of_another_seed:
        config = replace(config, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        return scored(patch, config)


def scored(patch, config, **options):
    """Train, and measure by colors instead of by features of a network that may not be installed."""
    colors = Extractor("colors", "e" * 64, "none", lambda images: {"features": images.float().flatten(2).mean(2)})
    patch.setattr(evaluation, "lite0", lambda device: colors)
    patch.setattr(evaluation, "classifiers_of", lambda *_: {})
    patch.setattr(train, "lite0_files", lambda: None)
    patch.setattr(evaluation, "IMAGES", 150)  # three batches for the ranks
    return train.train(config, **options)


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = [name for name in lines[0] if name.startswith(("generator/", "discriminator/", "share/"))]
    return [(line["step"], {name: line[name] for name in names}) for line in lines if names[0] in line]


def scores_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [{name: line[name] for name in line if name.startswith(("score", "evaluation/"))} for line in lines]
    return [each for each in scores if each]


def test_a_run_on_ranks_is_resumed_by_one_process(ranks, tmp_path, capsys, monkeypatch):
    options = {"evaluate_every": 2, "losses": LossesConfig(discriminator=DiscriminatorLosses(matching=1))}
    alone = scored(monkeypatch, run_of(tmp_path, name="alone", steps=4, **options))
    together = ranks.run(4, train_on_ranks, run_of(tmp_path, name="together", steps=2, **options))
    assert together == [tmp_path / "together"] * 4
    checkpoints = sorted(file.name for file in (tmp_path / "together" / "checkpoints").iterdir())
    assert checkpoints == ["best.safetensors", "step-00000002.safetensors"]
    rest = run_of(tmp_path, name="together", steps=4, **options)
    scored(monkeypatch, rest, resume=tmp_path / "together")
    assert len(scores_of(alone)) == 2
    for mine, truth in zip(scores_of(together[0]), scores_of(alone), strict=True):
        assert mine == pytest.approx(truth, rel=0.02, abs=1e-3)
    for (step, mine), (truth_step, truth) in zip(losses_of(together[0]), losses_of(alone), strict=True):
        assert step == truth_step
        assert mine == pytest.approx(truth, rel=2e-3, abs=1e-4)
    assert checkpoint.load(checkpoint.latest(together[0]))["step"] == 4


def test_configurations_that_differ_are_found_at_the_start(ranks, tmp_path):
    for outcome in ranks.outcomes(4, train_on_ranks, run_of(tmp_path, steps=2), 2):
        assert outcome.kind is InputError
        assert "the configuration differs between ranks: rank 0 has seed: 0, rank 2 has seed: 1" in str(outcome)
    assert not list(tmp_path.iterdir())


def test_restarts_need_the_name_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="give a name, by which a restart finds the run"):
        train.train(run_of(tmp_path, steps=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    folder = train.train(run_of(tmp_path, name="again", steps=1))
    assert train.train(run_of(tmp_path, name="again", steps=2)) == folder
    assert [step for step, _ in losses_of(folder)] == [1, 2]


def train_until_a_rank_stalls(group, config, store, stalling):
    """Train; one rank stops before its third step until the others have given up, which takes them three seconds."""
    group = dist.new_group()
    team = Team(group, dist.FileStore(str(store), 4))
    step = Trainer.step

    def stalled(trainer, batches):
        if trainer.step_count == 2:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=3), group)
            if team.rank == stalling:
                team.store.wait([f"gave up {rank}" for rank in range(4) if rank != stalling], timedelta(seconds=50))
        return step(trainer, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "joined", lambda: contextlib.nullcontext(team))
        patch.setattr(Trainer, "step", stalled)
        try:
            return train.train(config)
        finally:
            team.store.set(f"gave up {team.rank}", "")


def test_a_rank_that_stalls_is_named_and_ends_the_run_on_all_ranks(ranks, tmp_path):
    config = run_of(tmp_path, name="stalled", steps=4, checkpoint_every=1)
    outcomes = ranks.outcomes(4, train_until_a_rank_stalls, config, tmp_path / "store", 2)
    last = tmp_path / "stalled" / "checkpoints" / "step-00000002.safetensors"
    for rank, outcome in enumerate(outcomes):
        assert outcome.kind is InputError
        missing = "the other ranks" if rank == 2 else "rank 2, which ended or stalls"
        assert f"rank {rank} of 4 lost contact with {missing}, after step 2 (" in str(outcome)
        assert f"{last} is still good; continue from it with\n  icsd train --resume" in str(outcome)
    assert checkpoint.load(last)["step"] == 2


def train_and_be_killed_once(config):
    """Train under torchrun. Rank 1 is killed before the third step of the first start."""
    step = Trainer.step

    def killed(trainer, batches):
        if (trainer.step_count, os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == (2, "1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer, batches)

    torch.set_num_threads(1)
    Trainer.step = killed  # this process ends with this function
    return train.train(config)


@pytest.fixture
def handlers():
    """Restore the handlers of signals that torchrun sets."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in signals}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_torchrun_resumes_a_run_after_a_rank_was_killed(ranks, handlers, tmp_path):
    launch_config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        monitor_interval=0.05,
        start_method="forkserver",  # which has imported everything for `ranks`
    )
    options = {"steps": 4, "checkpoint_every": 1}
    alone = train.train(run_of(tmp_path, name="alone", **options))
    run = run_of(tmp_path, name="killed", **options)
    results = elastic_launch(launch_config, train_and_be_killed_once)(run)
    assert results == {0: tmp_path / "killed", 1: tmp_path / "killed"}
    assert [step for step, _ in losses_of(results[0])] == [1, 2, 3, 4]
    for (_, mine), (_, truth) in zip(losses_of(results[0]), losses_of(alone), strict=True):
        assert mine == pytest.approx(truth, rel=2e-3, abs=1e-4)


def doctor_on_ranks(group):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return main(["doctor"]), out.getvalue()


def test_the_doctor_describes_every_rank(ranks):
    (code, report), *others = ranks.run(4, doctor_on_ranks)
    assert others == [(0, "")] * 3
    assert code == 0
    for rank in range(4):
        (line,) = [line for line in report.splitlines() if line.startswith(f"rank {rank} ")]
        assert "cpu" in line
        assert "gloo" in line
        assert float(line.split()[-5]) > 0
        assert line.endswith(f"GB/s to rank {(rank + 1) % 4}")


def test_lost_contact_is_told_from_other_errors():
    alone, several = Team(), Team()
    several.size = 2
    broken = RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234")
    assert several.lost_contact(broken)
    assert not alone.lost_contact(broken)
    assert not several.lost_contact(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))

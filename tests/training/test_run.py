import json
import os
import signal
from dataclasses import replace

import pytest
import yaml
from PIL import Image

from icsd.data import DataConfig
from icsd.errors import InputError
from icsd.evaluation import AttributeScore
from icsd.models import DiscriminatorConfig, GeneratorConfig, TextConfig
from icsd.training import checkpoint, run
from icsd.training.batches import batch_indices
from icsd.training.config import TrainConfig
from icsd.training.trainer import Trainer


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        data=DataConfig(name="procedural-flowers", size=24, flip=True),
        text=TextConfig(dim=8, embedding_dim=8),
        generator=GeneratorConfig(resolutions=[8, 16], width=4, noise_dim=4, condition_dim=4),
        discriminator=DiscriminatorConfig(width=4),
        out=tmp_path / "runs",
        steps=6,
        batch_size=4,
        threads=1,
        log_every=2,
        sample_every=4,
        checkpoint_every=100,
        evaluate=False,
    )


def final_state(folder):
    return checkpoint.load(checkpoint.latest(folder))


def after_step(monkeypatch, step, action):
    """Have ``action(trainer)`` follow one step of training."""
    plain = Trainer.step

    def stepping(trainer, batch):
        losses = plain(trainer, batch)
        if trainer.step_count == step:
            action(trainer)
        return losses

    monkeypatch.setattr(Trainer, "step", stepping)


def test_batches_cover_every_epoch_and_resume_anywhere():
    batches = list(batch_indices(length=10, batch_size=4, seed=1, start=0, stop=5))
    drawn = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [4] * 5
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert list(batch_indices(10, 4, seed=1, start=3, stop=5)) == batches[3:]
    assert list(batch_indices(10, 4, seed=2, start=0, stop=5)) != batches


def test_batches_may_be_larger_than_the_set():
    (batch,) = batch_indices(length=3, batch_size=7, seed=0, start=0, stop=1)
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]


def test_a_run_leaves_its_folder_and_says_where(config, capsys):
    folder = run.train(config)
    assert folder == config.out / "procedural-flowers"
    assert run.train(replace(config, steps=1)).name == "procedural-flowers-2"

    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["generator"]["resolutions"] == [8, 16]
    assert saved == final_state(folder)["config"]

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"images_per_second", "generator/16", "discriminator/8", "generator/csd"} <= lines[0].keys()

    pictures = sorted(path.name for path in (folder / "pictures").iterdir())
    assert pictures == ["step-00000004.png", "step-00000006.png"]
    with Image.open(folder / "pictures" / pictures[1]) as picture:
        assert min(picture.size) > 200
    assert list((folder / "tensorboard").iterdir())

    printed = capsys.readouterr().out
    assert str(folder / "pictures" / "step-00000006.png") in printed
    assert str(folder / "checkpoints" / "step-00000006.safetensors") in printed
    assert "icsd sample 'this " in printed


def test_a_resumed_run_ends_in_the_same_weights(config):
    whole = run.train(config)
    half = run.train(replace(config, steps=3, sample_every=1))
    assert run.train(config, resume=half) == half
    assert checkpoint.latest(whole).read_bytes() == checkpoint.latest(half).read_bytes()


def test_an_interrupted_run_leaves_a_checkpoint_that_resumes(config, monkeypatch):
    whole = run.train(config)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match=r"step 3 of 6.*\n.*icsd train --resume .*procedural-flowers-2"):
            run.train(config)
    assert signal.getsignal(signal.SIGINT) is handler
    folder = config.out / "procedural-flowers-2"
    assert final_state(folder)["step"] == 3
    run.train(config, resume=folder)
    assert checkpoint.latest(whole).read_bytes() == checkpoint.latest(folder).read_bytes()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_resuming_drops_the_metrics_past_the_checkpoint(config):
    folder = run.train(replace(config, checkpoint_every=2))
    checkpoint.latest(folder).unlink()
    run.train(config, resume=folder)
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


def test_only_the_newest_checkpoints_stay(config):
    folder = run.train(replace(config, checkpoint_every=1))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}.safetensors" for step in (4, 5, 6)]


def test_resuming_with_another_configuration_names_the_keys(config):
    folder = run.train(replace(config, steps=1))
    other = replace(config, seed=5, generator=replace(config.generator, width=8))
    with pytest.raises(InputError, match=r"generator\.width \(checkpoint: 4, now: 8\), seed \(checkpoint: 0, now: 5\)"):
        run.train(other, resume=folder)


def test_a_finished_run_asks_for_more_steps(config):
    folder = run.train(replace(config, steps=1))
    with pytest.raises(InputError, match="larger `--steps`"):
        run.train(replace(config, steps=1), resume=folder)


def test_divergence_keeps_the_last_good_checkpoint(config, monkeypatch):
    def spoil(trainer):
        next(trainer.model.generator.parameters()).data.fill_(float("nan"))

    after_step(monkeypatch, 4, spoil)
    with pytest.raises(InputError, match=r"diverged by step 4, generator\..* is not finite(.|\n)*--resume"):
        run.train(replace(config, checkpoint_every=2))
    folder = config.out / "procedural-flowers"
    assert final_state(folder)["step"] == 2
    assert all(value.isfinite().all() for value in final_state(folder)["model"].values())


def test_a_full_disk_keeps_the_last_checkpoint(config, monkeypatch):
    def fill(trainer):
        monkeypatch.setattr(os, "fsync", full)

    def full(handle):
        raise OSError(28, "No space left on device")

    after_step(monkeypatch, 3, fill)
    with pytest.raises(OSError, match="No space left on device"):
        run.train(replace(config, checkpoint_every=2))
    folder = config.out / "procedural-flowers"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002.safetensors"]


def test_bad_data_leaves_no_run_folder(config, tmp_path):
    with pytest.raises(InputError, match=r"data\.root"):
        run.train(replace(config, data=DataConfig(name="folder", root=tmp_path / "absent")))
    assert not config.out.exists()


def test_the_scores_are_printed_and_kept(config, monkeypatch, capsys):
    score = AttributeScore("petal_colour", 8, 0.93, 0.61, 0.13)
    monkeypatch.setattr(run, "evaluate_attributes", lambda *arguments: [score])
    folder = run.train(replace(config, steps=1, evaluate=True))
    printed = capsys.readouterr().out
    assert "petal_colour" in printed
    assert "0.930    0.610    0.130" in printed
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["attributes"][0]["result"] == 0.61


def test_the_attribution_is_printed_and_lies_beside_the_pictures(config, capsys):
    folder = run.train(replace(config, steps=1, data=DataConfig()))
    assert "CC-BY" in capsys.readouterr().out
    assert "CC-BY" in (folder / "pictures" / "ATTRIBUTION").read_text()
    assert "CC-BY" in final_state(folder)["attribution"]

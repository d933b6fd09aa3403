"""Attacks on runs: killed at any moment, filled disks, and damaged, crafted and hostile checkpoints.

Run with ``make attack``. Every test prints its counts.
"""

import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from attempts import attempt

from icsd.data import DataConfig, Vocabulary
from icsd.errors import InputError
from icsd.models import DiscriminatorConfig, GeneratorConfig, TextConfig
from icsd.models.attngan import Release, load_release
from icsd.models.image_encoder import ImageEncoderConfig
from icsd.sampling import Sampler
from icsd.training import checkpoint, pretrain, train
from icsd.training.config import PretrainConfig, TrainConfig

pytestmark = [pytest.mark.attack, pytest.mark.timeout(3600)]

SMALL = {
    "data": DataConfig(name="procedural-flowers", size=24, flip=True),
    "text": TextConfig(dim=8, embedding_dim=8),
    "steps": 24,
    "batch_size": 4,
    "threads": 1,
    "log_every": 1,
    "loggers": [],
}
TRAIN = TrainConfig(
    **SMALL,
    checkpoint_every=3,
    generator=GeneratorConfig(resolutions=[8, 16], width=4, noise_dim=4, condition_dim=4),
    discriminator=DiscriminatorConfig(width=4),
    sample_every=8,
    evaluate=False,
)
PRETRAIN = PretrainConfig(
    **SMALL, checkpoint_every=5, image=ImageEncoderConfig("cnn", width=4), resolution=16, evaluate_every=9
)
RUNS = {"train": (train.train, TRAIN), "pretrain": (pretrain.pretrain, PRETRAIN)}


def in_a_child(function, *arguments, kill_after=None):
    """Call a function in a fork of this process, which may be killed; return its exit code."""
    child = multiprocessing.get_context("fork").Process(target=quiet, args=(function, *arguments))
    child.start()
    child.join(kill_after)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode


def quiet(function, *arguments):
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    function(*arguments)


def contents(folder):
    """Return the bytes of all files of a run that do not tell its place or its speed, and its metrics without speed."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".png", ".safetensors")
    }
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return files, [{key: value for key, value in line.items() if "per_second" not in key} for line in lines]


def killed(function, config, draw, seconds):
    """Run a configuration to its end, killed up to four times on the way; return the number of kills."""
    folder, kills = config.output / config.name, 0
    while True:
        begun = (folder / "config.yaml").exists()
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)
        after = seconds * draw.uniform(0.1, 0.9) if kills < 4 else None
        end = in_a_child(function, config, folder if begun else None, kill_after=after)
        if end == 0:
            return kills
        assert end == -signal.SIGKILL
        kills += 1


@pytest.mark.parametrize("kind", RUNS)
def test_killed_runs_end_in_the_same_files(tmp_path, kind):
    function, config = RUNS[kind]
    config = replace(config, output=tmp_path / "runs", name="run")
    since = time.monotonic()
    assert in_a_child(function, config) == 0
    seconds = time.monotonic() - since
    whole = (tmp_path / "runs").rename(tmp_path / "whole")
    counts = Counter()
    for number in range(10):
        counts["kills"] += killed(function, config, random.Random(number), seconds)
        counts["equal" if contents(tmp_path / "runs" / "run") == contents(whole / "run") else "different"] += 1
        shutil.rmtree(tmp_path / "runs")
    print(f"runs of icsd {kind}: {dict(counts)}")
    assert counts["equal"] == 10
    assert counts["kills"] >= 15


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return checkpoint.latest(train.train(replace(TRAIN, steps=1, output=folder)))


def test_damaged_checkpoints_are_refused(model, tmp_path):
    whole = model.read_bytes()
    path = tmp_path / "damaged.safetensors"
    counts = Counter()
    for number in range(1200):
        draw = random.Random(number)
        data = bytearray(whole)
        place = draw.randrange(len(data)) if number % 2 else draw.randrange(2000)
        kind = draw.choice(["flip", "cut", "zero", "insert"])
        if kind == "flip":
            data[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[place:]
        elif kind == "zero":
            end = place + draw.randrange(1, 600)
            data[place:end] = bytes(len(data[place:end]))
        else:
            data[place:place] = draw.randbytes(draw.randrange(1, 9))
        path.write_bytes(data)
        counts[f"{kind}: {attempt(checkpoint.load, path) if data != whole else 'unchanged'}"] += 1
    print(f"damaged checkpoints: {dict(counts)}")
    assert not any(name.endswith("read") for name in counts)


def replaced(state, draw, value):
    """Return a nested state with one entry at random replaced."""
    keys = list(state) if isinstance(state, dict) else list(range(len(state)))
    key = draw.choice(keys)
    inner = state[key]
    inner = replaced(inner, draw, value) if isinstance(inner, dict | list) and inner and draw.random() < 0.8 else value
    if isinstance(state, list):
        return [*state[:key], inner, *state[key + 1 :]]
    return {**state, key: inner}


VALUES = [None, True, -1, 10**30, 0.5, "", "x" * 2000, [], {}, [[]], {"a": 1}, "\ud800", torch.ones(3), torch.ones(())]


def test_crafted_checkpoints_are_one_line(model, tmp_path):
    state = checkpoint.load(model)
    path = checkpoint.step_path(tmp_path / "run", 1)
    counts = Counter()
    for number in range(600):
        draw = random.Random(number)
        part = draw.choice(["config", "text", "ema", "step", "attribution"])
        crafted = {**state, part: draw.choice(VALUES)}
        if isinstance(state[part], dict) and draw.random() < 0.9:
            crafted[part] = replaced(state[part], draw, draw.choice(VALUES))
        try:
            checkpoint.save(path, crafted)
        except (InputError, UnicodeEncodeError):
            continue
        counts[f"{part}: {attempt(Sampler.load, path)}"] += 1
    print(f"crafted checkpoints: {dict(counts)}")
    assert sum(counts.values()) > 500


class Harm:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_hostile_weights_run_no_code(tmp_path):
    mark = tmp_path / "harm"
    harms = [
        Harm(os.mkdir, str(mark)),
        Harm(os.system, f"touch {mark}"),
        Harm(eval, f"__import__('os').mkdir({str(mark)!r})"),
        Harm(exec, f"open({str(mark)!r}, 'w')"),
        Harm(open, str(mark), "w"),
        Harm(getattr, Harm(__import__, "os"), "mkdir"),
        Harm(shutil.copytree, str(tmp_path), str(mark)),
        Harm(torch.load, str(mark)),
    ]
    counts = Counter()
    path = tmp_path / "text_encoder1.pth"
    release = Release(path, path, tmp_path / "captions.pickle")
    for harm in harms:
        for wrap in (lambda x: x, lambda x: {"encoder.weight": x}, lambda x: {x: torch.ones(2)}, lambda x: [x, x]):
            for zipped in (True, False):
                torch.save(wrap(harm), path, _use_new_zipfile_serialization=zipped)
                counts[attempt(load_release, release, Vocabulary(["a"]))] += 1
            path.write_bytes(pickle.dumps(wrap(harm)))
            counts[attempt(load_release, release, Vocabulary(["a"]))] += 1
    print(f"hostile weights: {dict(counts)}; code was run {int(mark.exists())} times")
    assert counts == {"refused": 96}
    assert not mark.exists()

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from icsd.data import DataConfig
from icsd.models import DiscriminatorConfig, GeneratorConfig, TextConfig
from icsd.training import memory, train
from icsd.training.config import TrainConfig
from icsd.training.trainer import Trainer

CONFIG = TrainConfig(
    data=DataConfig(name="procedural-flowers", size=24),
    text=TextConfig(dim=8, embedding_dim=8),
    generator=GeneratorConfig(resolutions=[8, 16], width=16, noise_dim=4, condition_dim=4),
    discriminator=DiscriminatorConfig(width=4),
    batch_size=4,
)


@pytest.fixture(scope="module")
def profile():
    return train.profile(CONFIG, steps=2)


def test_every_part_has_a_share(profile):
    parts = ["text encoder", "generator", "discriminator 8", "discriminator 16", "distillation", "matching", "average"]
    assert list(profile.shares) == [*parts, "losses and the rest", "optimizers", "data"]
    assert sum(profile.shares.values()) == pytest.approx(1)
    assert all(share > 0 for share in profile.shares.values())
    assert profile.seconds > 0
    assert profile.peak_memory > 2**20


def test_backward_time_goes_to_the_part_of_the_operation(profile, monkeypatch):
    import time

    import torch

    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(0.2)
            return gradient

    plain = Trainer._matching
    monkeypatch.setattr(Trainer, "_matching", lambda *arguments: SlowBackward.apply(plain(*arguments)))
    assert train.profile(CONFIG, steps=1).shares["matching"] > max(0.6, profile.shares["matching"])


def test_shares_are_laid_out_one_per_line(profile):
    *lines, empty, whole, _ = profile.table().splitlines()
    assert empty == ""
    assert len(lines) == len(profile.shares)
    assert lines[0].startswith("text encoder")
    assert "images/s" in whole
    assert "MiB" in whole


def test_operations_grow_with_the_batch(profile):
    halved = train.profile(dataclasses.replace(CONFIG, batch_size=2), steps=1)
    assert halved.operations > 1e6
    # The products of all images with all captions grow faster than the batch.
    assert 1.8 * halved.operations < profile.operations <= 2.2 * halved.operations


def test_a_rate_of_operations_is_shown_if_they_were_counted(profile):
    shown = dataclasses.replace(profile, operations=3_000_000_000, seconds=0.5).table().splitlines()[-1]
    assert shown == "convolutions and matrix products: 3 GFLOP a step, 6 GFLOP/s"
    assert "FLOP" not in dataclasses.replace(profile, operations=0).table()


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, platform, unit):
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.setattr(memory.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=1 << 20))
    assert memory.peak_memory(torch.device("cpu")) == unit << 20

import json
import sys
import types

import numpy as np
import pytest

from icsd.errors import InputError
from icsd.training.loggers import Loggers, require_wandb
from icsd.training.run_folder import RunFolder

PIXELS = np.zeros((4, 5, 3), dtype=np.uint8)


class Wandb(types.ModuleType):
    """The parts of wandb that are used."""

    def __init__(self):
        super().__init__("wandb")
        self.began, self.logged, self.finished = [], [], 0
        self.util = types.SimpleNamespace(generate_id=lambda: f"id{len(self.began)}")
        self.Image = lambda pixels: ("image", pixels.shape)

    def init(self, **options):
        self.began.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path, "first", "emoji")


def test_metrics_go_to_every_logger(folder, wandb):
    loggers = Loggers(folder, ["tensorboard", "wandb"], {"steps": 3}, step=0)
    loggers.scalars(1, {"loss": 0.5})
    loggers.image(1, "held-out captions", PIXELS)
    loggers.close()
    assert json.loads(folder.metrics_path.read_text()) == {"step": 1, "loss": 0.5}
    assert list((folder.path / "tensorboard").iterdir())
    assert wandb.logged == [(1, {"loss": 0.5}), (1, {"held-out captions": ("image", (4, 5, 3))})]
    assert wandb.finished == 1


def test_a_resumed_run_goes_on_with_its_wandb_run(folder, wandb):
    for step in (0, 4):
        Loggers(folder, ["wandb"], {"steps": 9}, step).close()
    first, second = wandb.began
    assert first["id"] == second["id"] == "id0"
    assert first["name"] == "first"
    assert first["resume"] == "allow"
    assert first["config"] == {"steps": 9}


def test_without_loggers_the_metrics_file_is_written(folder):
    loggers = Loggers(folder, [], {}, step=0)
    loggers.scalars(2, {"loss": 1.0})
    loggers.image(2, "grid", PIXELS)
    loggers.close()
    assert sorted(path.name for path in folder.path.iterdir()) == ["metrics.jsonl"]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"loggers holds wandb, .*pip install wandb"):
        require_wandb()

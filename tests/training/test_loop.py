import json
import time
from types import SimpleNamespace

import torch

from icsd.training.config import TrainConfig
from icsd.training.loop import Command, Event, Loop
from icsd.training.run_folder import RunFolder


def test_a_rank_that_does_not_log_reads_no_metrics(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics_path.write_text('{"step": 20, "cpu_seco')  # cut off, until the first rank drops it
    follower, trainer = SimpleNamespace(leads=False, first=lambda action: action()), SimpleNamespace(step_count=20)
    loop = Loop(
        TrainConfig(steps=20), trainer, folder, lambda *steps: [], Command("train", "image", ()), 1, team=follower
    )
    loop.run()
    assert loop.stopwatch.read()["seconds"] < 100


def test_the_rate_of_images_is_that_of_the_steps_alone(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    class Trainer(SimpleNamespace):
        def step(self, batches):
            wait(2)
            self.step_count += 1
            return {"generator/adversarial": torch.ones(())}

    trainer = Trainer(step_count=0, named_parameters=list, state_dict=dict)
    batches = [SimpleNamespace(captions=["a bird", "a flower", "a bird"])]
    Loop(
        TrainConfig(steps=4, log_every=2, checkpoint_every=1, loggers=[]),
        trainer,
        RunFolder(tmp_path),
        lambda start, stop: [batches] * (stop - start),
        Command("train", "image", ()),
        1,
        events=[Event(1, lambda: wait(100))],
    ).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in lines] == [1.5, 1.5]
    assert [line["seconds"] for line in lines] == [4, 8]

from types import SimpleNamespace

from icsd.training.config import TrainConfig
from icsd.training.loop import Command, Loop
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

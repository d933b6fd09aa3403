from pathlib import Path

import pytest

from icsd.errors import InputError
from icsd.training import train
from icsd.training.profile import Profile


def test_shares_are_printed_and_nothing_is_written(icsd, workplace):
    before = sorted(Path().iterdir())
    code, out, err = icsd("profile", "--config", "tiny.yaml", "--profile-steps", "1")
    assert code == 0, err
    for part in ("generator", "discriminator 16", "distillation", "optimizers", "images/s"):
        assert part in out
    assert sorted(Path().iterdir()) == before


def test_no_steps_are_refused(fails, workplace):
    assert "--profile-steps is 0" in fails("profile", "--config", "tiny.yaml", "--profile-steps", "0")


@pytest.mark.parametrize("option", ["--steps", "--log-every", "--checkpoint_every", "--optimizer.warmup", "--name"])
def test_options_without_effect_are_refused(fails, workplace, option):
    assert f"takes no {option}" in fails("profile", "--config", "tiny.yaml", option, "3")


def test_what_a_file_says_of_logs_and_scores_needs_no_package(icsd, workplace, monkeypatch):
    def missing(*arguments):
        raise InputError("a package is missing")

    monkeypatch.setattr(train, "require_wandb", missing)
    monkeypatch.setattr(train, "lite0_files", missing)
    monkeypatch.setattr(train, "profile_training", lambda *arguments: Profile(1.0, 4, 0, {"generator": 1.0}, 0))
    Path("scored.yaml").write_text("base: tiny.yaml\nloggers: [wandb]\nevaluate_every: 5\n", encoding="utf-8")
    code, _, err = icsd("profile", "--config", "scored.yaml", "--profile-steps", "1")
    assert code == 0, err

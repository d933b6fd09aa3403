from pathlib import Path

import pytest


def test_shares_are_printed_and_nothing_is_written(icsd, workplace):
    before = sorted(Path().iterdir())
    code, out, err = icsd("profile", "--config", "tiny.yaml", "--profile-steps", "1")
    assert code == 0, err
    for part in ("generator", "discriminator 16", "distillation", "optimizers", "images/s"):
        assert part in out
    assert sorted(Path().iterdir()) == before


def test_no_steps_are_refused(fails, workplace):
    assert "--profile-steps is 0" in fails("profile", "--config", "tiny.yaml", "--profile-steps", "0")


@pytest.mark.parametrize("option", ["--steps", "--log-every", "--checkpoint_every", "--optimizer.warmup"])
def test_options_without_effect_are_refused(fails, workplace, option):
    assert f"takes no {option}" in fails("profile", "--config", "tiny.yaml", option, "3")

from pathlib import Path


def test_shares_are_printed_and_nothing_is_written(icsd, workplace):
    before = sorted(Path().iterdir())
    code, out, err = icsd("profile", "--config", "tiny.yaml", "--profile_steps", "1")
    assert code == 0, err
    for part in ("generator", "discriminator 16", "distillation", "optimizers", "images/s"):
        assert part in out
    assert sorted(Path().iterdir()) == before


def test_no_steps_are_refused(fails, workplace):
    assert "profile_steps is 0" in fails("profile", "--config", "tiny.yaml", "--profile_steps", "0")

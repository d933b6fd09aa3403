from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "pretrain").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_are_valid(icsd, path):
    code, _, err = icsd("pretrain", "--config", str(path), "--print-config")
    assert code == 0, err


def test_help_explains_every_key(icsd):
    code, out, _ = icsd("pretrain", "--help")
    assert code == 0
    for text in ("--image.weights", "Gamma 1", "inception_v3_google-0cc3c7bd.pth", "--resume RUN"):
        assert text in out


def test_missing_weights_are_named(icsd, tmp_path):
    options = ["--data.name", "procedural-birds", "--data.size", "10", "--output", str(tmp_path)]
    code, _, err = icsd("pretrain", *options, "--resolution", "16")
    assert code == 2
    assert "image.weights is missing" in err
    assert not any(tmp_path.iterdir())

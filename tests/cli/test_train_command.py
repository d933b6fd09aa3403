import itertools
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from icsd.training import checkpoint

RUN = Path("runs/procedural-flowers")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
ABLATIONS = sorted((CONFIGS[0].parent / "ablations").glob("*.yaml"))


def test_a_configuration_trains_and_resumes_with_its_own_values(icsd, workplace):
    code, out, _ = icsd("train", "--config", "tiny.yaml", "--steps", "2", "--generator.width", "2")
    assert code == 0
    assert "step-00000002.safetensors" in out
    assert yaml.safe_load((RUN / "config.yaml").read_text())["generator"]["width"] == 2

    code, _, err = icsd("train", "--resume", str(RUN), "--steps", "3")
    assert code == 0, err
    state = checkpoint.load(checkpoint.latest(RUN), ["step", "config"])
    assert state["step"] == 3
    assert state["config"]["generator"]["width"] == 2


def test_the_folder_of_checkpoints_resumes_its_run(icsd, workplace):
    assert icsd("train", "--config", "tiny.yaml", "--steps", "1", "--generator.width", "2")[0] == 0
    code, _, err = icsd("train", "--resume", str(RUN / "checkpoints"), "--steps", "2")
    assert code == 0, err
    names = sorted(path.name for path in (RUN / "checkpoints").iterdir())
    assert names == ["step-00000001.safetensors", "step-00000002.safetensors"]


def test_a_lost_configuration_is_that_of_the_checkpoint_and_a_dry_run_writes_none(icsd, workplace):
    assert icsd("train", "--config", "tiny.yaml", "--steps", "1", "--generator.width", "2")[0] == 0
    (RUN / "config.yaml").unlink()
    code, out, err = icsd("train", "--resume", str(RUN), "--steps", "2", "--dry-run")
    assert code == 0, err
    assert f"note         {RUN / 'config.yaml'} is missing or empty; the configuration is that of" in out
    assert not (RUN / "config.yaml").exists()
    code, _, err = icsd("train", "--resume", str(RUN), "--steps", "2")
    assert code == 0, err
    assert yaml.safe_load((RUN / "config.yaml").read_text())["generator"]["width"] == 2


@pytest.mark.parametrize("option", ["--name", "--output"])
def test_a_resumed_run_stays_in_its_folder(fails, workplace, option):
    message = fails("train", "--resume", "runs/r", option, "other")
    assert message == f"{option} cannot be given with --resume runs/r, which goes on in its own folder: leave it out"


def test_a_run_without_a_checkpoint_starts_again_with_its_own_values(icsd, workplace):
    assert icsd("train", "--config", "tiny.yaml", "--steps", "1", "--generator.width", "2")[0] == 0
    checkpoint.latest(RUN).unlink()
    code, out, err = icsd("train", "--resume", str(RUN))
    assert code == 0, err
    assert f"note         {RUN} holds no checkpoint, since" in out
    assert checkpoint.load(checkpoint.latest(RUN), ["config"])["config"]["generator"]["width"] == 2
    for path in (*(RUN / "checkpoints").iterdir(), RUN / "config.yaml"):
        path.unlink()
    code, _, err = icsd("train", "--resume", str(RUN))
    assert code == 2
    assert "holds no checkpoint" in err


def test_print_config_gives_a_file_that_gives_the_same(icsd, workplace):
    code, out, _ = icsd("train", "--config", "tiny.yaml", "--batch-size", "5", "--print-config")
    assert code == 0
    assert yaml.safe_load(out)["batch_size"] == 5
    Path("mine.yaml").write_text(out)
    assert icsd("train", "--config", "mine.yaml", "--print-config")[1] == out


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_of_the_repository_are_valid(icsd, path):
    code, _, err = icsd("train", "--config", str(path), "--print-config")
    assert code == 0, err


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("base", ["emoji", "birds"])
def test_an_ablation_overrides_what_it_is_about_and_nothing_else(icsd, base, path):
    files = ["--config", str(CONFIGS[0].with_name(f"{base}.yaml"))]
    before = yaml.safe_load(icsd("train", *files, "--print-config")[1])
    code, out, err = icsd("train", *files, "--config", str(path), "--print-config")
    assert code == 0, err
    after, asked = yaml.safe_load(out), yaml.safe_load(path.read_text())
    assert after == _merged(before, asked)


def _merged(base, over):
    return base | {key: _merged(base[key], value) if isinstance(value, dict) else value for key, value in over.items()}


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_trains(icsd, workplace, path):
    code, out, err = icsd("train", "--config", "tiny.yaml", "--config", str(path), "--dry-run")
    assert code == 0, err
    sides = {"none": (), "generator": ("generator",), "discriminator": ("discriminator",)}
    for side in ("generator", "discriminator"):
        assert (f"{side}/distillation" in out) == (side in sides.get(path.stem, ("generator", "discriminator")))
    assert ("discriminator/matching_penalty" in out) == (path.stem == "hinge")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "few"], '"steps"'),
        (["--steps", "0"], "steps is 0"),
        (["--data.name", "generations"], '"data.name"'),
        (["--generator.depth", "3"], "--generator.depth"),
        (["--generator.resolutions", "[16,48]"], "generator.resolutions is [16, 48]"),
        (["--distillation.generator.loss", "l1"], "distillation.*.loss"),
        (["--losses.generator.matching", "-1"], "losses.generator.matching is -1"),
        (["--optimizer.kl-weight", "0.5"], "optimizer.kl_weight is now losses.generator.condition_kl"),
        (["--distillation.enabled=false"], "distillation.enabled is now losses.generator.distillation and losses"),
        (["--device", "tpu"], "device is 'tpu'"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--config", "typo.yaml"], "data.nam"),
        (["--config", "broken.yaml"], "config"),
        (["--resume", "absent"], "no run folder at absent"),
        (["--data.name", "folder"], "data.root"),
        (["--data.name", "folder", "--data.root", "absent"], "data.root=absent"),
        (["--config", "list.yaml"], "list.yaml is not a list of `key: value`"),
        (["--config", "binary.yaml"], "binary.yaml is not YAML"),
        (["--config", "bomb.yaml"], "bomb.yaml holds more than 100,000 values"),
        (["--config", "deep.yaml"], "deep.yaml is nested too deeply"),
        (["--config", "itself.yaml"], "itself.yaml is nested too deeply, or contains itself"),
        (["--config", "large.yaml"], "large.yaml is larger than 1,048,576 bytes"),
        (["--config", "old.yaml"], "old.yaml has configuration keys of an earlier version: out is now output; discrim"),
        (["--config", "own.yaml"], "own.yaml extends itself"),
        (["--config", "newer.yaml"], "old.yaml has configuration keys of an earlier version"),
        (["--config", "orphan.yaml"], "absent.yaml"),
        (["--out", "here"], "the command line has configuration keys of an earlier version: out is now output"),
    ],
)
def test_errors_name_the_key_and_leave_nothing_behind(fails, workplace, arguments, message):
    Path("typo.yaml").write_text("data: {nam: emoji}")
    Path("broken.yaml").write_text("steps: [1")
    Path("list.yaml").write_text("- steps")
    Path("binary.yaml").write_bytes(bytes(range(255)))
    Path("bomb.yaml").write_text("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(_tenfold("abcdefghij")))
    Path("deep.yaml").write_text("[" * 100_000)
    Path("itself.yaml").write_text("a: &a [*a]")
    Path("large.yaml").write_text("# " + "x" * (1 << 20))
    Path("old.yaml").write_text("out: here\ndiscriminator: {normalisation: none}")
    Path("own.yaml").write_text("base: own.yaml")
    Path("newer.yaml").write_text("base: old.yaml\nsteps: 3")
    Path("orphan.yaml").write_text("base: absent.yaml\nsteps: 3")
    before = sorted(Path().iterdir())
    config = [] if "--config" in arguments else ["--config", "tiny.yaml"]
    assert message in fails("train", *config, *arguments)
    assert sorted(Path().iterdir()) == before


def test_a_configuration_extends_its_base(icsd, workplace):
    Path("base").mkdir()
    Path("base/large.yaml").write_text("batch_size: 20\ngenerator: {width: 64}\nsteps: 5")
    Path("mine.yaml").write_text("base: base/large.yaml\nsteps: 7\ngenerator: {residual_blocks: 2}")
    code, out, err = icsd("train", "--config", "mine.yaml", "--batch-size", "9", "--print-config")
    assert code == 0, err
    config = yaml.safe_load(out)
    assert (config["batch_size"], config["steps"]) == (9, 7)
    assert (config["generator"]["width"], config["generator"]["residual_blocks"]) == (64, 2)


def _tenfold(names):
    """Yield lines that each repeat the line before it ten times by its alias."""
    return (f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in itertools.pairwise(names))


@pytest.mark.parametrize("option", ["--batch-size", "--batch_size", "--generator.residual-blocks=5", "--data.flip"])
def test_options_are_spelled_with_dashes_and_underscores_are_accepted(icsd, option):
    value = [] if "=" in option or "flip" in option else ["5"]
    code, out, err = icsd("train", option, *value, "--print-config")
    assert code == 0, err
    config = yaml.safe_load(out)
    assert 5 in (config["batch_size"], config["generator"]["residual_blocks"]) or config["data"]["flip"] is True


@pytest.mark.parametrize("command", [["train"], ["pretrain"], ["profile"], ["sample"], ["data", "preview"]])
def test_help_shows_dashes_only(icsd, command):
    shown = icsd(*command, "--help")[1]
    options = re.findall(r"(?<![\w`])--[\w.+-]+", shown)
    assert "--help" in options
    assert not [option for option in options if "_" in option]


def test_an_unknown_backend_lists_the_known_ones(program, workplace):
    command = [*program, "train", "--config", "tiny.yaml"]
    environment = os.environ | {"ICSD_BACKEND": "abacus"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "'abacus' is unknown" in run.stderr
    assert "'reference'" in run.stderr
    assert not Path("runs").exists()


def test_resuming_refuses_another_configuration(icsd, workplace):
    icsd("train", "--config", "tiny.yaml", "--steps", "1")
    before = (RUN / "config.yaml").read_text()
    code, _, err = icsd("train", "--resume", str(RUN), "--steps", "2", "--text.dim", "16")
    assert code == 2
    assert "text.dim (checkpoint: 8, now: 16)" in err
    assert (RUN / "config.yaml").read_text() == before


def test_resuming_refuses_a_damaged_checkpoint(icsd, workplace):
    icsd("train", "--config", "tiny.yaml", "--steps", "1")
    path = checkpoint.latest(RUN)
    path.write_bytes(path.read_bytes()[:1000])
    code, _, err = icsd("train", "--resume", str(RUN), "--steps", "2")
    assert code == 2
    assert f"checkpoint {path} is truncated" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_resume(icsd, program, workplace, number):
    process = subprocess.Popen(
        [*program, "train", "--config", "tiny.yaml", "--steps", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (RUN / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "icsd train --resume runs/procedural-flowers" in err
    step = checkpoint.load(checkpoint.latest(RUN), ["step"])["step"]
    assert icsd("train", "--resume", str(RUN), "--steps", str(step + 1))[0] == 0

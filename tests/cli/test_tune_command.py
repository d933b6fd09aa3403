import pytest
import torch
from filelock import FileLock

from icsd.losses import LOSSES
from icsd.ops import tuning
from icsd.ops.verdicts import verdicts_of


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICSD_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "idle", tuning.idle)
    verdicts_of.cache_clear()
    yield tmp_path
    verdicts_of.cache_clear()


SMALL = ("tune", "--samples", "5", "--dim", "60", "--device", "cpu")


def test_verdicts_are_measured_and_shown(icsd, cache):
    code, out, err = icsd(*SMALL, "--loss", "mse", "kl")
    assert (code, err) == (0, "")
    *lines, path = out.splitlines()
    keys = [f"{loss}, training, 2 x float32, 1 x 16 x 1024" for loss in ("mse", "kl")]
    assert [line.split(": ")[0] for line in lines] == keys
    for line in lines:
        assert all(f"{name} " in line for name in ("composite", "reference"))
        assert " ms" in line
    report = icsd("doctor")[1]
    assert f"2 classes of calls were measured, kept in {path}" in report
    assert f"  {lines[0]}\n" in report


def test_a_corrupt_cache_is_reported_and_written_anew(icsd):
    path = verdicts_of(torch.device("cpu"), torch.get_num_threads()).path
    path.parent.mkdir()
    path.write_text("{")
    verdicts_of.cache_clear()
    code, out, err = icsd("doctor")
    assert (code, err) == (0, "")
    assert f"tuning          {path} holds no verdicts that can be read (JSONDecodeError: " in out
    with pytest.warns(RuntimeWarning, match="can be read"):
        assert icsd(*SMALL)[0] == 0
    verdicts_of.cache_clear()
    assert "1 classes of calls were measured" in icsd("doctor")[1]


def test_only_one_process_measures(fails):
    path = verdicts_of(torch.device("cpu"), torch.get_num_threads()).path
    path.parent.mkdir()
    with FileLock(path.with_suffix(".lock")) as lock:
        assert fails(*SMALL) == f"another process is measuring, and holds {lock.lock_file}: wait for it"


def test_sizes_and_devices_that_cannot_be_measured(fails):
    assert fails(*SMALL, "--samples", "5", "3").startswith("--samples is 3: give at least 4")
    assert fails(*SMALL, "--dim", "0").startswith("--dim is 0: give at least 1")
    assert "--device is tpu, which cannot be used here: " in fails("tune", "--device", "tpu")


def test_a_wrong_setting_is_a_problem(icsd, monkeypatch):
    from icsd.ops import tuning

    tuning.setting.cache_clear()
    monkeypatch.setenv("ICSD_TUNE", "yes")
    code, out, _ = icsd("doctor")
    tuning.setting.cache_clear()
    assert code == 1
    assert "\n  ICSD_TUNE is 'yes': set 1 to measure calls" in out


def test_the_help_names_every_loss_and_dtype(icsd):
    words = icsd("tune", "--help")[1].replace(",", " ").split()
    assert {*LOSSES, "float32", "float64", "bfloat16", "float16"} <= {*words}

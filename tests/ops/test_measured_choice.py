"""The measured choice of a backend, with backends that take the time of a stubbed clock."""

import json
import warnings

import pytest
import torch
from filelock import FileLock
from torch.utils.checkpoint import checkpoint

import icsd
from icsd.losses import MSE
from icsd.ops import registry, tuning
from icsd.ops.reference import ReferenceBackend
from icsd.ops.verdicts import call_class, verdicts_of


class Stub(ReferenceBackend):
    """A backend that takes some seconds of the stubbed clock and whose result is a multiple of the right one."""

    clock = 0.0

    def __init__(self, name, seconds, factor=1.0):
        self.name, self.seconds, self.factor, self.calls = name, seconds, factor, 0

    def distill(self, *call):
        self.calls += 1
        Stub.clock += self.seconds
        if self.factor is None:
            raise RuntimeError("no kernel image is available\nfor execution on the device")
        return self.factor * super().distill(*call)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("ICSD_CACHE", str(tmp_path / "cache"))
    verdicts_of.cache_clear()
    yield tmp_path / "cache"
    verdicts_of.cache_clear()


@pytest.fixture
def stubs(cache, monkeypatch):
    """The preferred backend, which takes 3 seconds, one that takes 1, and the definition, which takes 5."""
    monkeypatch.setattr(tuning, "now", lambda device: Stub.clock)
    found = {name: Stub(name, seconds) for name, seconds in (("cpu", 3.0), ("composite", 1.0), ("reference", 5.0))}
    with (
        registry.temporarily(found["cpu"]),
        registry.temporarily(found["composite"]),
        registry.temporarily(found["reference"]),
    ):
        yield found


def restarted(setting, monkeypatch):
    """Forget what this process knows, and set `ICSD_TUNE`."""
    verdicts_of.cache_clear()
    monkeypatch.setattr(tuning, "setting", lambda: setting)
    monkeypatch.setattr(tuning, "idle", False)


def taken(stubs, samples=16, **options):
    """Return the name of the backend that a training step takes, after its measurements."""
    student, teacher = torch.randn(samples, 40, requires_grad=True), torch.randn(samples, 50)
    icsd.similarity_distillation_loss(student, teacher, **options)
    before = {name: stub.calls for name, stub in stubs.items()}
    icsd.similarity_distillation_loss(student, teacher, **options).backward()
    assert student.grad.abs().sum() > 0
    (name,) = [name for name, stub in stubs.items() if stub.calls > before[name]]
    return name


def calls(stubs):
    return sum(stub.calls for stub in stubs.values())


def verdict_file(cache):
    (path,) = (cache / "tuning").glob("*.json")
    return path


def test_a_verdict_is_kept_and_followed_by_later_processes(stubs, cache, monkeypatch):
    restarted("1", monkeypatch)
    assert taken(stubs) == "composite"
    content = json.loads(verdict_file(cache).read_text())
    assert content["environment"]["torch"] == torch.__version__
    key = "mse, training, 2 x float32, 1 x 16 x 1024"
    seconds = {"cpu": 3.0, "composite": 1.0, "reference": 5.0}
    assert content["verdicts"] == {key: {"backend": "composite", "seconds": seconds, "refused": {}}}
    restarted("", monkeypatch)
    before = calls(stubs)
    assert taken(stubs) == "composite"
    assert calls(stubs) == before + 2  # nothing was measured
    assert taken(stubs, loss="kl") == "cpu"  # another class
    restarted("0", monkeypatch)
    assert taken(stubs) == "cpu"


def test_nothing_is_measured_by_default(stubs, cache, monkeypatch):
    restarted("", monkeypatch)
    assert taken(stubs) == "cpu"
    assert calls(stubs) == 2
    assert not cache.exists()


@pytest.mark.parametrize("factor", [None, float("nan"), 1.001])
def test_a_backend_that_fails_or_differs_is_left_out(stubs, factor, monkeypatch):
    restarted("1", monkeypatch)
    stubs["composite"].factor = factor
    assert taken(stubs) == "cpu"
    assert stubs["composite"].calls == 1
    (verdict,) = verdicts_of(torch.device("cpu"), torch.get_num_threads()).values()
    why = "fails (RuntimeError: no kernel image is available for execution on the device)"
    assert verdict.refused == {"composite": why if factor is None else "gives another result"}
    assert verdict.seconds == {"cpu": 3.0, "reference": 5.0}


def test_the_definition_decides_about_the_preferred_backend(stubs, monkeypatch):
    restarted("1", monkeypatch)
    stubs["cpu"].factor = 2.0
    assert taken(stubs) == "composite"


def test_a_small_gain_changes_nothing(stubs, monkeypatch):
    restarted("1", monkeypatch)
    stubs["composite"].seconds = 2.9
    assert taken(stubs) == "cpu"


def test_one_slow_round_changes_nothing(stubs, monkeypatch):
    restarted("1", monkeypatch)
    stubs["cpu"].seconds = 0.9

    def now(device):
        Stub.clock += 100.0 * (stubs["cpu"].calls == 2)  # at the end of the first round
        return Stub.clock

    monkeypatch.setattr(tuning, "now", now)
    assert taken(stubs) == "cpu"


def test_smaller_last_batches_are_measured_at_most_once(stubs, monkeypatch):
    restarted("1", monkeypatch)
    measured = []
    plain = tuning.measure
    monkeypatch.setattr(tuning, "measure", lambda call, training: measured.append(call) or plain(call, training))
    for samples in [64, 64, 37, 64, 64, 11, 64, 5, 1]:
        icsd.similarity_distillation_loss(torch.randn(samples, 40, requires_grad=True), torch.randn(samples, 50))
    assert [len(call.stages[0]) for call in measured] == [64, 11]


def test_classes():
    float32, bfloat16 = torch.float32, torch.bfloat16
    key = call_class("kl", False, True, ((3, 2, 17, 5000), (3, 2, 17, 70000)), (bfloat16, float32))
    assert key == "kl centered, inference, 1 x bfloat16 + 1 x float32, 16 x 64 x 262144"
    assert call_class("mse", True, False, ((0, 0), (0, 3)), (float32, float32)).endswith("1 x 16 x 1024")


def test_no_measurement_where_it_would_disturb(stubs, monkeypatch):
    restarted("1", monkeypatch)
    monkeypatch.setattr(tuning, "_is_capturing", lambda device: True)
    assert taken(stubs) == "cpu"
    monkeypatch.setattr(tuning, "_is_capturing", lambda device: False)
    torch.use_deterministic_algorithms(True)
    try:
        assert taken(stubs) == "cpu"
    finally:
        torch.use_deterministic_algorithms(False)
    assert taken(stubs, backend="cpu") == "cpu"
    with icsd.use_backend("reference"):
        assert taken(stubs) == "reference"
    with monkeypatch.context() as traced:
        traced.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
        assert taken(stubs) == "cpu"
    torch.func.grad(icsd.similarity_distillation_loss)(torch.randn(16, 40), torch.randn(16, 50))
    assert stubs["composite"].calls == 0
    assert taken(stubs) == "composite"
    monkeypatch.setattr(tuning, "_is_capturing", lambda device: True)
    assert taken(stubs) == "composite"  # the one that ran before the capture


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"environment": 3',
        "\xff\x00",
        "[" * 100000,
        {"verdicts": 3},
        {"verdicts": {"k": {}}},
        {"verdicts": {"k": {"backend": "cpu", "seconds": {"cpu": "fast"}, "refused": {}}}},
    ],
    ids=range(8),
)
def test_the_order_decides_and_one_line_tells_if_a_cache_is_corrupt(stubs, cache, content, monkeypatch):
    verdicts = verdicts_of(torch.device("cpu"), torch.get_num_threads())
    if isinstance(content, dict):
        content = json.dumps({"environment": verdicts.environment, **content})
    verdicts.path.parent.mkdir(parents=True)
    verdicts.path.write_text(content, encoding="latin-1")
    restarted("", monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"^[^\n]*holds no verdicts that can be read [^\n]*$") as told:
        assert taken(stubs) == "cpu"
    assert len(told) == 1
    restarted("1", monkeypatch)
    with pytest.warns(RuntimeWarning, match="can be read"):
        assert taken(stubs) == "composite"
    restarted("", monkeypatch)
    assert taken(stubs) == "composite"


def test_a_foreign_cache_and_an_unknown_backend_are_not_followed(stubs, cache, monkeypatch):
    restarted("1", monkeypatch)
    taken(stubs)
    path = verdict_file(cache)
    kept = path.read_text()
    for foreign in (kept.replace(torch.__version__, "0.0"), kept.replace('"composite",', '"abacus",')):
        assert foreign != kept
        path.write_text(foreign)
        restarted("", monkeypatch)
        assert taken(stubs) == "cpu"


def test_a_folder_that_cannot_be_written_keeps_nothing(stubs, cache, monkeypatch):
    cache.write_text("in the way")
    restarted("1", monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"^[^\n]*keeps no verdicts [^\n]*lost when this process ends$") as told:
        assert taken(stubs) == "composite"
    assert len(told) == 1
    assert cache.read_text() == "in the way"


def test_the_order_decides_while_another_process_measures(stubs, cache, monkeypatch):
    restarted("1", monkeypatch)
    path = verdicts_of(torch.device("cpu"), torch.get_num_threads()).path
    path.parent.mkdir(parents=True)
    with FileLock(path.with_suffix(".lock")):
        assert taken(stubs) == "cpu"
    assert stubs["composite"].calls == 0
    assert taken(stubs) == "cpu"  # no second try in this process
    restarted("1", monkeypatch)
    assert taken(stubs) == "composite"


def test_verdicts_of_other_processes_stay(stubs, cache, monkeypatch):
    restarted("1", monkeypatch)
    mine = verdicts_of(torch.device("cpu"), torch.get_num_threads())
    verdicts_of.cache_clear()
    taken(stubs, loss="kl")
    call = tuning.Call([torch.randn(16, 40), torch.randn(16, 50)], [1.0], MSE(), 1e-8, False)
    assert tuning.tune(mine, call)
    assert len(json.loads(verdict_file(cache).read_text())["verdicts"]) == 2


def test_measurements_leave_random_numbers_hooks_and_inputs_alone(stubs, monkeypatch):
    restarted("1", monkeypatch)
    student, teacher = torch.full((16, 40), torch.nan, requires_grad=True), torch.randn(16, 50)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = checkpoint(icsd.similarity_distillation_loss, student, teacher, use_reentrant=False)
    value.backward()  # the checkpoint compares what both passes have saved
    (verdict,) = verdicts_of(torch.device("cpu"), torch.get_num_threads()).values()
    assert verdict.backend == "composite"
    assert torch.equal(torch.get_rng_state(), state)


def test_a_function_as_a_loss_is_not_measured(stubs, monkeypatch):
    restarted("1", monkeypatch)
    called = []

    def loss(similarity, target):
        called.append(similarity.shape)
        return (similarity - target).square().mean((-2, -1))

    assert taken(stubs, loss=loss) == "cpu"
    assert called == [(16, 16)] * 2  # by the two calls of `taken`


def test_large_matrices_are_not_kept_because_of_a_verdict(stubs, monkeypatch):
    restarted("1", monkeypatch)
    assert taken(stubs, samples=40) == "composite"
    monkeypatch.setattr(tuning, "KEPT_BYTES", 1 << 10)
    monkeypatch.setattr(stubs["cpu"], "regimes", {"mse": ("streamed",)}, raising=False)
    assert taken(stubs, samples=40) == "cpu"


def test_large_matrices_are_not_kept_for_a_measurement(cache, monkeypatch):
    call = tuning.Call([torch.empty(4000, 3), torch.empty(4000, 3)], [1.0], MSE(), 1e-8, False)
    assert [backend.name for backend in tuning.candidates(call)] == ["cpu", "composite", "reference"]
    monkeypatch.setattr(tuning, "KEPT_BYTES", 1 << 20)
    assert [backend.name for backend in tuning.candidates(call)] == ["cpu"]


@pytest.mark.parametrize(
    ("setting", "kept", "idle"), [("", False, True), ("", True, False), ("1", False, False), ("0", True, True)]
)
def test_calls_look_for_no_verdict_where_there_is_none(cache, setting, kept, idle, monkeypatch):
    monkeypatch.setenv("ICSD_TUNE", setting)
    if kept:
        (cache / "tuning").mkdir(parents=True)
    assert tuning.is_idle() == idle


def test_a_cache_folder_that_cannot_be_asked_for_holds_no_verdicts(monkeypatch):
    monkeypatch.delenv("ICSD_TUNE", raising=False)
    monkeypatch.setenv("ICSD_CACHE", "too long" * 1000)
    assert tuning.is_idle()


def test_a_measurement_ends_idleness(stubs, monkeypatch):
    restarted("", monkeypatch)
    monkeypatch.setattr(tuning, "idle", True)
    call = tuning.Call([torch.randn(16, 40, requires_grad=True), torch.randn(16, 50)], [1.0], MSE(), 1e-8, False)
    tuning.tune(verdicts_of(torch.device("cpu"), torch.get_num_threads()), call)
    assert taken(stubs) == "composite"


def test_another_setting_is_an_error(monkeypatch):
    tuning.setting.cache_clear()
    monkeypatch.setenv("ICSD_TUNE", "yes")
    monkeypatch.setattr(tuning, "idle", tuning.is_idle())
    with pytest.raises(ValueError, match="ICSD_TUNE is 'yes': set 1"):
        icsd.similarity_distillation_loss(torch.ones(4, 2), torch.ones(4, 2))
    tuning.setting.cache_clear()

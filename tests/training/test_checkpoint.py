import contextlib
import json
import os
import random
import zlib

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from icsd.errors import InputError
from icsd.training import checkpoint


def small_state():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.5, 0.999))
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 7,
        "config": {"seed": 0, "data": {"name": "emoji", "root": None}},
        "vocabulary": ["woman", "Ärztin", "消防士"],
        "losses": [torch.tensor(1.5, dtype=torch.bfloat16), {"nested": torch.arange(3)}],
    }


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_round_trip(tmp_path):
    state = small_state()
    checkpoint.save(tmp_path / "a.safetensors", state)
    assert_same(state, checkpoint.load(tmp_path / "a.safetensors"))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_one_state_gives_one_file(tmp_path):
    state = small_state()
    for name in "ab":
        checkpoint.save(tmp_path / name, state)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_optimizer_accepts_what_was_read(tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", small_state())
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.load_state_dict(checkpoint.load(tmp_path / "a.safetensors")["optimizer"])
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()


def test_strided_tensors_keep_their_values(tmp_path):
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {"image": image, "transposed": torch.randn(3, 5).T, "expanded": torch.ones(1).expand(4)}
    checkpoint.save(tmp_path / "a.safetensors", state)
    assert_same(state, checkpoint.load(tmp_path / "a.safetensors"))


def test_only_the_chosen_entries_are_read(tmp_path):
    checkpoint.save(tmp_path / "a.safetensors", small_state())
    assert set(checkpoint.load(tmp_path / "a.safetensors", ["step", "model"])) == {"step", "model"}
    with pytest.raises(InputError, match="no entry ema"):
        checkpoint.load(tmp_path / "a.safetensors", ["ema"])


def test_what_json_cannot_hold_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(TypeError, match="config/when, a set"):
        checkpoint.save(tmp_path / "a.safetensors", {"config": {"when": {1}}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", ["write", "sync"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_other_file(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, {"step": 1, "x": torch.ones(3)})

    def full_write(tensors, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    def full_sync(handle):
        raise OSError(28, "No space left on device")

    if failing == "write":
        monkeypatch.setattr(checkpoint, "save_file", full_write)
    else:
        monkeypatch.setattr(os, "fsync", full_sync)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(path, {"step": 2, "x": torch.zeros(3)})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert_same(checkpoint.load(path), {"step": 1, "x": torch.ones(3)})


def test_the_permissions_of_a_checkpoint_are_those_that_the_user_sets(tmp_path):
    before = os.umask(0o077)
    try:
        checkpoint.save(tmp_path / "a.safetensors", {"step": 1})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint at .*absent\.safetensors"):
        checkpoint.load(tmp_path / "absent.safetensors")


def test_a_truncated_file_is_named_wherever_it_was_cut(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small_state())
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"a\.safetensors is truncated"):
            checkpoint.load(path)


def test_foreign_files_are_refused(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "pickle.pt")
    with pytest.raises(InputError, match=r"pickle\.pt is truncated or not a \.safetensors file"):
        checkpoint.load(tmp_path / "pickle.pt")
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="not a checkpoint of icsd"):
        checkpoint.load(tmp_path / "other.safetensors")


def test_another_format_version_is_refused(tmp_path):
    header = {"format": 99, "icsd": "9.9", "contents": {}}
    save_file({}, tmp_path / "new.safetensors", {"icsd_checkpoint": json.dumps(header)})
    with pytest.raises(InputError, match=r"format version 99, written by icsd 9\.9"):
        checkpoint.load(tmp_path / "new.safetensors")


def test_differing_keys_are_named():
    saved = {"seed": 0, "steps": 10, "model": {"width": 32, "stages": [16, 32]}}
    checkpoint.check_config("a", saved, saved)
    checkpoint.check_config("a", saved, {**saved, "steps": 20}, free=["steps"])
    checkpoint.check_config("a", saved, {**saved, "model": {}}, free=["model"])
    with pytest.raises(InputError, match=r"model\.width \(checkpoint: 32, now: 64\), steps"):
        checkpoint.check_config("a", saved, {**saved, "steps": 20, "model": {"width": 64, "stages": [16, 32]}})


@pytest.mark.parametrize(("value", "message"), [(3, None), (4, r"model\.depth \(checkpoint: 3, now: 4\)\.")])
def test_a_key_that_is_newer_than_the_checkpoint_may_have_its_default(value, message):
    saved = {"model": {"width": 32}}
    wanted, defaults = {"model": {"width": 32, "depth": value}}, {"model": {"width": 8, "depth": 3}, "steps": 7}
    with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
        checkpoint.check_config("a", saved, wanted, defaults=defaults)


def test_latest_and_prune_go_by_step(tmp_path):
    with pytest.raises(InputError, match="no run folder at"):
        checkpoint.latest(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no checkpoint"):
        checkpoint.latest(tmp_path)
    for step in (5, 100_000_000, 20):
        checkpoint.save(checkpoint.step_path(tmp_path, step), {"step": step})
    (tmp_path / "checkpoints" / "notes.txt").write_text("kept")
    assert checkpoint.load(checkpoint.latest(tmp_path))["step"] == 100_000_000
    checkpoint.prune(tmp_path, keep=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["notes.txt", "step-00000020.safetensors", "step-100000000.safetensors"]


def run_of(runs, name, entry, step=1):
    """Write a run folder with one checkpoint that has an entry."""
    checkpoint.save(checkpoint.step_path(runs / name, step), {entry: {}})
    return runs / name


def test_the_newest_checkpoint_that_can_be_used_is_found(tmp_path):
    model = run_of(tmp_path, "emoji", "ema")
    encoders = run_of(tmp_path, "damsm-emoji", "damsm")
    for place in (model, encoders):
        time = 1 if place == model else 2
        os.utime(checkpoint.latest(place), (time, time))
    assert checkpoint.newest(tmp_path) == (checkpoint.latest(model), [])
    assert checkpoint.newest(tmp_path, checkpoint.ENCODERS).path == checkpoint.latest(encoders)
    torn = checkpoint.step_path(tmp_path / "torn", 1)
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    found = checkpoint.newest(tmp_path)
    assert found.path == checkpoint.latest(model)
    assert "torn" in found.skipped[0]


@pytest.mark.parametrize(("entry", "told"), [("damsm", "holds DAMSM encoders"), ("weights", "holds something else")])
def test_without_a_usable_checkpoint_the_message_names_what_was_found(tmp_path, entry, told):
    run_of(tmp_path, "one", entry)
    with pytest.raises(InputError, match=rf"one {told}: run `icsd train` first"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_of_another_kind_is_named(tmp_path):
    model, encoders = run_of(tmp_path, "emoji", "ema"), run_of(tmp_path, "damsm", "damsm")
    with pytest.raises(InputError, match="holds DAMSM encoders, written by `icsd pretrain`"):
        checkpoint.find(encoders, checkpoint.MODEL)
    with pytest.raises(InputError, match="holds a text-to-image model, written by `icsd train`"):
        checkpoint.find(checkpoint.latest(model), checkpoint.ENCODERS)


def test_a_checkpoint_is_found_by_file_run_or_its_folder_of_checkpoints(tmp_path):
    run = run_of(tmp_path, "emoji", "ema")
    path = checkpoint.latest(run)
    assert {checkpoint.find(place, checkpoint.MODEL) for place in (path, run, run / "checkpoints")} == {path}
    run_of(tmp_path, "birds", "ema")
    with pytest.raises(InputError, match="give one of them, birds, emoji"):
        checkpoint.find(tmp_path, checkpoint.MODEL)


def test_one_flipped_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, small_state())
    whole = path.read_bytes()
    generator = random.Random(0)
    places = [*range(8), *(generator.randrange(8 * len(whole)) for _ in range(400))]
    unnoticed = []
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            checkpoint.load(path)
            unnoticed.append(place)
        except InputError as error:
            assert "a.safetensors" in str(error)  # noqa: PT017
    assert unnoticed == []


def write(path, header, tensors=None):
    """Write a file whose header has the right checksum."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors or {}, path, {"icsd_checkpoint": f"{zlib.crc32(text.encode()):08x}{text}"})
    return path


def header_of(state, **change):
    return {"format": checkpoint.FORMAT_VERSION, "icsd": "0", "state": state, "checksums": {}} | change


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "header",
    [
        "",
        "null",
        "[]",
        "3",
        DEEP,
        '{"format": "3"}',
        header_of({}, format=None),
        header_of([]),
        header_of(None),
        header_of("state"),
        header_of({}, checksums=[]),
        header_of({"x": {"$tensor": "absent"}}),
        header_of({"x": {"$tensor": 3}}),
        header_of({"x": {"$tensor": ["x"]}}),
        header_of({"x": {"$tensor": "x"}}),
        header_of({"x": {"$tensor": "x"}}, checksums={"x": None}),
        header_of({"x": {"$tensor": "x"}}, checksums={"x": "00000000"}),
        header_of({"x": {"$pairs": 3}}),
        header_of({"x": {"$pairs": [3]}}),
        header_of({"x": {"$pairs": [[1, 2, 3]]}}),
        header_of({"x": {"$pairs": [[[1], 2]]}}),
        f'{{"format": 3, "icsd": "0", "checksums": {{}}, "state": {{"x": {"[" * 900}{"]" * 900}}}}}'.replace(
            "3", str(checkpoint.FORMAT_VERSION), 1
        ),
    ],
    ids=lambda header: (header if isinstance(header, str) else json.dumps(header))[:40],
)
def test_crafted_headers_are_one_line(tmp_path, header):
    path = write(tmp_path / "a.safetensors", header, {"x": torch.ones(2)})
    try:
        checkpoint.load(path)
    except InputError as error:
        assert "a.safetensors" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert "900" in str(header) or "[[" in str(header)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), complex(0, float("nan"))])
def test_values_that_are_not_finite_are_neither_written_nor_read(tmp_path, value):
    path, tensor = tmp_path / "a.safetensors", torch.tensor([1, value])
    with pytest.raises(InputError, match="model/x is not finite: training diverged"):
        checkpoint.save(path, {"model": {"x": tensor}})
    assert os.listdir(tmp_path) == []
    checksums = {"x": checkpoint._checksum(tensor)}
    write(path, header_of({"x": {"$tensor": "x"}}, checksums=checksums), {"x": tensor})
    with pytest.raises(InputError, match="x holds values that are not finite"):
        checkpoint.load(path)


def test_an_older_checkpoint_is_told_the_new_names_of_its_keys(tmp_path):
    config = {"optimiser": {"clip": 1}, "seed": 0}
    header = {"format": 2, "icsd": "0.1", "state": {"config": config, "ema": {}}}
    save_file({}, tmp_path / "old.safetensors", {"icsd_checkpoint": json.dumps(header)})
    with pytest.raises(InputError, match=r"format version 2, .*optimiser\.clip is now optimizer\.clip$"):
        checkpoint.load(tmp_path / "old.safetensors")


def changed(tensor, how):
    return {
        "int32": tensor.int(),
        "bool": tensor.bool(),
        "complex": tensor.to(torch.complex64),
        "half": tensor.half(),
        "longer": torch.cat([tensor, tensor]),
        "flat": tensor.flatten(),
        "scalar": tensor.sum(),
        "list": tensor.tolist(),
    }[how]


@pytest.mark.parametrize("how", ["int32", "bool", "complex", "half", "longer", "flat", "scalar", "list"])
def test_tensors_of_another_type_or_shape_are_refused(how):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state, moments = model.state_dict(), optimizer.state_dict()["state"]
    checkpoint.load_module(model, dict(state), "model")
    checkpoint.load_adam(optimizer, moments, "adam")
    with pytest.raises(InputError, match=r"checkpoint a is damaged or was made by other code \(model\.weight is "):  # noqa: SIM117
        with checkpoint.restoring("a"):
            checkpoint.load_module(model, state | {"weight": changed(state["weight"], how)}, "model")
    first = moments[0] | {"exp_avg": changed(moments[0]["exp_avg"], how)}
    with pytest.raises(ValueError, match=r"adam\.0\.exp_avg is "):
        checkpoint.load_adam(optimizer, moments | {0: first}, "adam")


@pytest.mark.parametrize("state", [{}, {"weight": 1}, {"weight": 1, "bias": 2, "more": 3}, [], None, "weight"])
def test_states_with_other_entries_are_refused(state):
    with pytest.raises(InputError, match="checkpoint a is damaged"), checkpoint.restoring("a"):
        checkpoint.load_module(torch.nn.Linear(3, 2), state, "model")


@pytest.mark.parametrize("state", [{0: {}}, {7: {}}, {"0": {}}, {0: None}, [], None])
def test_moments_with_other_entries_are_refused(state):
    optimizer = torch.optim.Adam(torch.nn.Linear(3, 2).parameters())
    with pytest.raises(InputError, match="checkpoint a is damaged"), checkpoint.restoring("a"):
        checkpoint.load_adam(optimizer, state, "adam")

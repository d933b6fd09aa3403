import json
import shutil

import pytest

from icsd.data import DataConfig, open_dataset
from icsd.errors import InputError
from icsd.sampling import Plan, Sampler
from icsd.sampling.folder import generate_folder
from icsd.training import checkpoint

CAPTIONS = ["a woman", "a red flower", "a woman with dark skin"]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_caption_is_generated_in_turn(path, tmp_path):
    folder = tmp_path / "generated"
    assert generate_folder(Sampler.load(path), Plan(CAPTIONS, seed=5, count=11), folder, batch_size=4) == 11
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == [CAPTIONS[k % 3] for k in range(11)]
    assert [line["seed"] for line in lines] == list(range(5, 16))
    assert lines[10]["file"] == "10.png"
    assert (folder / "ATTRIBUTION").read_text() == "by someone\n"
    data = open_dataset(DataConfig(name="folder", root=folder, test_fraction=0.2), "train", 16)
    assert set(data.captions[0]) <= set(CAPTIONS)


def test_a_stopped_folder_is_finished_to_the_same_bytes(path, tmp_path, monkeypatch):
    sampler = Sampler.load(path)
    plan, options = Plan(CAPTIONS, count=10), {"batch_size": 4}
    generate_folder(sampler, plan, tmp_path / "whole", **options)
    calls = []
    plain = Sampler.generate

    def stopping(self, *arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Sampler, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        generate_folder(sampler, plan, tmp_path / "stopped", **options)
    assert not (tmp_path / "stopped" / "captions.jsonl").exists()
    (tmp_path / "stopped" / "1.png").unlink()
    assert generate_folder(sampler, plan, tmp_path / "stopped", **options) == 7
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert generate_folder(sampler, plan, tmp_path / "stopped", **options) == 0


@pytest.mark.parametrize(
    ("plan", "batch_size", "message"),
    [
        (Plan(CAPTIONS), 0, "batch_size is 0"),
        (Plan(CAPTIONS, count=10**7), 1025, "batch_size is 1025: give a number from 1 to 1024"),
        (Plan(CAPTIONS, count=10**7), 10**14, "batch_size is 100000000000000"),
        (Plan(CAPTIONS, seed=-2), 1, "seed is -2"),
        (Plan(CAPTIONS, seed=2**63 - 2, count=3), 1, "seed is 9223372036854775808"),
        (Plan(["a woman", "\N{DOG}"]), 1, "sentence '\N{DOG}' has no word"),
    ],
)
def test_bad_input_writes_nothing(path, tmp_path, plan, batch_size, message):
    with pytest.raises(InputError, match=message):
        generate_folder(Sampler.load(path), plan, tmp_path / "generated", batch_size=batch_size)
    assert not (tmp_path / "generated").exists()


def test_other_folders_are_left_alone(path, tmp_path):
    sampler = Sampler.load(path)
    generate_folder(sampler, Plan(CAPTIONS, count=2), tmp_path / "generated")
    with pytest.raises(InputError, match="begun with another seed, count"):
        generate_folder(sampler, Plan(CAPTIONS, seed=1, count=3), tmp_path / "generated")
    other = shutil.copytree(path.parent, tmp_path / "another run") / path.name
    with pytest.raises(InputError, match="begun with another checkpoint:"):
        generate_folder(Sampler.load(other), Plan(CAPTIONS, count=2), tmp_path / "generated")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="is not empty"):
        generate_folder(sampler, Plan(CAPTIONS, count=2), tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"0.png": b"mine"}


def test_another_model_at_the_same_path_is_told_apart(path, tmp_path):
    generate_folder(Sampler.load(path), Plan(CAPTIONS), tmp_path / "generated")
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"step": 4})
    with pytest.raises(InputError, match="begun with another checkpoint_sha256"):
        generate_folder(Sampler.load(path), Plan(CAPTIONS), tmp_path / "generated")


def test_a_folder_is_continued_on_its_device_alone(path, tmp_path):
    sampler, plan = Sampler.load(path), Plan(CAPTIONS)
    generate_folder(sampler, plan, tmp_path / "generated")
    file = tmp_path / "generated" / "plan.json"
    begun = json.loads(file.read_text())
    assert begun.pop("device") == "cpu"
    file.write_text(json.dumps(begun | {"device": "cuda"}))
    with pytest.raises(InputError, match="begun with another device: give the same again"):
        generate_folder(sampler, plan, tmp_path / "generated")
    file.write_text(json.dumps(begun))  # of an earlier version
    assert generate_folder(sampler, plan, tmp_path / "generated") == 0


@pytest.mark.parametrize("text", ["", "[1]", '{"count"', "[" * 100_000, "\0" * 50])
def test_a_damaged_plan_is_refused(path, tmp_path, text):
    generate_folder(Sampler.load(path), Plan(CAPTIONS), tmp_path / "generated")
    (tmp_path / "generated" / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json is damaged"):
        generate_folder(Sampler.load(path), Plan(CAPTIONS), tmp_path / "generated")


def test_a_full_disk_says_how_to_continue(path, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OSError, match="No space left on device; the same command continues") as caught:
        generate_folder(Sampler.load(path), Plan(CAPTIONS), tmp_path / "generated")
    assert caught.value.filename == str(tmp_path / "generated" / "0.png")
    assert [file.name for file in (tmp_path / "generated").iterdir()] == ["plan.json"]

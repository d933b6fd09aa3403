import json
import shutil

import pytest

from icsd.data import DataConfig, open_dataset
from icsd.errors import InputError
from icsd.sampling import Sampler
from icsd.sampling.folder import generate_folder

CAPTIONS = ["a woman", "a red flower", "a woman with dark skin"]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_every_caption_is_generated_in_turn(path, tmp_path):
    folder = tmp_path / "generated"
    assert generate_folder(Sampler.load(path), CAPTIONS, folder, number=11, batch_size=4, seed=5) == 11
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == [CAPTIONS[k % 3] for k in range(11)]
    assert [line["seed"] for line in lines] == list(range(5, 16))
    assert lines[10]["file"] == "10.png"
    assert (folder / "ATTRIBUTION").read_text() == "by someone\n"
    data = open_dataset(DataConfig(name="folder", root=folder, test_fraction=0.2), "train", 16)
    assert set(data.captions[0]) <= set(CAPTIONS)


def test_a_stopped_folder_is_finished_to_the_same_bytes(path, tmp_path, monkeypatch):
    sampler = Sampler.load(path)
    options = {"number": 10, "batch_size": 4}
    generate_folder(sampler, CAPTIONS, tmp_path / "whole", **options)
    calls = []
    plain = Sampler.generate

    def stopping(self, *arguments):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, *arguments)

    monkeypatch.setattr(Sampler, "generate", stopping)
    with pytest.raises(KeyboardInterrupt):
        generate_folder(sampler, CAPTIONS, tmp_path / "stopped", **options)
    assert not (tmp_path / "stopped" / "captions.jsonl").exists()
    (tmp_path / "stopped" / "1.png").unlink()
    assert generate_folder(sampler, CAPTIONS, tmp_path / "stopped", **options) == 7
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert generate_folder(sampler, CAPTIONS, tmp_path / "stopped", **options) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": ["", " "]}, "no caption"),
        ({"number": 0}, "number is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -2}, "seed is -2"),
    ],
)
def test_bad_input(path, tmp_path, change, message):
    arguments = {"captions": CAPTIONS, "folder": tmp_path / "generated", "number": 2} | change
    with pytest.raises(InputError, match=message):
        generate_folder(Sampler.load(path), **arguments)


def test_other_folders_are_left_alone(path, tmp_path):
    sampler = Sampler.load(path)
    generate_folder(sampler, CAPTIONS, tmp_path / "generated", number=2)
    with pytest.raises(InputError, match="begun with another number, seed"):
        generate_folder(sampler, CAPTIONS, tmp_path / "generated", number=3, seed=1)
    other = shutil.copytree(path.parent, tmp_path / "another run") / path.name
    with pytest.raises(InputError, match="begun with another checkpoint"):
        generate_folder(Sampler.load(other), CAPTIONS, tmp_path / "generated", number=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="is not empty"):
        generate_folder(sampler, CAPTIONS, tmp_path / "mine", number=2)
    assert contents(tmp_path / "mine") == {"0.png": b"mine"}

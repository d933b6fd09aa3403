import io
import json
import tarfile

import pytest
import torch
from layouts import drawn, write_shards
from PIL import Image
from torch.utils.data import DataLoader

from icsd.data import DataConfig, open_dataset
from icsd.data import images as image_files
from icsd.data.files import Files
from icsd.data.webdataset import read_webdataset
from icsd.errors import InputError


@pytest.fixture(scope="module")
def images():
    """Draw flowers: (image, captions, class)."""
    return [(image, captions, number) for number, image, captions in drawn("procedural-flowers", 30)["train"]]


def both(root, **options):
    config = DataConfig(name="webdataset", root=root, **options)
    return open_dataset(config, "train", 16), open_dataset(config, "test", 16)


def shard(path, members):
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return path


def png():
    encoded = io.BytesIO()
    Image.new("RGB", (9, 8), (255, 0, 0)).save(encoded, "PNG")
    return encoded.getvalue()


def test_shards(images, tmp_path, monkeypatch):
    write_shards(tmp_path / "flowers", images, 8)
    train, test = both(tmp_path / "flowers", test_fraction=0.25)
    assert train.name == "flowers"
    assert len(train) + len(test) == len(images)
    assert len(test) == round(len(images) / 4)
    captions = {tuple(lines): number for _, lines, number in images}
    classes = sorted({str(number) for number in captions.values()})
    for dataset in (train, test):
        for index in range(len(dataset)):
            assert classes[dataset.class_ids[index]] == str(captions.pop(tuple(dataset.captions[index])))
    assert not captions
    monkeypatch.setattr(image_files, "_MEMORY", 0)
    lazy, _ = both(tmp_path / "flowers", test_fraction=0.25)
    assert all(torch.equal(lazy.images[index], train.images[index]) for index in range(len(train)))
    batches = list(DataLoader(lazy, 5, num_workers=2))
    assert sum(len(batch["caption"]) for batch in batches) == len(train)


def test_shards_named_test_are_the_test_split(images, tmp_path):
    write_shards(tmp_path, images[:12], 5, "train-")
    write_shards(tmp_path, images[12:16], 5, "test-")
    train, test = both(tmp_path)
    assert (len(train), len(test)) == (12, 4)
    assert test.captions[0] == images[12][1]


def test_json_holds_captions_and_class(tmp_path):
    members = {
        "a/one.png": png(),
        "a/one.json": json.dumps({"caption": ["a red square", " ", "süß"], "class": 7, "other": 1}, ensure_ascii=False),
        "a/two.input.PNG": png(),
        "a/two.json": '{"caption": "two"}',
        "a/three.txt": "no image",
    }
    records = read_webdataset(Files([shard(tmp_path / "x.tar", members)])).records
    assert [(record.name, record.captions, record.class_name) for record in records] == [
        ("x/a/one.png", ["a red square", "süß"], "7"),
        ("x/a/two.input.PNG", ["two"], None),
    ]


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"one.json": "{}"}, r"x\.tar/one\.png has no caption"),
        ({"one.txt": "\n"}, r"x\.tar/one\.png has no caption"),
        ({"one.json": "{"}, r"x\.tar/one\.json must read"),
        ({"one.json": '["a"]'}, r"x\.tar/one\.json must read"),
        ({"one.json": '{"caption": [7]}'}, r"x\.tar/one\.json must read"),
        ({"one.json": '{"caption": 7}'}, r"x\.tar/one\.json must read"),
        ({"one.txt": b"\xff"}, r"x\.tar/one\.txt cannot be read as UTF-8"),
        ({"one.txt": "a", "one.jpg": png()}, "belong to one sample"),
        ({"one.txt": "a"}, "no image is in the test split"),
    ],
)
def test_bad_samples(tmp_path, members, complaint):
    shard(tmp_path / "x.tar", {"one.png": png(), **members})
    with pytest.raises(InputError, match=complaint):
        both(tmp_path)


def test_no_shards_and_compressed_ones(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.tar"):
        both(tmp_path)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as out:
        for name, data in {"a.png": png(), "a.txt": b"a", "b.png": png(), "b.txt": b"b"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    with pytest.raises(InputError, match=r"a\.tar\.gz cannot be read in random order"):
        both(tmp_path)

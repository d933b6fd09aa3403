import io
import json
import os
import re
import tarfile

import pytest
import torch
from layouts import drawn, write_shards
from PIL import Image
from torch.utils.data import DataLoader

from icsd.data import DataConfig, open_dataset
from icsd.data import images as image_files
from icsd.data.files import Files
from icsd.data.webdataset import read_webdataset, shards
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


def read(tmp_path, members):
    return read_webdataset(Files([shard(tmp_path / "x.tar", members)]))


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"one.txt": "a bird\n", "one.json": '{"caption": "a bird"}'}, ["a bird"]),
        (
            {"one.txt": "a bird\nanother", "one.json": '{"caption": ["another", "third"]}'},
            ["a bird", "another", "third"],
        ),
        ({"one.txt": "bird 3", "one.json": '{"caption": null, "url": "x"}'}, ["bird 3"]),
        ({"one.json": '{"text": "bird", "width": 3}'}, ["bird"]),
        ({"one.json": '{"captions": [null, "bird"]}'}, ["bird"]),
    ],
)
def test_captions_of_text_and_json_come_together(tmp_path, members, captions):
    listing = read(tmp_path, {"one.png": png(), **members})
    assert listing.problems == []
    assert listing.records[0].captions == captions


@pytest.mark.parametrize("suffix", ["tiff", "jfif", "jpe", "bmp", "TIF"])
def test_images_of_every_suffix(tmp_path, suffix):
    listing = read(tmp_path, {f"one.{suffix}": png(), "one.txt": "a bird"})
    assert len(listing.records) == 1


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"two.txt": "a bird"}, r"two\.txt has no image"),
        ({"two.heic": b"x", "two.txt": "a bird"}, r"two\.\w+ has no image"),
        ({"two.mp4": b"x"}, r"two\.mp4 has no image"),
        ({"two.png": png(), "two.json": '{"caption": null}'}, r"two\.png has no caption"),
        ({"two.png": png()}, r"two\.png has no caption"),
        ({"two.png": png(), "two.txt": b"\xff\xfe"}, r"two\.txt cannot be read as UTF-8"),
        ({"two.png": png(), "two.json": "{"}, r"two\.json must read"),
        ({"two.png": png(), "two.json": '{"caption": {"en": "x"}}'}, r"two\.json must read .*'caption'"),
        ({"two.png": png(), "two.json": '{"caption": "x", "class": []}'}, r"two\.json must read .*'class'"),
        ({"two.png": png(), "two.json": '{"caption": "\\ud800"}'}, r"two\.json holds half of a character"),
        ({"two.png": png(), "two.json": "[" * 100_000}, r"two\.json must read .*nested too deeply"),
        ({"two.png": png(), "two.json": '{"caption": "a", "caption": "b"}'}, r"two\.json must read .*there twice"),
        (
            {"two.png": png(), "two.txt": "x", "two.cls": "1", "two.json": '{"class": 2}'},
            "has the class '2', its .cls '1'",
        ),
    ],
)
def test_a_bad_sample_is_a_problem_of_its_own(tmp_path, members, problem):
    listing = read(tmp_path, {"one.png": png(), "one.txt": "good", **members, "three.png": png(), "three.txt": "good"})
    assert [record.image.path for record in listing.records] == ["one.png", "three.png"]
    (line,) = listing.problems
    assert re.search(problem, line)


@pytest.mark.parametrize("name", ["0.tar.zst", "0.tar.lz4", "0.7z"])
def test_shards_that_cannot_be_read_are_named(tmp_path, name):
    shard(tmp_path / "x.tar", {"one.png": png(), "one.txt": "good"})
    (tmp_path / name).write_bytes(b"x")
    assert f"{name} is not read" in read_webdataset(shards([tmp_path])).problems[0]


def test_linked_folders_pipes_and_broken_links_among_shards(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shard(tmp_path / "elsewhere" / "0.tar", {"one.png": png(), "one.txt": "good"})
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "shards" / "gone.tar").symlink_to("/nowhere/0.tar")
    os.mkfifo(tmp_path / "shards" / "pipe.tar")
    listing = read_webdataset(shards([tmp_path / "shards"]))
    assert [record.name for record in listing.records] == ["linked/0/one.png"]
    assert len(listing.problems) == 2


def test_samples_are_grouped_as_by_the_webdataset_library(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    members = {"a/one.png": png(), "a/one.txt": "x", "b/one.png": png(), "b/one.cls": "1", "b/one.txt": "y"}
    members |= {"two.input.png": png(), "two.txt": "z", "c.d/three.png": png(), "c.d/three.txt": "w"}
    shard(tmp_path / "x.tar", members)
    samples = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    theirs = {sample["__key__"]: sample["txt"].decode() for sample in samples}
    ours = {record.name: record.captions[0] for record in read_webdataset(Files([tmp_path / "x.tar"])).records}
    assert {name.removeprefix("x/").split(".png")[0].split(".input")[0]: text for name, text in ours.items()} == theirs

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from icsd.data import DataConfig, images, open_dataset
from icsd.data.folder import write_folder
from icsd.errors import InputError


def save(path, color=(255, 0, 0), size=(10, 8), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path, **options)


@pytest.fixture
def root(tmp_path):
    """Six images of every common kind, with captions that real sets have."""
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"a red square")  # no final newline
    save(tmp_path / "b.jpg")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa red square\r\n\r\n  \r\nanother one\r\n")  # BOM, CRLF, empty lines
    save(tmp_path / "deep" / "c.JPG", mode="L")
    (tmp_path / "deep" / "c.txt").write_text("ein rotes Viereck, süß\n...\n", encoding="utf-8")
    save(tmp_path / "d.jpeg", mode="CMYK")
    (tmp_path / "d.txt").write_text("cmyk\n")
    save(tmp_path / "e.png", mode="RGBA")
    (tmp_path / "e.txt").write_text("transparent\n")
    save(tmp_path / "f.gif", mode="P")
    (tmp_path / "f.txt").write_text("palette\n")
    (tmp_path / "README.txt").write_text("not a caption\n")
    (tmp_path / "._a.png").write_bytes(b"what a Mac leaves on a memory card")
    (tmp_path / "album.png").mkdir()
    return tmp_path


def config(root, **options):
    return DataConfig(name="folder", root=root, **options)


def by_caption(root, **options):
    datasets = [open_dataset(config(root, **options), split, 8) for split in ("train", "test")]
    return {sentences[0]: sentences for dataset in datasets for sentences in dataset.captions}


def error(root, **options):
    before = sorted((file, file.read_bytes()) for file in root.rglob("*") if file.is_file()) if root.is_dir() else []
    with pytest.raises(InputError) as caught:
        open_dataset(config(root, **options), "train", 8), open_dataset(config(root, **options), "test", 8)
    after = sorted((file, file.read_bytes()) for file in root.rglob("*") if file.is_file()) if root.is_dir() else []
    assert before == after
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_files_beside_images(root):
    train, test = (open_dataset(config(root, test_fraction=0.3), split, 8) for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 2)
    assert not set(train.class_ids) & set(test.class_ids)
    found = {tuple(sentences) for dataset in (train, test) for sentences in dataset.captions}
    assert found == {
        ("a red square",),
        ("a red square", "another one"),
        ("ein rotes Viereck, süß",),
        ("cmyk",),
        ("transparent",),
        ("palette",),
    }
    for dataset in (train, test):
        for item in dataset:
            assert item["image"].shape == (3, 8, 8)
            if "süß" not in item["caption"]:
                assert item["image"].mean(dim=(1, 2)).sub(torch.tensor([1.0, -1, -1])).abs().max() < 0.05
    assert train.name == root.name


def test_split_is_stable_and_seeded(root):
    def held_out(**options):
        return open_dataset(config(root, **options), "test", 8).captions

    assert len(held_out(test_fraction=0.01)) == 1
    assert len(held_out(test_fraction=0.99)) == 5
    assert held_out(seed=1) == held_out(seed=1)
    assert len({str(held_out(seed=seed)) for seed in range(20)}) > 2
    few = {sentence for sentences in held_out(test_fraction=0.34) for sentence in sentences}
    assert few <= {sentence for sentences in held_out(test_fraction=0.67) for sentence in sentences}


def test_csv(root):
    rows = [
        "file,caption",
        './a.png,"red,\r\na square"',
        "a.png,second",
        "b.jpg,été",
        "deep/c.JPG,c",
        "d.jpeg,d",
        "e.png,e",
    ]
    (root / "captions.csv").write_text("\ufeff" + "\r\n".join([*rows, "f.gif,f"]), encoding="utf-8")
    found = by_caption(root)
    assert found["red, a square"] == ["red, a square", "second"]
    assert set(found) == {"red, a square", "été", "c", "d", "e", "f"}


def test_jsonl(root):
    names = ["a.png", "b.jpg", "deep/c.JPG", "d.jpeg", "e.png", "f.gif", "a.png"]
    lines = [
        json.dumps({"file": name, "caption": f"caption\u2028{i}"}, ensure_ascii=False) for i, name in enumerate(names)
    ]
    (root / "captions.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    assert len(by_caption(root)["caption 0"]) == 2


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_lists_may_hold_classes_and_splits(root, form):
    names = ["a.png", "b.jpg", "deep/c.JPG", "d.jpeg", "e.png", "f.gif"]
    rows = [(name, f"caption {name}", "xyyzzz"[i], "test" if i in (1, 4) else "train") for i, name in enumerate(names)]
    if form == "csv":
        lines = ["file,caption,class,split", *map(",".join, rows), "a.png,again,,"]
    else:
        lines = [json.dumps(dict(zip(("file", "caption", "class", "split"), row, strict=True))) for row in rows]
        lines.append(json.dumps({"file": "a.png", "caption": ["again", ""]}))
    (root / f"captions.{form}").write_text("\n".join(lines))
    train, test = (open_dataset(config(root, seed=5), split, 8) for split in ("train", "test"))
    assert test.captions == [["caption b.jpg"], ["caption e.png"]]
    assert train.captions[0] == ["caption a.png", "again"]
    assert (train.class_ids, test.class_ids) == ([0, 2, 1, 2], [1, 2]), "in the order of their names"


def test_large_folders_are_decoded_on_demand(root, monkeypatch):
    cached = open_dataset(config(root), "train", 8)
    monkeypatch.setattr(images, "_MEMORY", 0)
    lazy = open_dataset(config(root), "train", 8)
    assert isinstance(cached.images, torch.Tensor)
    assert not isinstance(lazy.images, torch.Tensor)
    for index in range(len(lazy)):
        assert torch.equal(lazy.images[index], cached.images[index])
    assert sum(len(batch["caption"]) for batch in DataLoader(lazy, 2, num_workers=2)) == len(lazy)


def test_missing_and_empty_folder(tmp_path):
    assert str(tmp_path / "nowhere") in error(tmp_path / "nowhere")
    assert "holds 0 images" in error(tmp_path)
    save(tmp_path / "a.png")
    assert "at least 2" in error(tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 7.0])
def test_test_fraction_is_checked(root, fraction):
    assert f"data.test_fraction={fraction}" in error(root, test_fraction=fraction)


@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_image_is_named(root, monkeypatch, memory, content):
    monkeypatch.setattr(images, "_MEMORY", memory)
    (root / "a.png").write_bytes(content)
    assert f"{root / 'a.png'} cannot be read as an image" in error(root)


@pytest.mark.parametrize("name", ["a.png", "b.jpg"])
def test_truncated_image_is_named(root, name):
    save(root / name, size=(300, 300))
    whole = (root / name).read_bytes()
    (root / name).write_bytes(whole[: len(whole) // 2])
    assert f"{root / name} cannot be read as an image" in error(root)


def test_images_without_captions(root):
    (root / "a.txt").unlink()
    assert f"{root / 'a.png'} has no caption; write a.txt" in error(root)
    (root / "b.txt").unlink()
    assert "nor have 1 more" in error(root)


@pytest.mark.parametrize("text", ["", "\n \n", "...\n"])
def test_caption_file_without_captions(root, text):
    (root / "d.txt").write_text(text)
    assert f"{root / 'd.txt'} holds no caption" in error(root)


def test_captions_in_another_encoding_are_named(root):
    (root / "d.txt").write_bytes("süß".encode("latin-1"))
    assert f"{root / 'd.txt'} cannot be read as UTF-8" in error(root)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("captions.csv", "", "first line must be file,caption"),
        ("captions.csv", "name,text\na.png,x\n", "first line must be file,caption"),
        ("captions.csv", "file,caption\nz.png,x\n", "line 2, names 'z.png'"),
        ("captions.csv", "file,caption\n../a.png,x\n", "names '../a.png'"),
        ("captions.csv", "file,caption\na.png,x\n", "write a row in captions.csv"),
        ("captions.csv", "file,caption\na.png\n", "has no caption"),
        ("captions.jsonl", '{"file": "a.png"}\n', "line 1, must read"),
        ("captions.jsonl", '\n["a.png", "x"]\n', "line 2, must read"),
        ("captions.jsonl", "{", "line 1, must read"),
        ("captions.jsonl", '{"file": "a.png", "caption": 3}', "line 1, must read"),
        ("captions.csv", "file,caption\na.png," + "x" * 200_000, "is not CSV after line 1"),
        ("captions.jsonl", '{"file": "z.png", "caption": "x"}', "line 1, names 'z.png'"),
        ("captions.jsonl", '{"file": "a.png", "caption": ["x", 3]}', "line 1, must read"),
        ("captions.jsonl", '{"file": "a.png", "caption": "x", "class": 3.5}', "line 1, must read"),
        ("captions.jsonl", '{"file": "a.png", "caption": "x", "split": "eval"}', "line 1, has the split 'eval'"),
        ("captions.csv", "file,caption,class\na.png,x,1\na.png,y,2", "puts a.png into '2', an earlier row into '1'"),
        ("captions.csv", "file,caption,split\na.png,x,test\na.png,y,train", "puts a.png into 'train'"),
    ],
)
def test_bad_lists(root, name, text, complaint):
    (root / name).write_text(text)
    message = error(root)
    assert complaint in message
    assert str(root) in message


@pytest.mark.parametrize(
    ("splits", "complaint"),
    [("train,,train,,,", "has no split while others have one"), (",".join(["train"] * 6), "test")],
)
def test_incomplete_splits(root, splits, complaint):
    names = ["a.png", "b.jpg", "deep/c.JPG", "d.jpeg", "e.png", "f.gif"]
    rows = [f"{name},x,{split}" for name, split in zip(names, splits.split(","), strict=True)]
    (root / "captions.csv").write_text("\n".join(["file,caption,split", *rows]))
    assert complaint in error(root)


def test_two_lists(root):
    (root / "captions.csv").write_text("file,caption\n")
    (root / "captions.jsonl").write_text("")
    assert "keep one" in error(root)


def test_written_folder_reads_back(tmp_path):
    emoji = open_dataset(DataConfig(holdout="unseen-class"), "test", 16)
    write_folder([emoji], tmp_path / "out")
    back = [open_dataset(config(tmp_path / "out"), split, 16) for split in ("train", "test")]
    images = torch.cat([dataset.images for dataset in back])
    order = [emoji.captions.index(captions) for dataset in back for captions in dataset.captions]
    assert sorted(order) == list(range(len(emoji)))
    assert torch.equal(images, emoji.images[order])
    names = [dataset.class_name(index) for dataset in back for index in range(len(dataset))]
    assert names == [str(emoji.class_ids[i]) for i in order], "classes are kept"
    assert (tmp_path / "out" / "ATTRIBUTION").read_text().strip() == emoji.attribution


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    dataset = open_dataset(DataConfig(holdout="unseen-class"), "test", 8)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_folder([dataset], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(root):
    dataset = open_dataset(config(root), "test", 8)
    before = sorted(root.rglob("*"))
    for path in (root, root / "a.txt"):
        with pytest.raises(InputError, match="not an empty folder"):
            write_folder([dataset], path)
    assert sorted(root.rglob("*")) == before

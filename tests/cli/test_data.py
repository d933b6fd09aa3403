import json
import os
import re
import tarfile
from pathlib import Path

import pytest
from layouts import CUB, drawn, pack, write_shards
from PIL import Image

from icsd.data import DataConfig, open_dataset

CONFIGS = Path(__file__).parents[2] / "configs"
FLOWERS = ("--data.name", "procedural-flowers", "--data.size", "24")


def test_preview_writes_a_contact_sheet(icsd, workplace):
    assert icsd("data", "preview", *FLOWERS, "--count", "5", "--resolution", "16") == (0, "preview.png\n", "")
    with Image.open("preview.png") as image:
        assert min(image.size) > 100


def test_an_exported_set_can_be_read_as_a_folder(icsd, workplace):
    code, out, _ = icsd("data", "export", "flowers", *FLOWERS, "--resolution", "16")
    assert code == 0
    assert "16 images of the train split and 8 images of the test split of procedural-flowers" in out
    rows = [json.loads(line) for line in Path("flowers/captions.jsonl").read_text().splitlines()]
    assert sorted(row["file"] for row in rows) == sorted(path.name for path in Path("flowers").glob("*.png"))
    assert [row["split"] for row in rows] == ["train"] * 16 + ["test"] * 8
    assert icsd("data", "preview", "--data.name", "folder", "--data.root", "flowers", "--split", "test")[0] == 0


@pytest.fixture
def download(cub, workplace):
    """Archives of drawn birds in the current folder."""
    pack(cub / CUB, workplace / "CUB_200_2011.tgz")
    pack(cub / "birds", workplace / "birds.zip")
    return ["prepare", "cub", "CUB_200_2011.tgz", "birds.zip", "data/birds"]


def everything():
    return sorted(Path().rglob("*"))


def test_prepare(icsd, download):
    code, out, err = icsd("data", *download, "--partial", "--workers", "2")
    assert code == 0, err
    assert "train        34 images, 23 classes, 340 captions\n" in out
    assert "problem      the train split has 34 images of 23 classes, the set is known for 8,855 of 150\n" in out
    assert out.endswith("try next     icsd train --config configs/birds.yaml --data.root data/birds\n")
    with Image.open("data/birds-contact-sheet.png") as image:
        assert min(image.size) > 300
    shown = icsd("data", "preview", "--data.name", "cub", "--data.root", "data/birds", "--data.margin", "0.1875")
    assert shown == (0, "preview.png\n", "")


@pytest.mark.parametrize(("name", "config"), [("cub", "birds.yaml"), ("oxford", "flowers.yaml")])
def test_the_configurations_train_on_prepared_sets(icsd, published, workplace, name, config):
    root, names = published
    paths = {"cub": [CUB, "birds"], "oxford": ["jpg", "cvpr2016_flowers"]}[name]
    sources = [str(root / name / path) for path in paths]
    assert icsd("data", "prepare", name, *sources, "prepared", "--partial")[0] == 0
    tiny = [
        "--text.dim",
        "8",
        "--generator.resolutions",
        "[8,16]",
        "--generator.width",
        "4",
        "--discriminator.width",
        "4",
    ]
    short = ["--steps", "1", "--batch_size", "4", "--threads", "1", "--workers", "0"]
    file = str(CONFIGS / config)
    code, out, err = icsd("train", "--config", file, "--data.root", "prepared", *tiny, *short)
    assert code == 0, err
    assert f"{name}: {len(names[name]['train'])} images, {len(names[name]['test'])} more held out" in out
    assert Path("runs", name, "checkpoints").is_dir()


@pytest.mark.parametrize(("options", "code"), [(["--partial"], 0), ([], 2)])
def test_a_dry_run_writes_nothing(icsd, download, options, code):
    before = everything()
    ended, out, err = icsd("data", *download, "--dry-run", *options)
    assert ended == code
    assert "the test split has 6 images of 4 classes, the set is known for 2,933 of 50\n" in out + err
    assert ("nothing was written\n" in out) == (code == 0)
    assert everything() == before


def test_an_incomplete_set_is_refused(fails, download):
    before = everything()
    message = fails("data", *download)
    assert "give --partial to leave it out" in message
    assert message.count("the set is known for") == 2
    assert everything() == before


def test_partial_leaves_out_images_without_captions(icsd, fails, workplace):
    assert icsd("data", "export", "flowers", *FLOWERS, "--resolution", "16")[0] == 0
    rows = Path("flowers/captions.jsonl").read_text().splitlines()
    Path("flowers/captions.jsonl").write_text("\n".join(row for row in rows if "train_000003" not in row))
    assert "train_000003.png has no caption" in fails("data", "prepare", "folder", "flowers", "out")
    code, out, _ = icsd("data", "prepare", "folder", "flowers", "out", "--partial")
    assert code == 0
    assert "problem      flowers/train_000003.png has no caption" in out
    assert len(list(Path("out/images").iterdir())) == 23


@pytest.mark.parametrize("name", ["folder", "webdataset"])
def test_prepare_own_images(icsd, workplace, name):
    images = [(image, captions, number) for number, image, captions in drawn("procedural-flowers", 24)["train"][:16]]
    write_shards(Path("shards"), images, 20)
    with tarfile.open("shards/000000.tar") as shard:
        shard.extractall("flowers", filter="data")
    for file in Path("flowers").glob("*.cls"):
        file.unlink()
    source = "flowers" if name == "folder" else "shards"
    code, out, _ = icsd("data", "prepare", name, source, "data/flowers", "--test-fraction", "0.25")
    assert code == 0
    assert re.search(r"test         4 images, (4 classes, )?40 captions\n", out)
    assert out.endswith("try next     icsd train --config configs/folder.yaml --data.root data/flowers\n")
    assert icsd("data", "preview", "--data.name", "folder", "--data.root", "data/flowers")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "imagenet", "in", "out"], '"set"'),
        (["prepare", "cub", "out"], "output"),
        (["prepare", "cub", "absent.tgz", "out"], "absent.tgz does not exist"),
        (["prepare", "cub", "full", "out"], "hold no images.txt"),
        (["prepare", "folder", "full", "out"], "full holds 0 images"),
        (["prepare", "webdataset", "full", "out"], "full holds no .tar"),
        (["prepare", "folder", "full", "full"], "full is not an empty folder"),
        (["prepare", "folder", "full", "out", "--size", "0"], "--size is 0"),
        (["prepare", "folder", "full", "out", "--workers", "-1"], "--workers is -1"),
        (["prepare", "folder", "full", "out", "--workers", "1000000"], "--workers is 1000000: give a number from 0 to"),
        (["preview", "--resolution", "0"], "--resolution is 0"),
        (["preview", "--count", "0"], "--count is 0"),
        (["preview", "--output", "sheet"], "output is sheet"),
        (["preview", "--output", "no/folder/x.png"], "there is no folder no/folder: make it first"),
        (["preview", "--split", "all"], '"split"'),
        (["preview", "--data.name", "folder", "--data.root", "absent"], "data.root=absent"),
        (["export"], "output"),
        (["export", "full", *FLOWERS], "full is not an empty folder"),
    ],
)
def test_errors_name_the_option_and_write_nothing(fails, workplace, arguments, message):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    before = sorted(Path().rglob("*"))
    assert message in fails("data", *arguments)
    assert sorted(Path().rglob("*")) == before


def test_a_machine_of_many_cores_needs_no_option(fails, workplace, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1024)
    Path("empty").mkdir()
    assert "empty holds 0 images" in fails("data", "prepare", "folder", "empty", "out")


def test_data_without_an_action_lists_them(fails):
    assert "preview,export" in fails("data")


def photos(root, names, caption="a bird"):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (200, 30, 30)).save(path, "PNG")
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return str(root)


def test_a_dry_run_finds_what_the_real_run_refuses(icsd, workplace):
    source = photos(Path("photos"), ["a.png", "b.png", "c.png"])
    Path("photos/c.png").write_bytes(Path("photos/c.png").read_bytes()[:50])
    dry, real = (icsd("data", "prepare", "folder", source, "out", *extra) for extra in (["--dry-run"], []))
    assert dry[0] == real[0] == 2
    assert dry[2] == real[2]
    assert "c.png cannot be read as an image" in dry[2]


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_contact_sheet_is_not_overwritten(fails, workplace, options):
    source = photos(Path("photos"), ["a.png", "b.png"])
    Path("out-contact-sheet.png").write_text("mine")
    message = fails("data", "prepare", "folder", source, "out", *options)
    assert "out-contact-sheet.png exists and would be overwritten" in message
    assert Path("out-contact-sheet.png").read_text() == "mine"


def test_a_dry_run_reports_the_space(icsd, workplace):
    source = photos(Path("photos"), ["a.png", "b.png"])
    code, out, _ = icsd("data", "prepare", "folder", source, "out", "--dry-run")
    assert code == 0
    assert re.search(r"space        0\.0 MiB of images, [\d,]+ MiB free\n", out)
    assert "every image was read; nothing was written\n" in out


def test_partial_names_what_left_a_split_empty(fails, cub, workplace):
    message = fails("data", "prepare", "cub", str(cub / CUB), "out", "--partial")
    assert "do not list both train and test classes" in message
    for part in ("train", "test"):
        (workplace / "lists" / part).mkdir(parents=True)
        (workplace / "lists" / part / "filenames.pickle").write_bytes(
            (cub / "birds" / part / "filenames.pickle").read_bytes()
        )
    message = fails("data", "prepare", "cub", str(cub / CUB), "lists", "out", "--partial")
    assert "no image is in the test split" in message
    assert "40 of 40 images have no captions" in message


@pytest.mark.parametrize(
    ("rows", "left_out"),
    [
        ([("a", "x"), ("b", "x"), ("d", "x")], "d.png"),
        ([("a", None), ("b", "x"), ("c", "x")], "a.png"),
        ([("a", "x"), ("b", "x")], "c.png"),
    ],
)
def test_partial_leaves_out_rows_and_images(icsd, fails, workplace, rows, left_out):
    source = photos(Path("photos"), ["a.png", "b.png", "c.png"])
    for path in Path("photos").glob("*.txt"):
        path.unlink()
    lines = [json.dumps({"file": f"{name}.png", "caption": caption}) + "\n" for name, caption in rows]
    Path("photos/captions.jsonl").write_text("".join(lines))
    assert left_out in fails("data", "prepare", "folder", source, "out", "--dry-run")
    code, out, _ = icsd("data", "prepare", "folder", source, "out", "--partial")
    assert code == 0
    assert left_out in out


@pytest.mark.parametrize(
    ("caption", "words"), [("一只棕色的狗在草地上", 10), ("สุนัขสีน้ำตาล", 8), ("茶色い犬が芝生にいる", 10)]
)
def test_prepare_notes_scripts_without_spaces(icsd, workplace, caption, words):
    code, out, _ = icsd("data", "prepare", "folder", photos(Path("photos"), ["a.png", "b.png"], caption), "out")
    assert code == 0
    assert f"2 of 2 captions are in a script without spaces between words, such as {caption!r}" in out
    assert f"text.max_words should be {words} " in out


def test_limits_are_raised_by_options(icsd, fails, workplace):
    source = photos(Path("photos"), ["a.png", "b.png"])
    assert "more than max_pixels=100 allows" in fails(
        "data", "preview", "--data.name", "folder", "--data.root", source, "--data.limits.max-pixels", "100"
    )
    code, _, err = icsd("data", "prepare", "folder", source, "out", "--max-pixels", "100")
    assert code == 2
    assert "more than max_pixels=100 allows; raise max_pixels" in err
    assert icsd("data", "prepare", "folder", source, "out", "--max-pixels", "1200", "--max-file-mb", "1")[0] == 0


@pytest.mark.parametrize(("margin", "side"), [("0", 32), ("0.1875", 38), ("0.5", 48)])
def test_an_export_honors_the_margin_and_keeps_classes_and_splits(icsd, workplace, margin, side):
    options = [*FLOWERS, "--data.margin", margin, "--data.holdout", "unseen-class"]
    code, out, _ = icsd("data", "export", "flowers", *options, "--resolution", "32")
    assert code == 0
    assert f"shorter side {side} pixels" in out
    assert {Image.open(path).size for path in Path("flowers").glob("*.png")} == {(side, side)}
    config = DataConfig(name="procedural-flowers", size=24, holdout="unseen-class")
    for split in ("train", "test"):
        ours = open_dataset(DataConfig(name="folder", root=Path("flowers")), split, 32)
        theirs = open_dataset(config, split, 32)
        assert ours.captions == theirs.captions
        assert [ours.class_name(index) for index in range(len(ours))] == list(map(str, theirs.class_ids))


def test_an_export_of_one_split_has_none(icsd, workplace):
    assert icsd("data", "export", "flowers", *FLOWERS, "--split", "test", "--resolution", "16")[0] == 0
    rows = [json.loads(line) for line in Path("flowers/captions.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert not any("split" in row for row in rows)


def test_prepare_coco_and_hugging_face_folders(icsd, workplace):
    source = Path(photos(Path("hf"), ["train/a.png", "train/b.png", "test/c.png"]))
    for path in source.rglob("*.txt"):
        path.unlink()
    for split, names in (("train", "ab"), ("test", "c")):
        rows = [json.dumps({"file_name": f"{name}.png", "text": f"bird {name}"}) + "\n" for name in names]
        (source / split / "metadata.jsonl").write_text("".join(rows))
    code, out, _ = icsd("data", "prepare", "folder", str(source), "data/hf")
    assert code == 0
    assert "train        2 images, 2 captions\ntest         1 images, 1 captions\n" in out
    coco = Path(photos(Path("coco"), ["train2017/1.jpg", "train2017/2.jpg", "val2017/3.jpg"]))
    for part, numbers in (("train2017", (1, 2)), ("val2017", (3,))):
        images = [{"id": number, "file_name": f"{number}.jpg"} for number in numbers]
        captions = [{"image_id": number, "caption": f"bird {number}"} for number in numbers]
        (coco / f"captions_{part}.json").write_text(json.dumps({"images": images, "annotations": captions}))
    code, out, err = icsd("data", "prepare", "coco", str(coco), "data/coco")
    assert code == 0, err
    assert "train        2 images, 2 captions\ntest         1 images, 1 captions\n" in out
    assert icsd("data", "preview", "--data.name", "folder", "--data.root", "data/coco", "--data.fit", "pad")[0] == 0

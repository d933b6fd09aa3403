import pytest
from layouts import drawn, write_shards
from PIL import Image

from icsd.data import DataConfig, open_dataset
from icsd.data.files import File, Files
from icsd.data.folder import read_folder
from icsd.data.records import Record
from icsd.data.sources import list_set
from icsd.data.splits import held_out_part, with_splits
from icsd.errors import InputError


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("test", "test"),
        ("photos/val/birds", "val"),
        ("Testing", "Testing"),
        ("validation", "validation"),
        ("valid", "valid"),
        ("dev", "dev"),
        ("val2017", "val2017"),
        ("test_images", "test_images"),
        ("train", None),
        ("valley/testimony", None),
        ("crash test dummies", None),
        ("", None),
    ],
)
def test_folders_that_are_held_out(path, part):
    assert held_out_part(path) == part


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("test-0001", "test-0001"),
        ("test0001", "test0001"),
        ("imagenet-val-000000", "imagenet-val-000000"),
        ("cc12m.validation.3", "cc12m.validation.3"),
        ("test/00000", "test"),
        ("val/00000", "val"),
        ("train/00000", None),
        ("valley-0001", None),
        ("cc3m.v1-0000", None),
        ("contest-0001", None),
    ],
)
def test_shards_that_are_held_out(path, part):
    assert held_out_part(path, shard=True) == part


def photos(root, folders, count=3):
    for folder in folders:
        for index in range(count):
            path = root / folder / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8)).save(path)
            path.with_suffix(".txt").write_text(f"{folder} {index}")
    return root


def opened(root, name="folder"):
    return [open_dataset(DataConfig(name=name, root=root), split, 8) for split in ("train", "test")]


@pytest.mark.parametrize(
    ("folders", "held_out"),
    [
        (("train", "val", "test"), {"val", "test"}),
        (("train", "test"), {"test"}),
        (("Train", "Validation"), {"Validation"}),
        (("birds/train", "birds/test", "cats/train", "cats/test"), {"birds/test", "cats/test"}),
        ((".", "test"), {"test"}),
        (("images/train2017", "images/val2017"), {"images/val2017"}),
    ],
)
def test_folders_named_test_or_val_are_the_test_split(tmp_path, folders, held_out):
    train, test = opened(photos(tmp_path, folders))
    assert {caption.rpartition(" ")[0] for (caption,) in test.captions} == held_out
    assert {caption.rpartition(" ")[0] for (caption,) in train.captions} == set(folders) - held_out
    assert len(train) + len(test) == 3 * len(folders), "no image is lost"
    assert "define the splits" in train.notes[0]


@pytest.mark.parametrize("folders", [("train",), ("test",), ("val", "test"), ("cats", "dogs")])
def test_other_folders_are_split_by_a_hash(tmp_path, folders):
    train, test = opened(photos(tmp_path, folders, count=20 // len(folders)))
    assert (len(train), len(test)) == (18, 2)
    assert train.notes == []


def test_a_list_has_the_last_word_on_splits(tmp_path):
    photos(tmp_path, ("train", "test"))
    rows = [
        f"{folder}/{index}.png,x,{'test' if index else 'train'}\n" for folder in ("train", "test") for index in range(3)
    ]
    (tmp_path / "captions.csv").write_text("file,caption,split\n" + "".join(rows))
    train, test = opened(tmp_path)
    assert (len(train), len(test)) == (2, 4)


@pytest.mark.parametrize(
    ("word", "split"), [("train", "train"), ("Training", "train"), ("val", "test"), ("validation", "test")]
)
def test_words_for_splits_in_a_list(tmp_path, word, split):
    photos(tmp_path, (".",))
    rows = [f"{index}.png,x,{word if index else 'test' if split == 'train' else 'train'}\n" for index in range(3)]
    (tmp_path / "captions.csv").write_text("file,caption,split\n" + "".join(rows))
    assert sum(record.split == split for record in read_folder(Files([tmp_path])).records) == 2


@pytest.fixture(scope="module")
def flowers():
    """Draw flowers: (image, captions, class)."""
    return [(image, captions, number) for number, image, captions in drawn("procedural-flowers", 30)["train"]]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/", "test/"),
        ("train/", "val/"),
        ("a/train-", "a/val-"),
        ("cc3m-train-", "cc3m-validation-"),
        ("x/", "test/"),
    ],
)
def test_shards_in_folders_named_test_or_val_are_the_test_split(flowers, tmp_path, train, test):
    for prefix, images in ((train, flowers[:8]), (test, flowers[8:12])):
        folder, _, name = prefix.rpartition("/")
        write_shards(tmp_path / folder, images, 4, name)
    datasets = opened(tmp_path, "webdataset")
    assert [len(dataset) for dataset in datasets] == [8, 4]
    assert {tuple(captions) for captions in datasets[1].captions} == {tuple(image[1]) for image in flowers[8:12]}


@pytest.mark.parametrize(
    "shards",
    [
        ("laion/00000", "coyo/00000"),
        ("cc3m.v1-0000", "cc3m.v1-0001"),
        ("a.b/0.0", "a.c/0.0"),
        ("a/0", "0"),
        ("x", "x.y"),
    ],
)
def test_samples_of_different_shards_share_nothing(flowers, tmp_path, shards):
    """No class, no name and no split: each image is known by its whole path below the root."""
    for place, shard in enumerate(shards):
        folder = shard.rpartition("/")[0]
        write_shards(
            tmp_path / folder, [(image, captions, "") for image, captions, _ in flowers[4 * place : 4 * place + 4]], 4
        )
        (tmp_path / folder / "000000.tar").rename(tmp_path / f"{shard}.tar")
    _, listing = list_set("webdataset", [tmp_path])
    assert {record.name for record in listing.records} == {
        f"{shard}/{index:04d}.jpg" for shard in shards for index in range(4)
    }
    train, test = opened(tmp_path, "webdataset")
    assert len({*train.class_ids, *test.class_ids}) == 8
    _, one_by_one = list_set("webdataset", [tmp_path / f"{shard}.tar" for shard in shards])
    assert len({record.name for record in one_by_one.records}) == 8


def test_shards_that_give_one_name_twice_are_refused(flowers, tmp_path):
    write_shards(tmp_path, flowers[:4], 4)
    (tmp_path / "000000.zip").write_bytes(b"")
    (tmp_path / "000000.zip").unlink()
    (tmp_path / "000000.tar.gz").write_bytes((tmp_path / "000000.tar").read_bytes())
    with pytest.raises(InputError, match=r"000000\.tar.* and .*000000\.tar\.gz.* have one name below"):
        list_set("webdataset", [tmp_path])


def test_a_class_never_equals_the_name_of_an_image(tmp_path):
    records = [
        Record("a.png", File("x", "a.png"), ["x"], class_name=None),
        Record("b.png", File("x", "b.png"), ["x"], class_name="a.png"),
    ]
    assert records[0].label != records[1].label
    with_splits(records, 0.5, 0)

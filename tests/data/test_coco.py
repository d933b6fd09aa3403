import json

import pytest
from layouts import pack
from PIL import Image

from icsd.data import DataConfig, open_dataset
from icsd.data.coco import read_coco
from icsd.data.files import Files
from icsd.errors import InputError


def write(root, split, count, start=0, **changes):
    """Write images and their list as published: ``train2017/000000000001.jpg``, ``captions_train2017.json``."""
    images, annotations = [], []
    for number in range(start + 1, start + count + 1):
        name = f"{number:012d}.jpg"
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 16), (number, 0, 0)).save(path)
        images.append({"id": number, "file_name": name, "license": 1, "width": 20, "height": 16})
        annotations += [
            {"id": 10 * number + i, "image_id": number, "caption": f"caption {i} of {number}."} for i in (0, 1)
        ]
    content = {"info": {}, "licenses": [], "images": images, "annotations": annotations, **changes}
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    (root / "annotations" / f"instances_{split}.json").write_text("{}")
    return content


@pytest.fixture
def coco(tmp_path):
    write(tmp_path / "coco", "train2017", 4)
    write(tmp_path / "coco", "val2017", 2, start=4)
    return tmp_path / "coco"


@pytest.mark.parametrize("packed", [False, True])
def test_published_layout(coco, tmp_path, packed):
    sources = [coco]
    if packed:
        sources = [pack(coco / part, tmp_path / f"{part}.zip") for part in ("train2017", "val2017", "annotations")]
    listing = read_coco(Files(sources))
    assert listing.problems == []
    assert [(record.split, record.captions) for record in listing.records] == [
        ("train" if number < 5 else "test", [f"caption 0 of {number}.", f"caption 1 of {number}."])
        for number in range(1, 7)
    ]


def test_a_folder_is_opened_in_place(coco):
    train, test = (open_dataset(DataConfig(name="coco", root=coco), split, 8) for split in ("train", "test"))
    assert (len(train), len(test)) == (4, 2)
    assert train.captions[0] == ["caption 0 of 1.", "caption 1 of 1."]


def test_names_may_repeat_in_the_folders_of_the_lists(tmp_path):
    write(tmp_path, "train", 3)
    write(tmp_path, "val", 3)
    records = read_coco(Files([tmp_path])).records
    assert [record.image.folder for record in records] == ["train"] * 3 + ["val"] * 3
    assert len({record.name for record in records}) == 6


def test_lists_beside_their_images(tmp_path):
    """The layout of Roboflow: ``train/_annotations.coco.json``."""
    for split in ("train", "valid"):
        write(tmp_path, split, 2)
        (tmp_path / "annotations" / f"captions_{split}.json").rename(tmp_path / split / "_annotations.coco.json")
    assert [record.split for record in read_coco(Files([tmp_path])).records] == ["train", "train", "test", "test"]


def test_what_is_missing_is_listed(coco):
    (coco / "train2017" / "000000000001.jpg").unlink()
    Image.new("RGB", (9, 9)).save(coco / "train2017" / "extra.jpg")
    content = json.loads((coco / "annotations" / "captions_val2017.json").read_text())
    content["annotations"] = [row | {"caption": None} for row in content["annotations"] if row["image_id"] == 5]
    content["annotations"].append({"image_id": 6, "caption": "six"})
    (coco / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    listing = read_coco(Files([coco]))
    assert len(listing.records) == 4
    assert "names '000000000001.jpg', which is not there" in listing.problems[0]
    assert "000000000005.jpg has no caption in the list" in listing.problems[1]
    assert "1 images are in no list" in listing.problems[2]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": {}}, 'must hold a list named "images"'),
        ({"annotations": None}, 'must hold a list named "annotations"'),
        ({"images": [{"id": 1}]}, r"images\[0\], must hold 'file_name'"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}] * 2}, r"images\[1\], has the id 1 of an earlier image"),
        (
            {"annotations": [{"image_id": 99, "caption": "x"}]},
            r"annotations\[0\], has the image_id 99, which no image has",
        ),
        ({"annotations": [{"image_id": 1, "caption": {"en": "x"}}]}, r"annotations\[0\], must read .*'caption'"),
        ({"annotations": [{"image_id": 1}]}, r"annotations\[0\], must read"),
        ({"annotations": [["x"]]}, r"annotations\[0\], must hold 'image_id'"),
    ],
)
def test_broken_lists_are_named(tmp_path, changes, complaint):
    write(tmp_path, "train2017", 2, **changes)
    with pytest.raises(InputError, match=rf"captions_train2017\.json.*{complaint}"):
        read_coco(Files([tmp_path]))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"images": [], "images": []}', "\ufeff"])
def test_files_that_are_no_lists_are_named(coco, text):
    (coco / "annotations" / "captions_val2017.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"captions_val2017\.json"):
        read_coco(Files([coco]))


def test_a_missing_list_is_asked_for(coco):
    with pytest.raises(InputError, match=r"hold no captions_\*\.json; give annotations_trainval2017\.zip"):
        read_coco(Files([coco / "train2017"]))


def test_an_image_in_two_folders_is_refused(coco):
    for folder in ("copy1", "copy2"):
        (coco / folder).mkdir()
        (coco / folder / "000000000001.jpg").write_bytes((coco / "train2017" / "000000000001.jpg").read_bytes())
    (coco / "train2017" / "000000000001.jpg").unlink()
    with pytest.raises(InputError, match=r"which may be .*copy1.* or .*copy2"):
        read_coco(Files([coco]))

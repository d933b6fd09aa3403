import io
import sys

import pytest
from layouts import pack
from PIL import Image

from icsd.data import DataConfig, open_dataset
from icsd.data.files import Files
from icsd.data.folder import read_folder
from icsd.data.limits import Limits
from icsd.data.prepared import write_prepared
from icsd.data.sources import list_set
from icsd.data.splits import with_splits
from icsd.errors import InputError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def encoded(color):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), color).save(file, "PNG")
    return file.getvalue()


def write(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.Table.from_pylist(rows), path, **options)
    return path


def photos(root):
    for name in ("a.png", "b.png", "c.png"):
        root.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded((255, 0, 0)))
    return root


@pytest.mark.parametrize("keys", [("file_name", "text"), ("file", "caption")])
def test_a_list_of_image_files(tmp_path, keys):
    rows = [dict(zip(keys, (f"{name}.png", f"bird {name}"), strict=True)) for name in "abc"]
    write(photos(tmp_path) / "metadata.parquet", rows)
    assert [record.captions for record in read_folder(Files([tmp_path])).records] == [
        ["bird a"],
        ["bird b"],
        ["bird c"],
    ]


def embedded(count, start=0):
    return [
        {
            "image": {"bytes": encoded((3 * (start + row), 0, 0)), "path": None},
            "text": f"bird {start + row}",
            "class": row % 2,
        }
        for row in range(count)
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_images_in_the_table(tmp_path, packed):
    """The form in which Hugging Face stores data sets of images."""
    write(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", embedded(70), row_group_size=30)
    write(tmp_path / "set" / "data" / "test-00000-of-00001.parquet", embedded(3, start=70))
    source = pack(tmp_path / "set", tmp_path / "set.zip") if packed else tmp_path / "set"
    files, listing = list_set("folder", [source])
    assert listing.problems == []
    assert {record.captions[0]: record.split for record in listing.records} == {
        f"bird {row}": "train" if row < 70 else "test" for row in range(73)
    }
    listing.records = with_splits(listing.records, 0.1, 0)
    write_prepared("folder", listing, files, tmp_path / "out")
    test = open_dataset(DataConfig(name="folder", root=tmp_path / "out"), "test", 8)
    assert test.captions == [["bird 70"], ["bird 71"], ["bird 72"]]
    colors = [round(float(test[index]["image"][0].mean()) * 127.5 + 127.5) for index in range(3)]
    assert all(abs(color - expected) < 4 for color, expected in zip(colors, (210, 213, 216), strict=True))
    with pytest.raises(InputError, match="cannot be read in random order"):
        open_dataset(DataConfig(name="folder", root=source), "train", 8) if not packed else files.byte_range(
            listing.records[0].image
        )


def test_rows_without_an_image_or_with_a_large_one(tmp_path):
    rows = [*embedded(3), {"image": {"bytes": None, "path": "x.png"}, "text": "gone", "class": 1}]
    rows.append({"image": {"bytes": bytes(2**20 + 1), "path": None}, "text": "large", "class": 1})
    write(tmp_path / "set" / "x.parquet", rows)
    files, listing = list_set("folder", [tmp_path / "set"], Limits(max_file_mb=1))
    listing.records = with_splits(listing.records, 0.1, 0)
    lines = write_prepared("folder", listing, files, tmp_path / "out", partial=True).left_out
    assert "x.parquet/00000003 holds no image" in lines[0]
    assert "more than max_file_mb=1 allows" in lines[1]


@pytest.mark.parametrize("value", [{"en": "x"}, 3, True])
def test_values_of_other_types_are_named(tmp_path, value):
    write(photos(tmp_path) / "metadata.parquet", [{"file_name": "a.png", "text": value}])
    with pytest.raises(InputError, match=r"metadata\.parquet, row 1, must read .*'text'"):
        read_folder(Files([tmp_path]))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"not parquet"])
def test_broken_files_are_named(tmp_path, content):
    (photos(tmp_path) / "metadata.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"metadata\.parquet cannot be read as Parquet"):
        read_folder(Files([tmp_path]))


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    write(photos(tmp_path) / "metadata.parquet", [{"file_name": "a.png", "text": "x"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r'needs the package .*pip install "icsd\[parquet\]"'):
        read_folder(Files([tmp_path]))

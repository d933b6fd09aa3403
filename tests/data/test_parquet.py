import io
import random
import sys

import pytest
from layouts import pack
from PIL import Image

from icsd.data import DataConfig, open_dataset
from icsd.data.files import Files
from icsd.data.folder import read_folder
from icsd.data.limits import Limits
from icsd.data.parquet import ParquetFile
from icsd.data.parquet_pages import read_pages
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


def test_images_of_a_dictionary_are_read(tmp_path):
    images = arrow.DictionaryArray.from_arrays(
        arrow.array([0, 1, 0, 0]), arrow.array([encoded("red"), encoded("blue")])
    )
    (tmp_path / "set").mkdir()
    parquet.write_table(arrow.table({"image": images, "text": list("abcd")}), tmp_path / "set" / "x.parquet")
    files, listing = list_set("folder", [tmp_path / "set"])
    assert [record.captions for record in listing.records] == [["a"], ["b"], ["c"], ["d"]]
    assert [data for _, data in files.read([record.image for record in listing.records])] == [
        encoded(color) for color in ("red", "blue", "red", "red")
    ]


def test_rows_without_an_image_or_with_a_large_one(tmp_path):
    rows = [*embedded(3), {"image": {"bytes": None, "path": "x.png"}, "text": "gone", "class": 1}]
    rows.append({"image": {"bytes": random.Random(0).randbytes(2**20 + 1), "path": None}, "text": "large", "class": 1})
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
    with pytest.raises(InputError, match=r'needs the package .*pip install -e "\.\[parquet\]"'):
        read_folder(Files([tmp_path]))


def column_parts(path):
    """Return pyarrow's description of each part of a column, with the pages that are read in it."""
    metadata = parquet.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            start = column.dictionary_page_offset or column.data_page_offset
            with path.open("rb") as file:
                yield column, list(read_pages(file, start, start + column.total_compressed_size))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_the_sizes_of_pages_are_those_after_decompression(tmp_path, version, codec, dictionary):
    rows = [{"text": f"{'bird ' * (row % 50)}{row % 7}", "tags": ["a"] * (row % 4), "n": row} for row in range(3000)]
    options = {"row_group_size": 1700, "data_page_size": 2000, "write_batch_size": 100, "compression": codec}
    path = write(tmp_path / "x.parquet", rows, data_page_version=version, use_dictionary=dictionary, **options)
    for column, pages in column_parts(path):
        assert len(pages) > 1
        has_dictionary = column.dictionary_page_offset is not None
        assert sum(page.values for page in pages[has_dictionary:]) == column.num_values
        headers = column.total_uncompressed_size - sum(page.size for page in pages)
        assert 10 * len(pages) < headers < 300 * len(pages)


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
@pytest.mark.parametrize("lists", [False, True])
def test_a_page_that_expands_beyond_the_limit_is_refused(tmp_path, codec, lists):
    text = "a" * (2**20 + 1)
    rows = [{"file_name": f"{name}.png", "text": [text] if lists else text} for name in "abc"]
    path = write(photos(tmp_path) / "metadata.parquet", rows, compression=codec)
    assert path.stat().st_size < 20_000
    with pytest.raises(InputError, match=r"metadata\.parquet, a page of text.*, has .* raise max_file_mb if"):
        read_folder(Files([tmp_path], Limits(max_file_mb=1)))
    assert len(read_folder(Files([tmp_path], Limits(max_file_mb=4))).records) == 3


def test_a_large_value_that_every_row_repeats_is_read_row_by_row(tmp_path):
    rows = [{"file_name": f"{row}.png", "text": "b" * 900_000} for row in range(70)]
    path = write(tmp_path / "metadata.parquet", rows)
    assert path.stat().st_size < 200_000
    table = ParquetFile("metadata.parquet", path, Limits(max_file_mb=1))
    assert [len(batch) for batch in table._batches(["text"])] == [1] * 70
    assert [len(batch) for batch in table._batches(["file_name"])] == [64, 6]
    assert len(list(table.rows())) == 70


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"file_name": None, "text": None}] * 100_000, r"it claims 100,000 rows in [\d,]+ bytes"),
        ([{"file_name": "a.png", "text": ["a"] * 1_100_000}], "a page of text.* claims 1,100,000 values"),
    ],
)
def test_more_rows_or_values_than_a_file_has_room_for_are_refused(tmp_path, rows, message):
    write(photos(tmp_path) / "metadata.parquet", rows)
    with pytest.raises(InputError, match=rf"metadata\.parquet cannot be read as Parquet \({message}"):
        read_folder(Files([tmp_path]))


@pytest.mark.parametrize(
    "header", [b"", b"\x15", b"\x15\x04\x15", b"\x19\xfc", b"\x15" + b"\xff" * 12, b"\x1c" * 40, b"\x18\x7f", b"\x00"]
)
def test_broken_headers_of_pages_are_refused(header):
    with pytest.raises(ValueError, match="the header of a page"):
        list(read_pages(io.BytesIO(bytes(7) + header), 7, 1000))

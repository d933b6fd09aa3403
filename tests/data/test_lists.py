import json

import pytest
from PIL import Image

from icsd.data.files import Files
from icsd.data.folder import read_folder
from icsd.errors import InputError


@pytest.fixture
def root(tmp_path):
    """Three images without captions."""
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    return tmp_path


def captions(root):
    return {record.name: record.captions for record in read_folder(Files([root])).records}


ROWS = [("a.jpg", "a small bird, with a red beak"), ("b.jpg", "a plain bird"), ("c.jpg", "a blue bird")]
QUOTED = "file,caption\n" + "".join(f'{name},"{caption}"\n' for name, caption in ROWS)
JSONL = "".join(json.dumps({"file_name": name, "text": caption}) + "\n" for name, caption in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", QUOTED),
        ("captions.txt", QUOTED),
        ("Captions.CSV", QUOTED),
        ("metadata.csv", QUOTED.replace("file,caption", "file_name,text")),
        ("captions.tsv", "file\tcaption\n" + "".join(f"{name}\t{caption}\n" for name, caption in ROWS)),
        ("captions.csv", "caption;file\n" + "".join(f"{caption};{name}\n" for name, caption in ROWS)),
        ("captions.csv", "image_name| comment\n" + "".join(f"{name}| {caption}\n" for name, caption in ROWS)),
        ("captions.csv", "file, caption\n" + "".join(f'{name}, "{caption}"\n' for name, caption in ROWS)),
        ("captions.csv", "\ufeff" + QUOTED.replace("\n", "\r\n") + "\r\n,\r\n"),
        ("metadata.jsonl", JSONL),
        ("captions.jsonl", JSONL.replace("file_name", "file").replace("text", "caption")),
    ],
)
def test_lists_of_other_names_columns_and_delimiters(root, name, text):
    (root / name).write_text(text, encoding="utf-8", newline="")
    assert captions(root) == {name: [caption] for name, caption in ROWS}


@pytest.mark.parametrize("place", ["train/captions.csv", "train/metadata.jsonl"])
@pytest.mark.parametrize("prefix", ["", "train/", "./", "train\\"])
def test_names_in_a_list_are_below_its_folder_or_the_root(root, place, prefix):
    (root / "train").mkdir()
    for name in "abc":
        (root / f"{name}.jpg").rename(root / "train" / f"{name}.jpg")
    rows = [(prefix + name, caption) for name, caption in ROWS]
    text = QUOTED.replace("\n", f"\n{prefix}", 3) if place.endswith(".csv") else ""
    text = text or "".join(json.dumps({"file": name, "caption": caption}) + "\n" for name, caption in rows)
    (root / place).write_text(text)
    assert captions(root) == {f"train/{name}": [caption] for name, caption in ROWS}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("file,caption\na.jpg,a bird, with a beak\nb.jpg,x\nc.jpg,x\n", "line 2, has 3 fields, more than the header"),
        ("file\tcaption\na.jpg\tx\nb.jpg\tx\ty\nc.jpg\tx\n", "line 3, has 3 fields"),
        ("file,caption,class\na.jpg,x,1\nb.jpg,a bird\nc.jpg,x,1\n", r"line 3, has 2 of 3 fields"),
        ("file,caption\na.jpg,first line\nsecond line\nb.jpg,x\nc.jpg,x\n", "line 3, has 1 of 2 fields"),
        ('file,caption\na.jpg,x\nb.jpg,x\nc.jpg,"open\na.jpg,y\nb.jpg,y\n', "line 4, opens a quotation mark"),
        ('file,caption\na.jpg,"open\nb.jpg,"x"\nc.jpg,x\n', "after line 1"),
        (
            'file,caption\na.jpg,"open\nb.jpg,x\nc.jpg,closed"\n',
            "line 2, .* closed only in line 4, after the row of 'b.jpg'",
        ),
        ('file,caption\na.jpg,"red" bird\nb.jpg,x\nc.jpg,x\n', "is not CSV after line 1"),
        ("file,caption,text\na.jpg,x,y\n", "line 2, has both 'caption' and 'text'"),
        ("file,caption,file\na.jpg,x,y\n", "names a column twice"),
        ("file,caption,split\na.jpg,x,evaluation\n", "has the split 'evaluation'"),
    ],
)
def test_no_part_of_a_csv_row_is_lost(root, text, complaint):
    (root / "captions.csv").write_text(text)
    with pytest.raises(InputError, match=complaint) as caught:
        read_folder(Files([root]))
    assert "captions.csv" in str(caught.value)


def test_quoted_captions_may_have_several_lines(root):
    (root / "captions.csv").write_text('file,caption\na.jpg,"one\ntwo, three"\nb.jpg,"say ""hi"""\nc.jpg,x\n')
    assert captions(root) == {"a.jpg": ["one two, three"], "b.jpg": ['say "hi"'], "c.jpg": ["x"]}


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"caption": {"en": "a bird"}}, "caption"),
        ({"caption": ["a bird", {"de": "ein Vogel"}]}, "caption"),
        ({"caption": True}, "caption"),
        ({"text": 7}, "text"),
        ({"caption": "x", "class": 1.5}, "class"),
        ({"caption": "x", "class": ["bird"]}, "class"),
        ({"caption": "x", "class": True}, "class"),
        ({"caption": "x", "split": 1}, "split"),
        ({"caption": "x", "file": 3}, "file"),
        ({"caption": "x", "file": {"name": "a.jpg"}}, "file"),
        ({"caption": "a dog \ud800"}, "caption"),
        ({"caption": "x", "class": "\udfff"}, "class"),
        ({"caption": "x", "text": "y"}, "text"),
    ],
)
def test_values_of_other_types_are_named(root, row, key):
    rows = [{"file": "b.jpg", "caption": "x"}, {"file": "a.jpg", **row}, {"file": "c.jpg", "caption": "x"}]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"captions\.jsonl, line 2, ") as caught:
        read_folder(Files([root]))
    assert repr(key) in str(caught.value) or f"the {key}" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    ['{"file": "a.jpg", "caption": "x", "caption": "y"}', "[" * 100_000, '{"a":' * 100_000, "{" + '"x": NaN' * 2 + "}"],
)
def test_lines_that_are_not_plain_json_are_named(root, line):
    (root / "captions.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(InputError, match=r"captions\.jsonl, line 2, must read"):
        read_folder(Files([root]))


def test_classes_may_be_whole_numbers(root):
    rows = [{"file": name, "caption": caption, "class": 3} for name, caption in ROWS]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {record.class_name for record in read_folder(Files([root])).records} == {"3"}


@pytest.mark.parametrize("empty", [None, "", "...", [], [None], ["", " "]])
def test_empty_captions_count_as_none(root, empty):
    rows = [{"file": "a.jpg", "caption": empty}, *({"file": f"{name}.jpg", "caption": "x"} for name in "bc")]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    listing = read_folder(Files([root]))
    assert [record.name for record in listing.records] == ["b.jpg", "c.jpg"]
    assert "a.jpg has no caption" in listing.problems[0]


def test_a_caption_without_a_word_is_quoted(root):
    rows = [{"file": "a.jpg", "caption": "🐕"}, *({"file": f"{name}.jpg", "caption": "x"} for name in "bc")]
    (root / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "no caption with a word (only '🐕')" in read_folder(Files([root])).problems[0]


@pytest.mark.parametrize("name", ["captions.jsonl", "captions.csv"])
def test_rows_without_an_image_are_a_problem(root, name):
    rows = [*ROWS, ("d.jpg", "gone"), ("e.jpg", "gone"), ("../f.jpg", "x"), ("/g.jpg", "x"), ("h.jpg", "x")]
    if name.endswith("csv"):
        (root / name).write_text("file,caption\n" + "".join(f'{name},"{caption}"\n' for name, caption in rows))
    else:
        (root / name).write_text("".join(json.dumps({"file": n, "caption": c}) + "\n" for n, c in rows))
    listing = read_folder(Files([root]))
    assert len(listing.records) == 3
    assert "names 'd.jpg', which is not an image" in listing.problems[0]
    assert "and 2 more such rows" in listing.problems[0]


def test_the_same_sentence_counts_once(root):
    rows = [("a.jpg", ["x", "y", " x "]), ("a.jpg", "y"), ("b.jpg", "x"), ("c.jpg", "x")]
    (root / "captions.jsonl").write_text("".join(json.dumps({"file": n, "caption": c}) + "\n" for n, c in rows))
    assert captions(root)["a.jpg"] == ["x", "y"]

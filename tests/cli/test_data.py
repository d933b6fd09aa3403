from pathlib import Path

import pytest
from PIL import Image

FLOWERS = ("--data.name", "procedural-flowers", "--data.size", "24")


def test_preview_writes_a_contact_sheet(icsd, workplace):
    assert icsd("data", "preview", *FLOWERS, "--count", "5", "--resolution", "16") == (0, "preview.png\n", "")
    with Image.open("preview.png") as picture:
        assert min(picture.size) > 100


def test_an_exported_set_can_be_read_as_a_folder(icsd, workplace):
    code, out, _ = icsd("data", "export", "flowers", *FLOWERS, "--resolution", "16")
    assert code == 0
    assert "16 pictures of procedural-flowers, split train" in out
    assert len(list(Path("flowers").glob("*.png"))) == len(list(Path("flowers").glob("*.txt"))) == 16
    assert icsd("data", "preview", "--data.name", "folder", "--data.root", "flowers", "--split", "test")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preview", "--resolution", "0"], "resolution is 0"),
        (["preview", "--count", "0"], "count is 0"),
        (["preview", "--out", "sheet"], "out is sheet"),
        (["preview", "--split", "all"], '"split"'),
        (["preview", "--data.name", "folder", "--data.root", "absent"], "data.root=absent"),
        (["export"], "folder"),
        (["export", "full", *FLOWERS], "full is not an empty folder"),
    ],
)
def test_errors_name_the_option_and_write_nothing(fails, workplace, arguments, message):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("mine")
    before = sorted(Path().rglob("*"))
    assert message in fails("data", *arguments)
    assert sorted(Path().rglob("*")) == before


def test_data_without_an_action_lists_them(fails):
    assert "preview,export" in fails("data")

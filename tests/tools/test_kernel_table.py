"""The table of docs/kernels.md is up to date, and its occupancies are those of NVIDIA's calculator."""

import pytest

from tools.kernel_table import MARKS, ROOT, page, write
from tools.occupancy import occupancy


def test_the_page_holds_the_table():
    assert MARKS[0] + page() + MARKS[1] in (ROOT / "docs" / "kernels.md").read_text(), (
        "run: python -m tools.kernel_table --write docs/kernels.md"
    )


def test_write_replaces_the_text_between_the_marks(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n" + MARKS[0] + "old\n" + MARKS[1] + "after\n")
    write(path)
    assert path.read_text() == "before\n" + MARKS[0] + page() + MARKS[1] + "after\n"


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "expected"),
    [
        (90, 32, 0, 8, 1.0),  # all warps
        (80, 255, 0, 8, 8 / 64),  # registers: 256 for each of 32 threads, of 65,536
        (80, 32, 80 << 10, 4, 8 / 64),  # shared memory: 81 KiB with the system's, twice in 164
        (75, 32, 32 << 10, 4, 8 / 32),  # nothing for the system there
        (86, 16, 0, 1, 16 / 48),  # blocks
        (80, 200, 0, 16, 0.0),  # too large a block
    ],
)
def test_occupancy(capability, registers, shared, warps, expected):
    assert occupancy(capability, registers, shared, warps) == expected

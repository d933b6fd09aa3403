"""The model of docs/cuda.md is up to date, and its counts are right for a shape that can be counted by hand."""

import pytest

from tools.kernel_model import combine, gram, table
from tools.kernel_table import ROOT


def test_the_page_holds_the_model():
    assert table() in (ROOT / "docs" / "cuda.md").read_text(), "run: python -m tools.kernel_model"


@pytest.mark.parametrize(
    ("samples", "warp_tiles", "rows"),
    [(32, 1, 32), (128, 10, 128), (256, 3 * 6 + 3 * 9, 3 * 96 + 3 * 192)],  # of all blocks that compare the samples
)
def test_steps_of_a_gram_matrix(samples, warp_tiles, rows):
    of = gram(samples, 64, 4)  # four lines of 32 features for two stages, four steps each
    assert of.steps == warp_tiles * 4 * 4
    assert of.copies == rows * 4 * 8 / 32
    assert of.bytes == 2 * samples * 64 * 4


def test_steps_of_a_gradient():
    of = combine(160, 64, 2)  # five rows and five chunks of 32 samples, two columns of 32 features, two steps a chunk
    assert of.steps == 5 * 5 * 2 * 2
    assert of.copies == 2 * 160 * 64 * 2 / 16 / 32  # two blocks of outputs read the features

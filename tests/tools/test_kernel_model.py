"""The model of docs/cuda.md is up to date, and its counts are right for shapes that can be counted by hand."""

import pytest

from tools.kernel_model import COPY, FLUSH, combine, feature_space, gram, rows, table
from tools.kernel_table import ROOT


def test_the_page_holds_the_model():
    assert table() in (ROOT / "docs" / "cuda.md").read_text(), "run: python -m tools.kernel_model"


@pytest.mark.parametrize(
    ("samples", "warp_tiles", "matrix", "copied"),
    [
        (32, 1, 14, 32),  # without 2 of 8 tiles above the diagonal, and without 8 products of second numbers
        (128, 10, 24, 128),
        (256, 3 * 6 + 3 * 9, 24, 3 * 96 + 3 * 192),  # of all blocks that compare the samples
    ],
)
def test_counts_of_a_gram_matrix(samples, warp_tiles, matrix, copied):
    once, twice = gram(samples, 64, 4), gram(samples, 128, 4)  # two lines a stage, of 32 features in four steps
    assert once.matrix == warp_tiles * 4 * 4 * matrix
    assert once.bytes == 2 * samples * 64 * 4
    assert twice.instructions == pytest.approx(2 * once.instructions)
    assert once.instructions > once.matrix + warp_tiles * 4 * FLUSH + copied * 4 * 8 / 32 * COPY


def test_large_gram_matrices_are_written_and_read():
    assert gram(1024, 64, 4).bytes == 2 * 1024 * (64 + 1024) * 4
    assert rows(1024).bytes == 5 * 1024**2 * 4


def test_counts_of_a_gradient():
    of = combine(160, 64, 2)  # five rows and five chunks of 32 samples, two columns of 32 features, two steps a chunk
    assert of.matrix == 5 * 5 * 2 * 2 * 16
    copies = 2 * 160 * 64 * 2 / 16 / 32  # two blocks of outputs read the features
    assert of.instructions > of.matrix + copies * COPY


def test_counts_in_feature_space():
    passes = feature_space(640, 100, 4, multiprocessors=2)
    # Two tiles of 64 features a side: three, four and three tiles of the matrices, of one split; 20 chunks of samples,
    # for each four steps of four warps.
    assert passes["matrices"].matrix == 10 * 20 * 16 * 24
    # Ten blocks of 64 samples: one tile of 128 features and two terms of four chunks each, which eight warps multiply.
    assert passes["gradient"].matrix == 10 * 2 * 4 * 32 * 24
    assert passes["gradient"].idle == 0
    assert feature_space(640, 100, 4, multiprocessors=7)["gradient"].idle == pytest.approx(4 / 14)
    assert passes["norms"].bytes == 2 * 640 * 100 * 4

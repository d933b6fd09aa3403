"""Irregular inputs on emulated devices, whose numbers of multiprocessors decide how the work is split."""

import platform

import pytest
import torch
from conformance import irregular
from conformance.irregular import Case

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64"),
    pytest.mark.usefixtures("schedule"),
]

DEVICES = pytest.mark.parametrize(
    ("emulated", "multiprocessors"),
    [(75, 7), (80, 1), (80, 132)],
    ids=["sm_75-7", "sm_80-1", "sm_80-132"],
    indirect=["emulated"],
)
# Stages whose features are split differently. The number of threads that add the splits does not divide it.
MANY_SPLITS = {"samples": 6, "dims": (5000, 700, 3100)}


@DEVICES
@pytest.mark.parametrize("case", irregular.CASES, ids=str)
def test_gradients_of_irregular_inputs(case, emulated, multiprocessors):
    emulated.library.emulator_multiprocessors(multiprocessors)
    irregular.check(case, "emulated")


@DEVICES
@pytest.mark.parametrize("dtype", irregular.DTYPES, ids=str)
def test_many_splits(dtype, emulated, multiprocessors):
    emulated.library.emulator_multiprocessors(multiprocessors)
    irregular.check(Case("sample", "kl", dtype), "emulated", **MANY_SPLITS)
    irregular.check(Case("streamed", "mse", dtype), "emulated", **MANY_SPLITS)


@DEVICES
def test_many_splits_of_the_samples(emulated, multiprocessors):
    emulated.library.emulator_multiprocessors(multiprocessors)
    irregular.check(Case("feature", "mse", torch.float32), "emulated", samples=800)


@DEVICES
@pytest.mark.parametrize("regime", ["sample", "streamed", "feature"])
def test_several_tiles_and_row_blocks(regime, emulated, multiprocessors, small_row_blocks):
    emulated.library.emulator_multiprocessors(multiprocessors)
    irregular.check(Case(regime, "mse", torch.float32), "emulated", samples=150, dims=(70, 130, 65))


@pytest.mark.parametrize("case", irregular.CASES, ids=str)
def test_rows_beyond_32_bits(case, emulated):
    irregular.check_far_apart(case, "emulated")

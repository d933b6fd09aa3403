"""Registers, stacks and shared memory of every kernel on every architecture; the instructions that were promised."""

import re
import zlib
from pathlib import Path

import pytest
from resources import (
    ARCHITECTURES,
    LOOP_ARCHITECTURES,
    dump,
    find_cuobjdump,
    instructions,
    loops,
    pinned,
    pinned_loops,
    usage,
)

from icsd import _native
from tools.occupancy import MULTIPROCESSORS, occupancy

BUILT = _native.build["cuda"].split()

pytestmark = [
    pytest.mark.skipif(not BUILT, reason="the native module was built without nvcc"),
    pytest.mark.skipif(find_cuobjdump() is None, reason="no cuobjdump: on PATH, or with `pip install triton`"),
]


@pytest.fixture(scope="module")
def found():
    return usage()


def test_every_kernel_is_in_the_table(found):
    assert {kernel for kernel, _ in found} == {kernel for kernel, _ in pinned()}
    assert {architecture for _, architecture in found} == set(BUILT)


def test_drivers_find_ptx_for_other_devices():
    """The newest's for those to come; of several, sm_80's for those between the ones with machine code."""
    new = sorted(int(architecture) for architecture in BUILT if int(architecture) >= 80)
    expected = {*new[-1:], *([80] if len(new) > 1 else [])}
    assert set(map(int, re.findall(r"\.sm_(\d+)\.ptx", dump("-lptx")))) == expected


def test_the_module_takes_less_than_8_megabytes_of_a_wheel():
    assert len(zlib.compress(Path(_native.__file__).read_bytes(), 6)) < 7.5e6


def test_nothing_is_spilled(found):
    assert [key for key, of in found.items() if of.stack] == []


def test_nothing_takes_more_than_the_table_says(found):
    worse = {
        key: (of, pinned()[key])
        for key, of in found.items()
        if key[1] in ARCHITECTURES and (of.registers, of.shared) > (pinned()[key].registers, pinned()[key].shared)
    }
    assert worse == {}


def test_every_block_finds_its_registers(found):
    """A block of `combine_tensor` has up to 16 warps, one of `gram_tensor` up to 10, all others up to 8."""
    for (kernel, architecture), of in found.items():
        if architecture in ARCHITECTURES:
            warps = {"combine_tensor": 16, "gram_tensor": 10}.get(kernel[: kernel.index("<")], 8)
            assert occupancy(int(architecture), of.registers, of.shared, warps), kernel


# Instructions of a step of a warp's tile of 32 x 32: 24 matrix instructions for float32, 8 for 16-bit types, whose
# matrix of gradients has two terms. Of up to 32 samples in float32, two of eight tiles are above the diagonal, and
# eight products of second numbers are the transpose of the other ones.
STEPS = {
    "gram_tensor<float, 2, 1>": (24, 84),
    "gram_tensor<float, 2, 4>": (14, 80),
    "gram_tensor<bfloat16, 2, 1>": (8, 18),
    "gram_tensor<half, 2, 1>": (8, 18),
    "combine_tensor<float>": (24, 100),
    "combine_tensor<bfloat16>": (16, 25),
    "bank_tensor<float>": (24, 91),
    "bank_tensor<bfloat16>": (8, 19),
    "bank_tensor<half>": (8, 19),
}


@pytest.mark.parametrize("architecture", [a for a in ("80", "90", "100") if a in BUILT])
def test_few_samples_have_64_kib_in_flight(architecture, found):
    """The ring has 8 buffers with a line of 128 bytes of each sample; one of them is being used."""
    for element in ("float", "bfloat16", "half"):
        for tiles, samples in ((1, 16), (2, 32)):
            registers = found[f"gram_tensor<{element}, {tiles}, 4>", architecture].registers
            warps = MULTIPROCESSORS[int(architecture)][0]
            blocks = occupancy(int(architecture), registers, 8 * samples * 144, 4) * warps / 4
            assert blocks * 7 * samples * 128 >= 64 << 10, (element, samples, blocks)


@pytest.mark.parametrize("architecture", [a for a in LOOP_ARCHITECTURES if a in BUILT])
def test_inner_loops(architecture):
    found = loops(architecture)
    table = {kernel: of for (kernel, built_for), of in pinned_loops().items() if built_for == architecture}
    assert found.keys() == table.keys()
    for kernel, of in found.items():
        steps = of.instructions / of.matrix
        assert steps <= table[kernel].instructions / table[kernel].matrix, (kernel, of)
        assert of.generic == 0, kernel
    for kernel, (matrix, most) in STEPS.items() if architecture != "120" else ():  # the compiler unrolls less there
        of = found[kernel]
        assert of.matrix % matrix == 0
        assert of.instructions / (of.matrix / matrix) <= most, (kernel, of)
        assert of.ldmatrix, kernel


@pytest.mark.parametrize("architecture", [a for a in ("90", "100", "120") if a in BUILT])
def test_kernels_that_are_launched_early_wait_before_they_access_memory(architecture):
    early = ("rows_forward", "rows_backward", "norms_forward", "sum_gram", "combine_tensor", "combine_fma")
    early += ("covariance_tensor", "covariance_fma", "sum_covariances", "finish_covariances")
    early += ("feature_backward_tensor", "feature_backward_fma")
    early += ("compute_norms", "gram_tensor", "gram_fma", "row_block_forward", "row_block_backward", "sum_losses")
    early += ("compute_row_means", "center_rows")
    for kernel, text in instructions(architecture).items():
        waits = [match.start() for match in re.finditer(r"\bACQBULK\b", text)]
        if kernel.split("<")[0] in early:
            accesses = re.search(r"\b(LDG|STG|LDGSTS|LD|ST)(\.\S+)? ", text)
            assert waits, kernel
            assert waits[0] < accesses.start(), kernel
        else:
            assert not waits, kernel


@pytest.mark.parametrize("architecture", [a for a in LOOP_ARCHITECTURES if a in BUILT])
def test_promised_instructions(architecture):
    code = instructions(architecture)
    tf32, bfloat16, half = r"HMMA\.1688\.F32\.TF32", r"HMMA\.16816\.F32\.BF16", r"HMMA\.16816\.F32\b"
    for element, product in {"float": tf32, "bfloat16": bfloat16, "half": half}.items():
        for tiles, splits in ((1, 4), (2, 4), (2, 1)):
            kernel = code[f"gram_tensor<{element}, {tiles}, {splits}>"]
            assert re.search(product, kernel)
            assert re.search(r"LDGSTS\S*\.128", kernel), "asynchronous copies of 16 bytes"
    for element, product in {"float": tf32, "bfloat16": bfloat16, "half": tf32}.items():
        kernel = code[f"combine_tensor<{element}>"]
        assert re.search(product, kernel)
        assert re.search(r"STG\S*\.128", kernel), "results in 16 bytes"
        if element != "half":  # which is converted on its way
            assert re.search(r"LDGSTS\S*\.128", kernel)
        for kernel in ("covariance_tensor", "feature_backward_tensor"):
            assert re.search(tf32, code[f"{kernel}<{element}>"])
            assert re.search(r"LDGSTS\S*\.128", code[f"{kernel}<{element}>"])
        for kernel in ("finish_covariances", "feature_backward_fma", "feature_backward_tensor"):
            # The compiler makes hundreds of instructions of each matrix product in float64 for sm_120.
            assert re.search("DFMA" if architecture == "120" else r"DMMA\.8", code[f"{kernel}<{element}>"])
    for kernel, text in code.items():
        assert not re.search(r"\b(LDL|STL)\b", text), f"{kernel} uses local memory"
        has_tickets = kernel.startswith("finish_covariances") and "double" not in kernel
        assert len(re.findall(r"\b(?:ATOM|RED)", text)) == (2 if has_tickets else 0), f"{kernel} has atomics"
    assert re.search(r"LDS\.128", code["gram_fma<float, 4>"])
    assert re.search(r"FFMA", code["gram_fma<float, 4>"])
    assert re.search(r"DFMA", code["gram_fma<double, 4>"])

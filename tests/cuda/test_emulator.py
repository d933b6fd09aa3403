"""The emulator itself: it computes what CUDA promises, and catches what it is there to catch."""

import ctypes
import os
import platform
import subprocess

import pytest
import torch
from harness import EMULATOR, SANITIZER_OPTIONS, build_program, build_runtime, load, pointer

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the context switch is written for x86-64")

# Every planted bug with the mode and the blocks' order that are there to catch it, and what they say.
RACE = "ThreadSanitizer: data race"
CAUGHT = [
    ("reduction_without_barrier", "plain", "sequential", "wrong result"),
    ("reduction_without_barrier", "thread", "sequential", RACE),
    ("tile_loop_without_trailing_barrier", "plain", "sequential", "wrong result"),
    ("tile_loop_without_trailing_barrier", "thread", "sequential", RACE),
    ("wrong_wait_prior", "plain", "sequential", "wrong result"),
    ("copy_into_a_tile_in_use", "plain", "sequential", "wrong result"),
    ("copy_into_a_tile_in_use", "thread", "sequential", RACE),
    ("static_shared_overrun", "address", "sequential", "index 64 out of bounds for type 'float [64]'"),
    ("dynamic_shared_overrun", "address", "sequential", "AddressSanitizer: heap-buffer-overflow"),
    ("divergent_barrier", "plain", "sequential", "of the block returned without it"),
    ("exited_lanes_in_mask", "plain", "sequential", "__shfl_xor_sync: mask 0xffffffff names lane"),
    ("missing_lane", "plain", "sequential", "deadlock"),
    ("uninitialized_shared", "plain", "sequential", "wrong result"),
    ("accumulation_without_atomics", "thread", "concurrent", RACE),
    ("ticket_without_fence", "thread", "concurrent", RACE),
    ("global_overrun", "address", "sequential", "AddressSanitizer: heap-buffer-overflow"),
    ("tile_past_a_row", "address", "sequential", "AddressSanitizer: heap-buffer-overflow"),
    ("misaligned_vector", "address", "sequential", "misaligned address"),
    ("misaligned_copy", "plain", "sequential", "is not aligned to 16 bytes"),
    ("misaligned_tile", "plain", "sequential", "is not aligned to 16 bytes"),
]


def run_planted(name, version, mode, blocks, seed):
    program = build_program(EMULATOR / "planted" / "main.cpp", mode)
    return subprocess.run(
        [program, name, version, str(seed), blocks],
        env=os.environ | SANITIZER_OPTIONS,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_every_planted_bug_is_here():
    assert {name for name, *_ in CAUGHT} == {path.stem for path in (EMULATOR / "planted").glob("*.cu")}


@pytest.mark.parametrize(("name", "mode", "blocks", "words"), CAUGHT, ids=[f"{c[0]}-{c[1]}" for c in CAUGHT])
def test_planted_bug_is_caught(name, mode, blocks, words):
    run = run_planted(name, "planted", mode, blocks, seed=1)
    assert run.returncode != 0
    assert words in run.stderr
    assert name in run.stderr


@pytest.mark.parametrize(
    ("mode", "blocks", "seed"),
    [
        *(("plain", "sequential", seed) for seed in range(10)),
        ("plain", "concurrent", 1),
        ("address", "sequential", 0),
        ("address", "sequential", 1),
        ("thread", "sequential", 1),
        ("thread", "concurrent", 1),
    ],
)
def test_corrected_twins_pass(mode, blocks, seed):
    run = run_planted("all", "corrected", mode, blocks, seed)
    assert run.returncode == 0, run.stderr[-3000:]


def test_a_race_is_reported_with_both_lines():
    report = run_planted("reduction_without_barrier", "planted", "thread", "sequential", seed=1).stderr
    source = (EMULATOR / "planted" / "reduction_without_barrier.cu").read_text().splitlines()
    line = next(number for number, text in enumerate(source, 1) if "+=" in text)
    assert report.count(f"reduction_without_barrier.cu:{line}") >= 2


@pytest.fixture(params=[0, 1, 2], ids="seed {}".format)
def features(request):
    return load(EMULATOR / "features.cu", seed=request.param)


def test_rounding(features):
    special = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        65504.0,
        65519.9,
        65520.0,
        1e-8,
        -3e-8,
        6e-5,
        3.4e38,
        2.0**-24,
        2.0**-25,
    ]
    x = torch.cat([torch.tensor(special), torch.randn(2000) * torch.logspace(-12, 8, 2000)])
    ties = (torch.arange(400) + 1024 + 0.5) / 512  # halfway between neighbors in half
    x = torch.cat([x, ties, -ties, 1 + (torch.arange(300) + 0.5) / 128])
    half, bfloat16 = torch.empty(2, len(x))
    features.emulate_round_to(pointer(x), pointer(half), pointer(bfloat16), len(x))
    torch.testing.assert_close(half, x.half().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(bfloat16, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


# The places of the elements of the operands of mma.m16n8k8 (tf32) and mma.m16n8k16, as CUTLASS's CuTe states them:
# strides of (lane % 4, lane // 4), of the elements of a word, and of the bits of a word's number, in matrices stored by
# columns.
MATRICES = {
    "tf32": {"depth": 8, "a": ((16, 1), 0, (8, 64)), "b": ((8, 1), 0, (32,))},
    "bfloat16": {"depth": 16, "a": ((32, 1), 16, (8, 128)), "b": ((16, 1), 8, (64,))},
    "float16": {"depth": 16, "a": ((32, 1), 16, (8, 128)), "b": ((16, 1), 8, (64,))},
}
SUMS = ((32, 1), 16, (8,))


def places(strides, elements):
    """Return the places in a matrix of the elements of each lane: (lanes, words, elements of a word)."""
    (member, group), element, numbers = strides
    lanes = torch.arange(32)
    of_lane = lanes % 4 * member + lanes // 4 * group
    words = sum(torch.arange(2 ** len(numbers)) // 2**bit % 2 * stride for bit, stride in enumerate(numbers))
    return of_lane[:, None, None] + words[:, None] + torch.arange(elements) * element


def words_of(matrix, strides):
    """Return the words of the lanes: of a matrix (rows, k), stored by columns as CuTe does."""
    elements = 4 // matrix.element_size()
    return matrix.T.flatten()[places(strides, elements)].contiguous().view(torch.int32)


def multiply(features, kind, a, b, c):
    """Return a b^T + c by one instruction."""
    place = places(SUMS, 2)  # two sums are neighbors in a row, as the elements of a word are
    sums = c.T.flatten()[place].contiguous()
    result = torch.empty_like(sums)
    words = [words_of(matrix, MATRICES[kind][name]) for matrix, name in ((a, "a"), (b, "b"))]
    getattr(features, f"emulate_product_{kind}")(*map(pointer, (*words, sums, result)))
    matrix = torch.empty(8 * 16)
    matrix[place.flatten()] = result.flatten()
    return matrix.view(8, 16).T


@pytest.mark.parametrize("kind", MATRICES)
def test_tensor_cores(features, kind):
    depth, dtype = MATRICES[kind]["depth"], {"tf32": torch.float32}.get(kind) or getattr(torch, kind)
    whole = [torch.randint(-8, 8, (rows, depth)).to(dtype) for rows in (16, 8)]
    c = torch.randint(-8, 8, (16, 8)).float()
    assert multiply(features, kind, *whole, c).equal(whole[0].float() @ whole[1].float().T + c)

    a, b = torch.rand(16, depth).to(dtype), torch.rand(8, depth).to(dtype)
    seen = [a, b]
    if kind == "tf32":  # what was not rounded loses its low bits
        seen = [(x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b)]
        assert not a.equal(seen[0])
    exact = seen[0].double() @ seen[1].double().T
    excess = multiply(features, kind, a, b, torch.zeros(16, 8)) / exact - 1
    # Truncated after every few products: never above, and below by an ulp for each.
    assert excess.max() <= 0
    assert excess.min() < -(2.0**-25)
    assert excess.min() >= -4 * 2.0**-23


def test_tensor_cores_in_float64(features):
    """The lanes' elements as CuTe states them: of a (8, 4) and b (8, 4) those of a row side by side, of c two."""
    a, b, c = (torch.randn(8, size, dtype=torch.float64) for size in (4, 4, 8))
    result = torch.empty_like(c)
    features.emulate_product_float64(*map(pointer, (a, b, c, result)))
    torch.testing.assert_close(result, a @ b.T + c, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices(features, transposed):
    rows = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    words = torch.empty(32, 4, dtype=torch.int32)
    features.emulate_matrices(pointer(rows), pointer(words), int(transposed))
    expected = rows.transpose(1, 2) if transposed else rows
    found = words.view(torch.int16).view(8, 4, 4, 2)  # row, pair of columns, matrix, element
    assert found.permute(2, 0, 1, 3).reshape(4, 8, 8).equal(expected)


def test_warps(features):
    x = torch.randint(0, 100, (64,), dtype=torch.int32)
    out = torch.empty(15, 64, dtype=torch.int32)
    features.emulate_warp(pointer(x), pointer(out))
    lane, warps = torch.arange(32), x.view(2, 32)

    def expect(values):
        return torch.as_tensor(values).expand(2, 32).reshape(64).int()

    def each(reduced):
        return reduced[:, None].expand(2, 32).reshape(64).int()

    halves = torch.cat(
        [warps[:, :16].sum(1, keepdim=True).expand(2, 16), warps[:, 16:].amax(1, keepdim=True).expand(2, 16)], 1
    )
    expected = [
        each(warps[:, 5]),
        warps[:, lane // 8 * 8 + (lane + 1) % 8].reshape(64),
        warps[:, torch.where(lane >= 3, lane - 3, lane)].reshape(64),
        warps[:, torch.where(lane % 16 + 3 < 16, lane + 3, lane)].reshape(64),
        warps[:, lane ^ 9].reshape(64),
        each((warps % 3 == 0).sum(1)),
        each((warps == 40).any(1)),
        each((warps < 90).all(1)),
        each(warps.sum(1)),
        each(warps.amax(1)),
        each(warps.amin(1)),
        halves.reshape(64).int(),
        expect((x % 2).sum()),
        expect((x == 40).any()),
        expect((x < 90).all()),
    ]
    for row, (value, truth) in enumerate(zip(out, expected, strict=True)):
        assert value.equal(truth), row


def test_atomics_and_the_order_of_blocks(features):
    blocks = 20
    orders = []
    for seed in (0, 1, 1, 2):
        features.emulator_seed(seed)
        total, largest, turns = torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        order = torch.zeros(blocks + 1, dtype=torch.int32)
        features.emulate_atomics(pointer(total), pointer(largest), pointer(turns), pointer(order), blocks)
        assert total == blocks * 16
        assert largest == 30
        assert turns == blocks * 32 % 10
        orders.append(order[:-1].tolist())
    assert orders[0] == list(range(blocks)) == sorted(orders[1])
    assert orders[1] == orders[2] != orders[3]


def test_asynchronous_copy_with_zeros(features):
    x, out = torch.randn(4), torch.empty(4)
    features.emulate_zero_filled(pointer(x), pointer(out))
    kept = x.view(torch.uint8).clone()
    kept[6:] = 0
    assert out.view(torch.uint8).equal(kept)


def test_bytes_are_counted():
    counted = load(EMULATOR / "features.cu", mode="counted")
    x, out = torch.randn(10, 48), torch.empty(10, 48)
    ranges = [counted.emulator_watch(t.data_ptr(), t.nbytes) for t in (x, out)]
    counted.emulate_move_rows(pointer(x), pointer(out), *x.shape)
    assert out.equal(x)
    assert [counted.emulator_bytes_read(r) for r in ranges] == [x.nbytes, 0]
    assert [counted.emulator_bytes_written(r) for r in ranges] == [0, out.nbytes]
    counted.emulator_unwatch()


def test_launches_are_counted_and_refused(features):
    before = features.emulator_launches()
    assert features.emulate_launch(3, 1024, 48 << 10, -1) == 0
    assert features.emulate_launch(1, 1025, 0, -1) == 9  # cudaErrorInvalidConfiguration
    assert features.emulate_launch(0, 32, 0, -1) == 9
    assert features.emulate_launch(1, 32, (48 << 10) + 1, -1) == 1  # cudaErrorInvalidValue
    assert features.emulate_launch(1, 32, 0, 164 << 10) == 1  # more than an A100 gives a block
    assert features.emulate_launch(1, 32, 163 << 10, 163 << 10) == 0
    assert features.emulate_launch(1, 32, 0, 48 << 10) == 0
    assert features.emulator_launches() == before + 3


def test_static_shared_memory_counts(features):
    kib, fixed, invalid = 1 << 10, (16 << 10) + 16, 1
    launch = features.emulate_static_shared
    assert features.emulate_static_shared_bytes() == fixed
    assert launch(48 * kib - fixed, -1, None) == 0
    assert launch(48 * kib - fixed + 1, -1, None) == invalid
    assert b"beside 16400 static" in features.emulator_failure()
    assert launch(0, 163 * kib - fixed + 1, None) == invalid
    assert launch(163 * kib - fixed, 163 * kib - fixed, None) == 0
    assert launch(20 * kib, 10 * kib, None) == invalid
    assert launch(0, 48 * kib - fixed, None) == 0  # the limit before any attribute is set
    features.emulator_dry_run(1)
    before = features.emulator_launches()
    assert launch(0, -1, None) == 0
    features.emulator_dry_run(0)
    assert features.emulator_launches() == before + 1


def test_launches_on_another_stream_are_refused(features):
    stream, other, handle = ctypes.c_void_p(0x100), ctypes.c_void_p(0x200), 400  # cudaErrorInvalidResourceHandle
    features.emulator_require_stream(stream)
    assert features.emulate_static_shared(0, -1, stream) == 0
    assert features.emulate_static_shared(0, -1, other) == handle
    assert features.emulate_static_shared(0, -1, None) == handle
    assert features.emulator_failure() == b"stream 0 is used, the current one is 256"
    features.emulator_require_stream(None)
    assert features.emulate_static_shared(0, -1, None) == 0


def test_a_capture_refuses_what_waits_or_allocates(features):
    assert features.emulate_waits() == 0
    features.emulator_capture(1)
    assert features.emulate_waits() == 6
    assert features.emulate_static_shared(0, -1, None) == 906  # cudaErrorStreamCaptureImplicit
    assert features.emulate_static_shared(0, -1, ctypes.c_void_p(0x100)) == 0
    features.emulator_capture(0)
    assert features.emulate_static_shared(0, -1, None) == 0


@pytest.mark.parametrize(("arch", "shared"), [(75, 64), (80, 163), (90, 227)])
def test_architecture(arch, shared):
    runtime = ctypes.CDLL(build_runtime("plain", arch))
    value = ctypes.c_int()
    numbers = {75: arch // 10, 76: arch % 10, 97: shared << 10}
    for attribute, expected in numbers.items():
        assert runtime._Z22cudaDeviceGetAttributePi14cudaDeviceAttri(ctypes.byref(value), attribute, 0) == 0
        assert value.value == expected

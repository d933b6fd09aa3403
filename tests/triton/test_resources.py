"""Compile every kernel for every architecture without a GPU; the code may not be worse than resources.json says."""

import json
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import torch  # noqa: E402
from machine_code import REGIMES, TARGETS, compile_for, dry_run, dry_run_to_banks, without_gpu  # noqa: E402

from icsd.losses import KL, MSE, SmoothL1  # noqa: E402
from icsd.ops.triton import TritonBackend, kernels, runtime  # noqa: E402
from icsd.ops.triton.kernels.tuning import SHARED_BYTES, tuning_class  # noqa: E402
from tools.kernel_cases import TEMPERATURES  # noqa: E402

VERSION, *PINNED = json.loads((Path(__file__).parent / "resources.json").read_text())
MATRIX = {
    "80": "mma.sync",
    "86": "mma.sync",
    "89": "mma.sync",
    "90": "wgmma.mma_async",
    "100": "tcgen05.mma",
    "120": "mma.sync",
    "gfx90a": "v_mfma_f32",
    "gfx942": "v_mfma_f32",
    "gfx950": "v_mfma_f32",
}
DTYPES = [torch.float64, torch.bfloat16, torch.float16, torch.float32]
PRODUCTS = (
    *("gram_kernel", "combine_kernel", "covariance_kernel", "streamed_forward_kernel", "streamed_backward_kernel"),
    *("bank_summaries_kernel", "bank_gradients_kernel"),
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
def test_resources(target):
    found = compile_for(target)
    pinned = {
        (row["regime"], row["dtype"], row["kernel"]): row for row in PINNED if row["architecture"] == str(target.arch)
    }
    assert found.keys() == pinned.keys()
    for kernel, resources in found.items():
        assert resources.stack == 0, (kernel, resources)
        assert resources.shared <= SHARED_BYTES, (kernel, resources)
        if triton.__version__ == VERSION["triton"]:  # other compilers take other amounts
            assert resources.shared <= pinned[kernel]["shared"], (kernel, resources)
            assert resources.registers <= pinned[kernel]["registers"], (kernel, resources)
        assert resources.instruction == pinned[kernel]["instruction"], (kernel, resources)
        if kernel[-1] in PRODUCTS and str(target.arch) in MATRIX:
            assert resources.instruction == MATRIX[str(target.arch)], (kernel, resources)


LOSSES = [("mse", [0.0, 1.0]), ("smooth_l1", [0.5, 0.0, 0.0]), ("kl", TEMPERATURES), ("kl", [0.1, 0.1, 0.0])]
CASES = [
    (regime, *loss, dtype)
    for number, loss in enumerate(LOSSES)
    for regime, dtype in zip(REGIMES, DTYPES[number:] + DTYPES[:number], strict=False)
    if regime in TritonBackend.regimes[loss[0]]
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("regime", "loss", "parameters", "dtype"), CASES, ids=str)
def test_everything_compiles(regime, loss, parameters, dtype, monkeypatch):
    # The interpreter accepts more than the compiler does.

    def compile_(kernel, out, grid, *arguments, **constants):
        kernel.warmup(*arguments, grid=(1,), **constants)

    monkeypatch.setattr(runtime, "launch", compile_)
    with without_gpu(next(target for target in TARGETS if target.arch == 90)):
        for student, teacher, teacher_gradient, fewest_tiles in [
            (torch.float32, torch.float32, False, 16),
            (dtype, dtype, True, 16),
            (torch.float32, dtype, True, 1),  # of a split: columns are divided
        ]:
            monkeypatch.setattr(kernels.streamed, "FEWEST_TILES", fewest_tiles)
            x = torch.empty(2, 200, 300, dtype=student, device="meta")
            y = torch.empty(2, 200, 100, dtype=teacher, device="meta")
            dry_run(regime, loss, [x, y], parameters, teacher_gradient)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("loss", "dtypes", "wanted"),
    [
        (KL(), (torch.float64, torch.float32), (True, True, True, False)),
        (MSE("both"), (torch.bfloat16, torch.float32), (True, False, True, True)),
        (SmoothL1(), (torch.float16, torch.bfloat16), (False, True, False, False)),
    ],
    ids=str,
)
def test_everything_to_banks_compiles(loss, dtypes, wanted, monkeypatch):
    compiled = []

    def compile_(kernel, out, grid, *arguments, **constants):
        kernel.warmup(*arguments, grid=(1,), **constants)
        compiled.append(constants)

    monkeypatch.setattr(runtime, "launch", compile_)
    with without_gpu(next(target for target in TARGETS if target.arch == 90)):
        student, teacher = dtypes
        # Triton takes arguments of 1 as constants.
        groups, n, m, *dims = (2, 200, 900, 100, 30) if wanted[0] else (1, 1, 1, 1, 1)
        shapes = [(n, dims[0], student), (n, dims[1], teacher), (m, dims[0], student), (m, dims[1], teacher)]
        features = [torch.empty(groups, n, dim, dtype=dtype, device="meta") for n, dim, dtype in shapes]
        dry_run_to_banks(loss, features, wanted)
    assert sum("OF_BANK" in constants for constants in compiled) == sum(wanted)


def test_launches_that_add_are_not_measured(monkeypatch):
    # A trial of such a launch would leave its sum behind.
    monkeypatch.delenv("ICSD_TRITON_AUTOTUNE", raising=False)
    x = torch.empty(1, 64, 4096, device="meta")
    for kernel in (kernels.combine_kernel, kernels.streamed_backward_kernel):
        assert "ADD" in kernel.keys
    sizes = {"TILE": 64, "SAMPLES": 32, "matrix": x, "x": x}
    for add in (False, True):
        candidates = kernels.combine_kernel.early_config_prune(kernels.combine_kernel.configs, sizes, ADD=add)
        assert (len(candidates) == 1) == add


def test_one_measurement_serves_many_dimensions():
    x = torch.empty(1, 64, 0, device="meta")
    classes = [tuning_class(x.new_empty(1, 64, dim)) for dim in (1, 256, 257, 1024, 4096, 16384, 10**6)]
    assert classes[0] == classes[1] != classes[2] == classes[3] != classes[4] != classes[5] == classes[6]
    assert tuning_class(x) != tuning_class(x.bfloat16())
    for name in ("gram_kernel", "combine_kernel", "covariance_kernel", "streamed_forward_kernel"):
        assert "TUNED_FOR" in getattr(kernels, name).keys
        assert "dim" not in getattr(kernels, name).keys

"""Global memory moves as little as the operator's floor says: counted in the emulator, access by access."""

import csv
import platform

import launches
import pytest
import torch
from conformance.accuracy import DTYPES
from emulated import EmulatedBackend, Traffic

import icsd
from icsd.ops import registry
from icsd.ops.regimes import force_regime
from tools.kernel_cases import CASES

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")


@pytest.fixture(scope="module")
def counted():
    with registry.temporarily(EmulatedBackend("counted")) as backend:
        yield backend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("multiprocessors", [2, 132])
@pytest.mark.parametrize(("n", "student", "teacher"), [(16, 8192, 16384), (32, 8192, 4096), (64, 2048, 4096)])
def test_features_move_once(n, student, teacher, multiprocessors, dtype, counted):
    if dtype == torch.float64:
        n = min(n, 32)  # what one block takes; float64 is there to check gradients
    counted.library.emulator_multiprocessors(multiprocessors)
    x, y = torch.randn(n, student).to(dtype).requires_grad_(), torch.randn(n, teacher).to(dtype)
    with Traffic(counted.library, x, y) as forward:
        loss = icsd.similarity_distillation_loss(x, y, backend=counted.name)
    with Traffic(counted.library, x, y) as backward:
        (gradient,) = torch.autograd.grad(loss, x)
    assert forward.read(x) <= 1.05 * x.nbytes
    assert forward.read(y) <= 1.05 * y.nbytes
    assert backward.read(x) <= 1.05 * x.nbytes
    assert backward.written(gradient) == gradient.nbytes
    assert forward.written(x) == forward.written(y) == backward.written(x) == backward.read(gradient) == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("n", "dtype"), [(16, torch.float32), (32, torch.float32), (40, torch.bfloat16), (64, torch.bfloat16)], ids=str
)
def test_all_traffic_is_near_the_floor(n, dtype, counted):
    """The partial and N x N matrices included, on a large device."""
    counted.library.emulator_multiprocessors(132)
    x, y = torch.randn(n, 65536).to(dtype).requires_grad_(), torch.randn(n, 65536).to(dtype)
    with Traffic(counted.library, x, y) as forward:
        loss = icsd.similarity_distillation_loss(x, y, "kl", backend=counted.name)
    with Traffic(counted.library, x, y) as backward:
        torch.autograd.grad(loss, x)
    floor = 3 * x.nbytes + y.nbytes
    assert floor <= forward.of_memory() + backward.of_memory() <= 1.05 * floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_matrices_are_written_and_read_once(dtype, counted):
    """One split is enough for many tiles: no partial matrices are made, and both triangles are written at once."""
    n = 300
    counted.library.emulator_multiprocessors(4)  # so few that a block takes eight rows
    x, y = torch.randn(n, 40).to(dtype).requires_grad_(), torch.randn(n, 30).to(dtype)
    with force_regime("sample"), Traffic(counted.library, x, y) as forward:
        icsd.similarity_distillation_loss(x, y, "kl", backend=counted.name)
    moved = {launch.kernel.split("<")[0]: launch.bytes for launch in forward.launches}
    features = [x.data_ptr(), y.data_ptr()]
    written = sum(count for address, count in moved["gram_tensor"].items() if address not in features)
    matrices = 2 * n * n * 4
    assert written == matrices
    # Each block of eight rows reads the norms of all samples, too: an eighth.
    assert matrices <= sum(moved["rows_forward"].values()) <= 1.15 * matrices


@pytest.mark.parametrize("case", CASES, ids=str)
def test_launches_are_as_the_table_says(case, counted):
    if case.regime not in counted.regimes[case.loss]:
        pytest.skip(f"no {case.loss} in {case.regime} space")
    found = [[name, *row] for name, of_pass in launches.count(counted, case).items() for row in of_pass]
    with launches.TABLE.open() as file:
        rows = [row for row in csv.DictReader(file) if row["architecture"] == "80"]
    expected = [
        [row[field] for field in ("pass", *launches.Launches._fields)]
        for row in rows
        if [row[field] for field in case._fields] == [*map(str, case)]
    ]
    assert [[*map(str, row)] for row in found] == expected, "run: python -m tools.kernel_table --pin"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("student", "teacher"), [(64, 64), (128, 64)])
def test_traffic_of_feature_space(student, teacher, dtype, counted):
    """Features are read once for the norms, then once for each tile of a covariance or gradient that needs them.

    The backward pass has the norms. Blocks of the same samples are at work side by side: memory gives the features
    twice forward, once backward.
    """
    counted.library.emulator_multiprocessors(132)
    x, y = torch.randn(1024, student).to(dtype).requires_grad_(), torch.randn(1024, teacher).to(dtype)
    with force_regime("feature"):
        with Traffic(counted.library, x, y) as forward:
            loss = icsd.similarity_distillation_loss(x, y, backend=counted.name)
        with Traffic(counted.library, x, y) as backward:
            (gradient,) = torch.autograd.grad(loss, x)
    tiles = (student + teacher) // 64
    assert forward.read(x) <= 1.05 * (1 + tiles) * x.nbytes
    assert forward.read(y) <= 1.05 * (1 + tiles) * y.nbytes
    assert backward.read(x) <= 1.05 * (2 + student // 64) * x.nbytes  # and to project the gradient
    assert backward.read(y) <= 1.05 * (student // 64) * y.nbytes
    assert backward.written(gradient) == gradient.nbytes
    assert forward.written(x) == forward.written(y) == backward.written(x) == backward.read(gradient) == 0
    assert gradient.isfinite().all()

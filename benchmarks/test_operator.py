"""Forward + backward of the operator beside its peers."""

import torch

from benchmarks.ceilings import floor_seconds
from benchmarks.peers import IMPLEMENTATIONS
from benchmarks.workloads import DTYPES, Case, in_turns

LOSSES = ("mse", "kl")
SHAPES = [(16, 1024), (16, 65536), (64, 65536), (128, 32768)]
# With SHAPES they make a line at 64 samples and one at 8,192 features, for the plots.
SCALING = [(16, 8192), (64, 1024), (64, 8192), (64, 524288), (256, 8192)]
GRID = [(n, d) for n in (8, 16, 32, 64, 128, 256) for d in (8192, 65536, 524288)]


def cases(full):
    shapes = [*SHAPES, *(shape for shape in GRID if shape not in SHAPES)] if full else SHAPES
    everything = [Case(*shape, dtype, loss) for shape in shapes for dtype in DTYPES for loss in LOSSES]
    return everything if full else [*everything, *(Case(*shape, torch.float32, "mse") for shape in SCALING)]


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    metafunc.parametrize("workload", cases(full), indirect=True, scope="module", ids=str)
    metafunc.parametrize(("turn", "implementation"), in_turns(IMPLEMENTATIONS))


def test_forward_backward(workload, turn, implementation, measure, ceilings):
    case = workload.case
    measure(
        lambda: workload.forward_backward(implementation),
        benchmark="operator",
        work="forward+backward",
        implementation=implementation,
        floor=floor_seconds(case.samples, case.features, case.features, case.dtype, ceilings),
        **vars(case),
    )

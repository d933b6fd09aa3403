"""Forward + backward of the operator beside its peers."""

import pytest

from benchmarks.ceilings import floor_seconds
from benchmarks.peers import IMPLEMENTATIONS
from benchmarks.workloads import DTYPES, GRID, Case, in_turns

LOSSES = ("mse", "kl")
SHAPES = [(16, 1024), (16, 65536), (64, 65536), (128, 32768)]
# With SHAPES they make a line at 64 samples and one at 8,192 features, for the plots, without the whole grid.
SCALING = [(16, 8192), (64, 1024), (64, 8192), (64, 524288), (256, 8192)]


def cases(quick):
    """Return the cases; those of the grid have `grid` in their ids, for `--select grid`."""
    everything = [Case(*shape, dtype, loss) for shape in SHAPES for dtype in DTYPES for loss in LOSSES]
    if quick:
        return [*everything, *(Case(*shape) for shape in SCALING)]
    grid = [Case(*shape, loss=loss) for shape in GRID for loss in LOSSES]
    return [
        *(case for case in everything if case not in grid),
        *(pytest.param(case, id=f"{case}-grid") for case in grid),
    ]


def pytest_generate_tests(metafunc):
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize("workload", cases(quick), indirect=True, scope="module", ids=str)
    metafunc.parametrize(("turn", "implementation"), in_turns(IMPLEMENTATIONS))


def test_forward_backward(workload, turn, implementation, measure, ceilings):
    case = workload.case
    measure(
        lambda: workload.forward_backward(implementation),
        benchmark="operator",
        work="forward+backward",
        implementation=implementation,
        floor=floor_seconds(case.samples, case.dim, case.dim, case.dtype, case.loss, ceilings),
        **vars(case),
    )

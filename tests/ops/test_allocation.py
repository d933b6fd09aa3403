"""Large results lie on large pages, which are kept for the next when freed, never more than was in use at once."""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import icsd
from icsd import _native
from icsd.ops import empty_cache

MIB = 1 << 20
MAPPINGS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(
    not MAPPINGS.exists() or any(field not in MAPPINGS.read_text() for field in ("LazyFree", "VmFlags")),
    reason="this system does not tell of its memory",
)


def mapping_at(address):
    """Return the fields that Linux reports for the memory at an address, or nothing if there is none."""
    fields = {}
    inside = False
    for line in MAPPINGS.read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside = begin <= address < end
        elif inside:
            fields[first.removesuffix(":")] = rest
    return fields


def gradient(samples, features):
    x, y = torch.randn(samples, features, requires_grad=True), torch.randn(samples, 64)
    icsd.similarity_distillation_loss(x, y, backend="cpu").backward()
    return x, y


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no large pages")
def test_large_gradients_lie_on_large_pages():
    x, _ = gradient(17, 1 << 19)
    assert "hg" in mapping_at(x.grad.data_ptr() + x.grad.nbytes // 2)["VmFlags"]


def test_the_next_gradient_takes_the_memory_of_the_last():
    x, y = gradient(17, 1 << 19)
    address = x.grad.data_ptr()
    x.grad = None
    icsd.similarity_distillation_loss(x, y, backend="cpu").backward()
    assert x.grad.data_ptr() == address


def peak_above_now(work):
    """Return the bytes of memory that `work` needs beyond what is in use."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew

    def status(field):
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) << 10

    before = status("VmRSS:")
    work()
    return status("VmHWM:") - before


@pytest.mark.parametrize(("groups", "samples", "features"), [(15, 256, 64), (5, 500, 900)])
def test_many_threads_share_a_limit_of_sums(groups, samples, features):
    x = torch.randn(groups, samples, features)
    threads = torch.get_num_threads()
    torch.set_num_threads(24)
    try:
        icsd.cross_sample_similarity(x[:1, :40], backend="cpu")  # starts the threads
        empty_cache()
        with torch.no_grad():
            assert peak_above_now(lambda: _native.cpu.gram(x)) < (100 if features == 64 else 200) * MIB
        unit = torch.nn.functional.normalize(x.double(), dim=-1)
        torch.testing.assert_close(
            icsd.cross_sample_similarity(x, backend="cpu").double(), unit @ unit.mT, rtol=0, atol=1e-6
        )
    finally:
        torch.set_num_threads(threads)


def take(mib):
    """A native result of so many MiB."""
    return _native.cpu.combine(torch.ones(mib, 1), torch.ones(1, MIB // 4))


def test_the_last_freed_of_a_size_is_taken_first():
    first, second = take(21), take(21)
    address = first.data_ptr()
    del second, first
    assert take(21).data_ptr() == address


def test_what_is_kept_can_be_given_back():
    x, _ = gradient(17, 1 << 19)
    address = x.grad.data_ptr()
    x.grad = None
    assert mapping_at(address)
    empty_cache()
    assert not mapping_at(address)


def test_a_gradient_in_use_is_not_taken():
    x, y = gradient(9, 1 << 19)
    first = x.grad
    expected = first.clone()
    x.grad = None
    icsd.similarity_distillation_loss(2 * x, y, "kl", backend="cpu").backward()
    assert x.grad.data_ptr() != first.data_ptr()
    assert torch.equal(first, expected)


def test_gradients_are_ordinary_tensors():
    x, y = gradient(9, 1 << 19)
    assert not x.grad._is_view()
    assert x.grad.is_contiguous()
    single = x.grad.clone()
    icsd.similarity_distillation_loss(x, y, backend="cpu").backward()
    assert torch.equal(x.grad, 2 * single)
    assert torch.equal(copy.deepcopy(x.grad), x.grad)
    assert torch.equal(pickle.loads(pickle.dumps(x.grad)), x.grad)
    torch.optim.SGD([x], lr=1.0).step()
    view = x.grad[3:5]
    expected = view.clone()
    x.grad = None
    assert torch.equal(view, expected)
    shared = gradient(9, 1 << 19)[0].grad
    expected = shared.clone()
    assert torch.equal(shared.share_memory_(), expected)


# Each of them needs a process of its own: what is kept depends on all that was in use before.
BOUND = """
from test_allocation import mapping_at, take

large = take(64)
at_large = large.data_ptr()
del large
assert int(mapping_at(at_large)["LazyFree"][0])     # kept, and the system's to take
small = take(8)                                     # fits the large one badly; both are more than was ever in use
at_small = small.data_ptr()
assert mapping_at(at_small) and not mapping_at(at_large)
again = take(56)
at_again = again.data_ptr()
assert mapping_at(at_again)
del small, again
two, three = take(8), take(54)
assert (two.data_ptr(), three.data_ptr()) == (at_small, at_again)   # each by its size, with a little to spare
"""


def run(script):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_more_is_kept_than_was_in_use():
    run(BOUND)


def test_tensors_may_outlive_the_interpreter():
    run(f"import builtins; from test_allocation import gradient; builtins.x = gradient(9, {1 << 19})")


def test_results_of_any_size():
    for rows, width in ((0, 5), (1, 0), (1, 1), (3, MIB // 4), (5, MIB // 4)):
        result = _native.cpu.combine(torch.ones(rows, 1), torch.ones(1, width))
        assert torch.equal(result, torch.ones(rows, width))
        assert result.data_ptr() % 64 == 0


def _child(queue):
    x, _ = gradient(9, 1 << 19)
    queue.put(float(x.grad.abs().sum()))


def test_children_have_memory_of_their_own():
    x, _ = gradient(9, 1 << 19)
    expected = x.grad.clone()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60) > 0
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(x.grad, expected)

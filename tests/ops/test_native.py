"""The binding refuses hostile arguments; threads and forks do not hang; memory stays at N² a stage."""

import os
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import icsd
from icsd import _native


def features(tensor, **changes):
    fields = {"address": tensor.data_ptr(), "dtype": 0, "features": 6, "group_stride": 24, "sample_stride": 6}
    return tuple((fields | changes).values())


X = torch.ones(4, 6)
OUT = torch.empty(4, 6)
MATRIX = torch.ones(4, 4)
SLOTS = torch.empty(2, 4, 5)
LOSS = torch.empty(1)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("null pointer", lambda: _native.gram(features(X, address=0), 1, 4, MATRIX.data_ptr())),
        ("out is a null pointer", lambda: _native.gram(features(X), 1, 4, 0)),
        ("unknown dtype", lambda: _native.gram(features(X, dtype=9), 1, 4, MATRIX.data_ptr())),
        ("unknown dtype", lambda: _native.gram(features(X, dtype=-1), 1, 4, MATRIX.data_ptr())),
        ("must not be negative", lambda: _native.gram(features(X), 1, -4, MATRIX.data_ptr())),
        ("must not be negative", lambda: _native.gram(features(X, features=-6), 1, 4, MATRIX.data_ptr())),
        ("must not be negative", lambda: _native.gram(features(X, sample_stride=-6), 1, 4, MATRIX.data_ptr())),
        ("overflow", lambda: _native.gram(features(X), 2**62, 4, MATRIX.data_ptr())),
        ("overflow", lambda: _native.gram(features(X, sample_stride=2**62), 1, 4, MATRIX.data_ptr())),
        ("overflow", lambda: _native.gram(features(X, features=2**63 - 1), 1, 4, MATRIX.data_ptr())),
        ("aligned", lambda: _native.gram(features(X, address=X.data_ptr() + 1), 1, 4, MATRIX.data_ptr())),
        ("overlaps its input", lambda: _native.combine(MATRIX.data_ptr(), 4, features(X), 1, 4, features(X))),
        (
            "overlaps itself",
            lambda: _native.combine(MATRIX.data_ptr(), 4, features(X), 1, 4, features(OUT, sample_stride=3)),
        ),
        ("does not match", lambda: _native.combine(MATRIX.data_ptr(), 4, features(X), 1, 4, features(OUT, features=5))),
        ("does not match", lambda: _native.combine(MATRIX.data_ptr(), 4, features(X), 1, 4, features(OUT, dtype=2))),
        ("no teacher", lambda: _native.distill([], 1, 4, [], 0, [], 1e-8, False, LOSS.data_ptr(), 0)),
        ("one weight", lambda: _native.distill([features(X)] * 2, 1, 4, [], 0, [], 1e-8, False, LOSS.data_ptr(), 0)),
        (
            "unknown divergence",
            lambda: _native.distill([features(X)] * 2, 1, 4, [1.0], 7, [], 1e-8, False, LOSS.data_ptr(), 0),
        ),
        (
            "takes 3 parameters, got 0",
            lambda: _native.distill([features(X)] * 2, 1, 4, [1.0], 1, [], 1e-8, False, LOSS.data_ptr(), 0),
        ),
        ("loss is a null", lambda: _native.distill([features(X)] * 2, 1, 4, [1.0], 0, [], 1e-8, False, 0, 0)),
        (
            "one result",
            lambda: _native.distill_backward(LOSS.data_ptr(), SLOTS.data_ptr(), [features(X)], [], False, 1, 4),
        ),
        (
            "slots is a null",
            lambda: _native.distill_backward(LOSS.data_ptr(), 0, [features(X)], [features(OUT)], False, 1, 4),
        ),
        (
            "overlaps its input",
            lambda: _native.distill_backward(
                LOSS.data_ptr(), SLOTS.data_ptr(), [features(X)], [features(X)], False, 1, 4
            ),
        ),
        ("out overlaps its input, x", lambda: _native.gram(features(X), 1, 4, X.data_ptr())),
        (
            "out overlaps its input, matrix",
            lambda: _native.combine(OUT.data_ptr(), 4, features(X), 1, 4, features(OUT)),
        ),
        (
            "slots overlaps its input, stage",
            lambda: _native.distill([features(X)] * 2, 1, 4, [1.0], 0, [], 1e-8, False, LOSS.data_ptr(), X.data_ptr()),
        ),
        (
            "slots overlaps another result, loss",
            lambda: _native.distill(
                [features(X)] * 2, 1, 4, [1.0], 0, [], 1e-8, False, SLOTS.data_ptr(), SLOTS.data_ptr()
            ),
        ),
        (
            "saved overlaps its input, stage",
            lambda: _native.distill_streamed(
                [features(X)] * 2, 1, 4, [1.0], 0, [], 1e-8, False, LOSS.data_ptr(), X.data_ptr()
            ),
        ),
        (
            "out overlaps another result, out",
            lambda: _native.distill_backward(
                LOSS.data_ptr(), SLOTS.data_ptr(), [features(X)] * 2, [features(OUT)] * 2, False, 1, 4
            ),
        ),
        (
            "out overlaps its input, grad",
            lambda: _native.distill_backward(
                OUT.data_ptr(), SLOTS.data_ptr(), [features(X)], [features(OUT)], False, 1, 4
            ),
        ),
        ("bytes must not be negative", lambda: _native.Allocation(-1)),
    ],
)
def test_hostile_arguments_are_refused(match, call):
    with pytest.raises(ValueError, match=match):
        call()


def test_wrong_python_types_are_refused():
    with pytest.raises(TypeError):
        _native.gram("x", 1, 4, MATRIX.data_ptr())
    with pytest.raises(TypeError):
        _native.gram((1, 2, 3), 1, 4, MATRIX.data_ptr())


class Losses(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.manual_seed(index)
        return icsd.similarity_distillation_loss(torch.randn(16, 9000), torch.randn(16, 9000), backend="cpu")


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_dataloader_workers(context):
    expected = [Losses()[i] for i in range(4)]  # the pool is up before the fork
    loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context=context, timeout=120)
    torch.testing.assert_close(list(loader), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_forked_child_does_not_hang():
    Losses()[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if Losses()[1].isfinite() else 1)
    watchdog = threading.Timer(60, os.kill, (child, 9))
    watchdog.start()
    _, status = os.waitpid(child, 0)
    watchdog.cancel()
    assert status == 0


def test_threads_agree():
    torch.manual_seed(0)
    x, y = torch.randn(40, 20000, requires_grad=True), torch.randn(40, 7000)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss = icsd.similarity_distillation_loss(x, y, backend="cpu")
            results.append((loss, *torch.autograd.grad(loss, x)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-8)


def test_concurrent_python_threads():
    expected = [Losses()[i] for i in range(4)]
    results = {}

    def work(worker):
        generator = torch.Generator()
        for index in range(4):
            generator.manual_seed(index)
            x, y = (torch.randn(16, 9000, generator=generator) for _ in range(2))
            results[worker, index] = icsd.similarity_distillation_loss(x, y, backend="cpu")

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for (_, index), result in results.items():
        torch.testing.assert_close(result, expected[index])
    assert len(results) == 16


def saved_bytes(loss_of):
    """What autograd keeps for the backward, beyond the inputs themselves."""
    inputs = [torch.randn(32, 4096, requires_grad=True), torch.randn(32, 8192), torch.randn(32, 2048)]
    known = {tensor.data_ptr() for tensor in inputs}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(inputs).backward()
    return sum(kept.values())


def test_backward_keeps_one_matrix_a_stage():
    bytes_kept = saved_bytes(lambda stages: icsd.interstage_distillation_loss(stages, backend="cpu"))
    assert bytes_kept == 3 * 32 * 33 * 4


def test_peak_memory_of_torch_allocations():
    x, y = torch.randn(64, 65536, requires_grad=True), torch.randn(64, 65536)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = icsd.similarity_distillation_loss(x, y, backend="cpu")
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert loss.requires_grad
    assert allocated <= 2 * 64 * 65 * 4 + 4096


@pytest.mark.parametrize("samples", [5, 9, 20])
@pytest.mark.parametrize("divergence", ["mse", "kl"])
def test_the_same_bits_wherever_memory_happens_to_lie(divergence, samples):
    """Loops that the compiler made for memory near other memory and for memory far from it rounded differently."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(samples, width, generator=generator).requires_grad_() for width in (70, 64))
        found = set()
        for i in range(100):
            moved = [torch.empty(16 * k) for k in range(i % 7)]  # the next allocations lie elsewhere
            loss = icsd.similarity_distillation_loss(x, y, divergence, backend="cpu")
            (grad,) = torch.autograd.grad(loss, x)
            found.add((loss.item(), grad.numpy().tobytes()))
            del moved
        assert len(found) == 1

"""The binding refuses hostile arguments; threads and forks do not hang; memory stays at N² a stage."""

import os
import threading

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import icsd
from icsd import _native
from icsd.ops import library

X = torch.ones(4, 6)


def spec(**changes):
    return _native.Spec(
        **{
            "loss": "mse",
            "parameters": [0.0, 1.0],
            "weights": [1.0],
            "eps": 1e-8,
            "teacher_gradient": False,
            "regime": "sample",
        }
        | changes
    )


def distill(*inputs, **changes):
    """A call of a specification with other arguments than the usual ones."""
    return _native.cpu.distill(list(inputs), spec(**changes), True)


def misaligned():
    return torch.frombuffer(bytearray(100), dtype=torch.float32, offset=1, count=24).view(4, 6)


def backward(grad=None, saved=None, inputs=(X,), wanted=(True,), **changes):
    """The gradient of a student's features, or a call with other arguments."""
    grad = torch.ones(()) if grad is None else grad
    saved = torch.ones(2, 4, 5) if saved is None else saved
    return _native.cpu.distill_backward(grad, saved, list(inputs), list(wanted), spec(**changes))


class Named(torch.Tensor):
    """A subclass."""


class Watched(torch.autograd.Function):
    """The identity, whose backward pass notes whether its gradient is read."""

    @staticmethod
    def forward(ctx, x, reads, notes):
        ctx.note = lambda grad: notes.append(reads([grad]))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.note(grad)
        return grad, None, None


@pytest.mark.parametrize("reads", [_native.cpu.reads, library.reads], ids=["native", "Python"])
def test_tensors_are_read_whose_memory_has_their_elements(reads):
    assert reads([X, X.mT, X[:0], X.bfloat16(), torch.ones(()), torch.nn.Parameter(X), X.clone().requires_grad_()])
    assert reads(())
    lazy = torch._neg_view(X), torch.complex(X, X).conj().imag, torch._efficientzerotensor((4, 6))
    for x in (*lazy, X.as_subclass(Named), torch._efficientzerotensor(())):
        assert not reads((X, x))
    notes = []
    torch.func.vmap(lambda row: notes.append(reads([row])) or row)(X)
    torch.func.grad(lambda x: notes.append(reads([x])) or x.sum())(X)
    torch.func.jvp(lambda x: notes.append(reads([x])) or x, (X,), (X,))
    x = X.clone().requires_grad_()
    torch.autograd.grad(Watched.apply(x, reads, notes), x, torch.ones(2, 4, 6), is_grads_batched=True)
    assert notes == [False] * 4


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "x: Tensor", lambda: _native.cpu.gram(None)),
        (TypeError, "x: Tensor", lambda: _native.cpu.gram(X.numpy())),
        (TypeError, "x: Tensor", lambda: _native.cpu.gram((X.data_ptr(), 0, 6, 24, 6))),
        (ValueError, "x must be float32", lambda: _native.cpu.gram(X.int())),
        (ValueError, "x must be float32", lambda: _native.cpu.gram(X.to(torch.complex64))),
        (ValueError, "shape", lambda: _native.cpu.gram(X[0])),
        (ValueError, "features are not adjacent", lambda: _native.cpu.gram(X.mT)),
        (ValueError, "one stride apart", lambda: _native.cpu.gram(torch.ones(2, 3, 4, 6).transpose(0, 1))),
        (ValueError, "not aligned", lambda: _native.cpu.gram(misaligned())),
        (ValueError, "overflow", lambda: _native.cpu.gram(X[:1].expand(2**40, 6))),
        (MemoryError, "bad_alloc", lambda: _native.cpu.gram(torch.empty(2**28, 0))),
        (MemoryError, "bad_alloc", lambda: _native.cpu.gram(X[:1].expand(2**60, 1, 6))),
        (RuntimeError, "meta", lambda: _native.cpu.gram(X.to("meta"))),
        (RuntimeError, "storage", lambda: _native.cpu.gram(X.to_sparse())),
        (ValueError, "do not fit", lambda: _native.cpu.combine(torch.ones(4, 5), X)),
        (ValueError, "shape", lambda: _native.cpu.combine(torch.ones(4), X)),
        (ValueError, "matrix is not contiguous", lambda: _native.cpu.combine(torch.ones(4, 3).mT, X)),
        (ValueError, "matrix is not of the compute type", lambda: _native.cpu.combine(torch.ones(4, 4).double(), X)),
        (
            ValueError,
            "matrix must have 32 elements",
            lambda: _native.cpu.combine(torch.ones(4, 4), torch.ones(2, 4, 6)),
        ),
        (ValueError, "must not be empty", lambda: distill(weights=[])),
        (ValueError, "one for each of 0 weights", lambda: distill(X, X, weights=[])),
        (ValueError, "must agree", lambda: distill(X, X[:3])),
        (ValueError, "loss must be one of mse, kl, .*, got l2", lambda: spec(loss="l2")),
        (ValueError, "kl takes 3 parameters, got 2", lambda: spec(loss="kl")),
        (ValueError, "sample can center, got streamed", lambda: spec(center=True, regime="streamed")),
        (ValueError, "feature includes the diagonal", lambda: spec(parameters=[0.0, 0.0], regime="feature")),
        (ValueError, "feature clamps nothing", lambda: spec(parameters=[1.0, 1.0], regime="feature")),
        (ValueError, "regime must be .*, got dense", lambda: spec(regime="dense")),
        (
            ValueError,
            "the regime feature is for mse, got sp",
            lambda: spec(loss="sp", parameters=[1.0], regime="feature"),
        ),
        (TypeError, "Spec", lambda: spec(weights=1.0)),
        (TypeError, "distill", lambda: _native.cpu.distill([X, X], None, True)),
        (ValueError, "grad must have 1 elements, got 2", lambda: backward(grad=torch.ones(2))),
        (ValueError, "grad is not of the compute type", lambda: backward(grad=torch.ones((), dtype=torch.float16))),
        (ValueError, "grad is not of the compute type", lambda: backward(inputs=[X.double()])),
        (ValueError, "saved must have 40 elements, got 20", lambda: backward(saved=torch.ones(4, 5))),
        (ValueError, "saved is not of the compute type", lambda: backward(saved=torch.ones(2, 4, 5).double())),
        (ValueError, "saved is not contiguous", lambda: backward(saved=torch.ones(2, 5, 4).mT)),
        (ValueError, "one element for each input", lambda: backward(wanted=())),
        (ValueError, "one for each of 1 weights, got 2", lambda: backward(inputs=[X, X], wanted=(True, True))),
        (ValueError, "and the teacher, got 1", lambda: backward(regime="streamed")),
    ],
)
def test_hostile_arguments_are_refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gram_of_many_samples_and_features(dtype):
    # Several blocks of the matrix, the last of them small, and several parts of the features.
    x = torch.randn(600, 2100, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = _native.cpu.gram(x)
    assert torch.equal(gram, gram.mT)
    scale = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(gram.double(), x.double() @ x.double().mT, rtol=scale, atol=2100 * scale)


@pytest.mark.parametrize("samples", [8, 20])
def test_results_that_go_past_the_cache(samples):
    # Few and large, of one thread; the width ends in a part of a strip.
    generator = torch.Generator().manual_seed(0)
    matrix, x = torch.randn(8, samples, generator=generator), torch.randn(samples, (1 << 19) + 32, generator=generator)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        result = _native.cpu.combine(matrix, x)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(result, matrix @ x, rtol=1e-5, atol=1e-4)


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
    """Return what autograd keeps for the backward pass besides the inputs."""
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


def test_pytorch_copies_no_features():
    x, y = torch.randn(64, 65536, requires_grad=True), torch.randn(64, 65536)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = icsd.similarity_distillation_loss(x, y, backend="cpu")
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert loss.requires_grad
    assert allocated <= 4096


@pytest.mark.parametrize("samples", [5, 9, 20])
@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_the_same_bits_wherever_memory_happens_to_lie(loss, samples):
    """Loops that the compiler made for memory near other memory and for memory far from it rounded differently."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(samples, width, generator=generator).requires_grad_() for width in (70, 64))
        found = set()
        for i in range(100):
            moved = [torch.empty(16 * k) for k in range(i % 7)]  # the next allocations lie elsewhere
            value = icsd.similarity_distillation_loss(x, y, loss, backend="cpu")
            (grad,) = torch.autograd.grad(value, x)
            found.add((value.item(), grad.numpy().tobytes()))
            del moved
        assert len(found) == 1

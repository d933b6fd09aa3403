"""The operator among autocast, threads, processes, meta and fake tensors, export, copies and pickles."""

import copy
import pickle
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import icsd
from icsd.losses import KL
from icsd.ops import tuning

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def features(n, d, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_and_gradient(student, teacher, loss="kl", forward=nullcontext(), **options):  # noqa: B008
    student = student.detach().requires_grad_()
    with forward:
        value = icsd.similarity_distillation_loss(student, teacher, loss, **options)
    return value.detach(), torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("loss", ["mse", "kl", "sp", "cka", "rkd_distance"])
def test_autocast_changes_nothing(loss, backend):
    student, teacher = features(9, 700), features(9, 300, seed=1)
    expected = loss_and_gradient(student, teacher, loss, backend=backend)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    value, gradient = loss_and_gradient(student, teacher, loss, forward=autocast, backend=backend)
    assert (value.dtype, gradient.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close((value, gradient), expected, rtol=0, atol=0)


def test_a_model_under_autocast_trains(backend):
    torch.manual_seed(0)
    model, teacher = torch.nn.Linear(50, 400), features(16, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(features(16, 50, seed=1))
        loss = icsd.similarity_distillation_loss(output, teacher, backend=backend)
    assert (output.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    loss.backward()
    assert model.weight.grad.norm() > 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["mse", "kl", "dist", "rkd_angle"])
def test_repeats_are_the_same_bits(loss, dtype, threads):
    student, teacher = features(24, 30000, dtype=dtype), features(24, 7001, seed=1, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [loss_and_gradient(student, teacher, loss, backend="cpu") for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(again, first) for again, first in zip(run, runs[0], strict=True))


def test_callers_at_once_get_the_bits_of_one():
    cases = [(features(n, d), features(n, 2 * d, seed=1)) for n, d in ((5, 9000), (33, 2000), (64, 500), (2, 3))]
    expected = [loss_and_gradient(*case, backend="cpu") for case in cases]
    wrong = []
    barrier = threading.Barrier(8)

    def work(first):
        barrier.wait()
        for turn in range(12):
            index = (first + turn) % len(cases)
            result = loss_and_gradient(*cases[index], backend="cpu")
            if not all(map(torch.equal, result, expected[index])):
                wrong.append((first, index))

    callers = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(120)
        assert not caller.is_alive()
    assert not wrong


COUNT_THREADS = """
import os, sys, torch, icsd
torch.set_num_threads(int(sys.argv[1]))
x = torch.randn(64, 20000)
before = len(os.listdir("/proc/self/task"))
icsd.similarity_distillation_loss(x, x, "kl", backend="cpu")
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_no_more_threads_than_torch_was_told():
    def count(threads):
        command = [sys.executable, "-c", COUNT_THREADS, str(threads)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert [count(threads) for threads in (1, 2, 5)] == [0, 1, 4]


def test_fake_tensors_have_the_shapes_of_real_ones():
    with FakeTensorMode():
        student, teacher = torch.empty(3, 9, 70, requires_grad=True), torch.empty(3, 9, 30, dtype=torch.float64)
        similarity = icsd.cross_sample_similarity(student, backend="cpu")
        losses = icsd.similarity_distillation_loss(student, teacher, "kl", reduction="none", backend="cpu")
        (gradient,) = torch.autograd.grad(losses.sum(), student)
    assert (similarity.shape, similarity.dtype) == ((3, 9, 9), torch.float32)
    assert (losses.shape, losses.dtype) == ((3,), torch.float64)
    assert (gradient.shape, gradient.dtype) == ((3, 9, 70), torch.float32)


def test_meta_tensors_take_the_definition():
    loss = icsd.similarity_distillation_loss(torch.empty(9, 70, device="meta"), torch.empty(9, 30, device="meta"), "kl")
    assert (loss.shape, loss.device.type) == ((), "meta")


class Distilled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 30)
        self.criterion = icsd.SimilarityDistillationLoss(KL(0.2))

    def forward(self, x, teacher):
        return self.criterion(self.layer(x), teacher)


@pytest.mark.parametrize("idle", [True, False])
def test_export_keeps_the_operator(idle, monkeypatch):
    monkeypatch.setattr(tuning, "idle", idle)
    model, x, teacher = Distilled(), features(8, 20), features(8, 40, seed=1)
    samples = torch.export.Dim("samples", min=2, max=1000)
    program = torch.export.export(model, (x, teacher), dynamic_shapes=({0: samples}, {0: samples}))
    assert any("icsd.distill" in str(node.target) for node in program.graph.nodes)
    for n in (8, 5):
        torch.testing.assert_close(program.module()(x[:n], teacher[:n]), model(x[:n], teacher[:n]))


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_modules_can_be_copied_and_pickled(duplicate):
    stages = [features(6, 20), features(6, 30, seed=1)]
    loss = icsd.InterstageDistillationLoss(KL(include_diagonal=False), weights=[0.5])
    again = duplicate(loss)
    assert repr(again) == repr(loss)
    torch.testing.assert_close(again(stages), loss(stages), rtol=0, atol=0)


def test_examples_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "operator.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) > 5
    namespace = {}
    for example in examples:
        exec(example, namespace)

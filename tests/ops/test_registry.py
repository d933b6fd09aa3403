"""The choice of a backend, and errors that name the argument, the value and the remedy."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import icsd
from icsd import cross_sample_similarity as similarity
from icsd import interstage_distillation_loss as interstage
from icsd import similarity_distillation_loss as pair
from icsd.losses import KL, MSE, SmoothL1
from icsd.ops import cuda


def chosen(backend=None, tensor=None):
    from icsd.ops import registry

    return registry.select(backend, [torch.ones(2, 3) if tensor is None else tensor]).name


def test_order_of_choice():
    assert chosen() == "cpu"
    with icsd.use_backend("cpu"):
        assert chosen() == "cpu"
        with icsd.use_backend("reference"):
            assert chosen() == "reference"
            assert chosen("cpu") == "cpu"
        assert chosen() == "cpu"
    assert chosen() == "cpu"


def test_environment_chooses_for_every_thread():
    code = """
import threading, torch, icsd
from icsd.ops import registry
def show(): print(registry.select(None, [torch.ones(2, 3)]).name)
show()
thread = threading.Thread(target=show); thread.start(); thread.join()
with icsd.use_backend("cpu"): show()
"""
    environment = os.environ | {"ICSD_BACKEND": "reference"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["reference", "reference", "cpu"]


def test_context_is_of_its_thread():
    seen = []
    with icsd.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_meta_tensors_fall_back_but_a_name_is_a_promise():
    meta = torch.ones(2, 3, device="meta")
    assert chosen(tensor=meta) == "composite"
    with pytest.raises(
        RuntimeError,
        match=r"'cpu' does not apply.*\n  cpu: it takes cpu tensors, got meta\n  (.|\n)*\n  reference: applies",
    ):
        chosen("cpu", meta)


def test_missing_native_module_says_why(monkeypatch):
    from icsd.ops import cpu, registry

    monkeypatch.setattr(cpu, "_native", None)
    monkeypatch.setattr(registry.get("cpu"), "ready", False)
    monkeypatch.setattr(cpu, "_import_error", "No module named 'icsd._native'", raising=False)
    assert chosen() == "composite"
    status = next(status for status in icsd.backends() if status.name == "cpu")
    assert not status.available
    assert "pip install" in status.reason
    with pytest.raises(RuntimeError, match="is not built"):
        icsd.cross_sample_similarity(torch.ones(2, 2), backend="cpu")


def test_status():
    assert [status.name for status in icsd.backends()][-1] == "reference"
    assert all(status.available == (status.reason is None) for status in icsd.backends())


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            ValueError,
            "backend 'tpu' is unknown; choose one of 'cpu', 'cuda', 'triton', 'composite', 'reference'",
            lambda x: similarity(x, backend="tpu"),
        ),
        (TypeError, "x must be float32.*got torch.int64.*convert", lambda x: similarity(x.long())),
        (TypeError, "x must be a tensor, got list", lambda x: similarity([[1.0]])),
        (ValueError, r"x must have the shape \(\*B, N, D\), got \(3,\)", lambda x: similarity(x[0])),
        (ValueError, "eps must be a positive", lambda x: similarity(x, eps=0)),
        (ValueError, "eps must be a positive", lambda x: pair(x, x, eps=float("nan"))),
        (ValueError, r"student and teacher must agree.*\(4, 3\) and \(3, 3\)", lambda x: pair(x, x[:3])),
        (ValueError, "must agree", lambda x: pair(x[None], x)),
        (
            ValueError,
            r"teacher was understood as 2 x 3 groups of 5 samples with 4 features.*teacher.flatten\(2\).mT",
            lambda x: pair(torch.ones(2, 20, 7), torch.ones(2, 3, 5, 4)),
        ),
        (TypeError, "teacher must be float32", lambda x: pair(x, x.bool())),
        (ValueError, "student is on cpu and teacher on meta", lambda x: pair(x, x.to("meta"))),
        (
            ValueError,
            "loss must be one of 'mse', .*, a loss object .* or a function of .*, got 'mae'",
            lambda x: pair(x, x, "mae"),
        ),
        (ValueError, "loss must be one of .*, got None", lambda x: pair(x, x, None)),
        (ValueError, r"loss must be an object, got the class KL: write KL\(\)", lambda x: pair(x, x, KL)),
        (TypeError, "beta", lambda x: pair(x, x, beta=1)),
        (ValueError, "student_temperature must be a positive.*got -1", lambda x: pair(x, x, KL(-1))),
        (ValueError, "teacher_temperature must be a positive", lambda x: pair(x, x, KL(teacher_temperature=0))),
        (ValueError, "beta must be a finite", lambda x: pair(x, x, SmoothL1(float("inf")))),
        (ValueError, "reduction must be 'mean', 'sum' or 'none', got 'max'", lambda x: pair(x, x, reduction="max")),
        (ValueError, r"one value for each group; it returned \(4, 4\)", lambda x: pair(x, x, torch.sub)),
        (ValueError, "at least two", lambda x: interstage([x])),
        (ValueError, "teacher must index one of the 2 stages, got 2", lambda x: interstage([x, x], teacher=2)),
        (ValueError, "one number for each of the 1 students, got 2", lambda x: interstage([x, x], weights=[1, 2])),
        (
            TypeError,
            r"weights\[0\] must be a number without a gradient",
            lambda x: interstage([x, x], weights=[torch.tensor(1.0, requires_grad=True)]),
        ),
        (
            TypeError,
            "kl: student_temperature must be a number without a gradient",
            lambda x: pair(x, x, KL(torch.tensor(0.1, requires_grad=True))),
        ),
        (ValueError, "eps must be a positive finite number", lambda x: pair(x, x, eps=torch.tensor(1e-8))),
        (ValueError, "eps must be a positive finite number, got '1e-8'", lambda x: pair(x, x, eps="1e-8")),
        (ValueError, "eps must be a positive finite number, got None", lambda x: pair(x, x, eps=None)),
        (
            TypeError,
            "weights must hold one number for each .* 1 students, got 0.5",
            lambda x: interstage([x, x], weights=0.5),
        ),
        (TypeError, r"weights\[0\] must be a number, got '1'", lambda x: interstage([x, x], weights=["1"])),
        (ValueError, "weights must be finite", lambda x: interstage([x, x], weights=[float("nan")])),
        (ValueError, r"stages\[0\] and stages\[1\] must agree", lambda x: interstage([x[:2], x])),
    ],
)
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call(torch.ones(4, 3))


def test_modules():
    stages = [torch.randn(4, 5), torch.randn(4, 6)]
    loss = icsd.InterstageDistillationLoss(KL(0.3))
    torch.testing.assert_close(loss(stages), icsd.interstage_distillation_loss(stages, KL(0.3)))
    assert "student_temperature=0.3" in repr(loss)
    centered = icsd.InterstageDistillationLoss(KL(0.3), center=True)
    expected = icsd.interstage_distillation_loss(stages, KL(0.3), center=True)
    torch.testing.assert_close(centered(stages), expected)
    assert not torch.isclose(expected, loss(stages))
    pair = icsd.SimilarityDistillationLoss(reduction="sum", center=True)
    expected = icsd.similarity_distillation_loss(*stages, reduction="sum", center=True)
    torch.testing.assert_close(pair(*stages), expected)
    with pytest.raises(ValueError, match="got 'mae'"):
        icsd.SimilarityDistillationLoss("mae")


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        ([75, 80, 86, 89, 90, 100, 120], 75, True),
        ([75, 80, 86, 89, 90, 100, 120], 87, True),
        ([75, 80, 86, 89, 90, 100, 120], 110, True),  # by PTX of sm_80
        ([75, 80, 86, 89, 90, 100, 120], 130, True),
        ([75, 80, 86, 89, 90, 100, 120], 70, False),
        ([86, 90], 80, True),  # by PTX of sm_80, too
        ([90], 90, True),
        ([90], 86, False),
        ([90], 120, True),  # by PTX of sm_90
        ([75, 90], 86, False),
        ([75], 80, False),
        ([75], 75, True),
        ([80], 75, False),
    ],
)
def test_devices_that_cuda_code_runs_on(built, device, runs):
    assert cuda.runs_on(built, device // 10, device % 10) == runs


ISA_SCRIPT = """
import pytest, sys
files = ["tests/ops/test_accuracy.py", "tests/ops/test_regimes.py"]
which = "not reference and (losses or nan or zero or layouts or definition or boundaries)"
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *files, "-k", which]))
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512bf16"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("ICSD_CPU_ISA", isa)
    run = subprocess.run([sys.executable, "-c", ISA_SCRIPT], capture_output=True, text=True, check=False)
    if "this processor runs" in run.stdout + run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, run.stdout[-3000:]


def test_unknown_instruction_set_is_an_error():
    code = "import torch, icsd; icsd.cross_sample_similarity(torch.ones(2, 2))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"ICSD_CPU_ISA": "sse9", "PATH": ""},
    )
    assert run.returncode
    assert "ICSD_CPU_ISA is 'sse9'; this processor runs" in run.stderr


@pytest.mark.parametrize("lines", ["", "INTERFACE = 0"])
def test_native_module_of_other_sources_is_not_used(lines):
    script = f"""
import sys, types
module = types.ModuleType("icsd._native")
exec({lines!r}, module.__dict__)
sys.modules["icsd._native"] = module
import icsd
print(next(status for status in icsd.backends() if status.name == "cpu").reason)
import torch
print(icsd.ops.registry.select(None, [torch.ones(2, 2)]).name)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "is not built from these sources" in run.stdout
    assert run.stdout.endswith("\ncomposite\n")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_numbers_in_tensors_are_read_in_each_call(backend):
    x, y = torch.randn(5, 3), torch.randn(5, 4)
    weight = torch.tensor(2.0)
    values = []
    for _ in range(2):
        values.append(icsd.interstage_distillation_loss([x, y], KL(torch.tensor(0.2)), weights=[weight]))
        weight += 1
    expected = icsd.similarity_distillation_loss(x, y, KL(0.2), backend=backend)
    torch.testing.assert_close(values, [2 * expected, 3 * expected])


class Absolute(MSE):
    def of_elements(self, similarity, target):
        return (similarity - target).abs()

    def forward(self, similarity, target):
        return self.of_elements(similarity, target).mean((-2, -1))


@pytest.mark.parametrize("bank", [None, 20_000])
def test_a_derived_loss_has_its_own_mathematics(bank):
    x = torch.randn(5, 3).requires_grad_()
    y = torch.randn(5, 3)
    banks = {} if bank is None else {f"{side}_bank": torch.randn(bank, 3) for side in ("student", "teacher")}
    found = []
    for backend in ("cpu", "reference"):
        value = icsd.similarity_distillation_loss(x, y, Absolute(), backend=backend, **banks)
        found.append((value, *torch.autograd.grad(value, x)))
    torch.testing.assert_close(*found)
    similarities = [
        icsd.cross_sample_similarity(z, banks.get(f"{k}_bank")) for z, k in ((x, "student"), (y, "teacher"))
    ]
    torch.testing.assert_close(found[0][0], (similarities[0] - similarities[1]).abs().mean())

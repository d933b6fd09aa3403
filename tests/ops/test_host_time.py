"""The work of the host in a training step, counted in calls: unlike times, counts are the same on every machine."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import icsd
from icsd.ops import tuning

PACKAGE = str(Path(icsd.__file__).parent)


def calls_of(step) -> Counter:
    """Count what icsd calls in a step: its own functions, C functions that these call, and native kernels.

    Comprehensions are left out, because they are calls in some versions of Python only, and so is `Function.apply`, a C
    function from PyTorch 2.14 on.
    """
    found = Counter()

    def count(frame, event, function):
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name.startswith("<"):
            return
        if event == "call":
            found["Python"] += 1
        elif event == "c_call" and (name := getattr(function, "__name__", "")) != "apply":
            found["C"] += 1
            found["kernels"] += name in ("gram", "combine", "distill", "distill_backward")

    step()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def pair():
    student, teacher = torch.randn(16, 64, requires_grad=True), torch.randn(16, 64)
    return lambda: icsd.similarity_distillation_loss(student, teacher).backward()


def stages():
    tensors = [torch.randn(16, dim, requires_grad=True) for dim in (30, 64, 100)]
    return lambda: icsd.interstage_distillation_loss(tensors, "kl").backward()


@pytest.mark.parametrize(("step", "python", "c"), [(pair, 16, 15), (stages, 17, 23)])
def test_calls_of_a_step(step, python, c, monkeypatch):
    monkeypatch.setattr(tuning, "idle", True)
    found = calls_of(step())
    assert found["kernels"] == 2  # one for each pass, for all stages
    assert found["Python"] <= python
    assert found["C"] <= c

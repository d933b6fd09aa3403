"""Derivatives on the CPU, which of them are computed, and the choice of a backend by compiled functions."""

import threading

import pytest
import torch
from conformance.autograd import *  # noqa: F403
from conformance.autograd import stages_of

import icsd
from icsd.ops import registry


def test_only_wanted_gradients_are_computed(monkeypatch):
    asked = []
    launcher = registry.get("cpu").launcher
    original = launcher.distill_backward

    def record(grad, saved, inputs, wanted, spec):
        asked.append(tuple(wanted))
        return original(grad, saved, inputs, wanted, spec)

    monkeypatch.setattr(launcher, "distill_backward", record)
    first, second, teacher = stages_of(4, 5, 6)
    icsd.interstage_distillation_loss([first.detach(), second, teacher], backend="cpu").backward()
    assert asked == [(False, True)]
    assert second.grad is not None
    assert teacher.grad is None


def launches(monkeypatch):
    """A list that grows with every distillation of the native module."""
    seen = []
    launcher = registry.get("cpu").launcher
    original = launcher.distill

    def record(*arguments):
        seen.append(threading.current_thread().name)
        return original(*arguments)

    monkeypatch.setattr(launcher, "distill", record)
    return seen


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_functions_follow_the_choice_of_backend(dynamic, monkeypatch):
    seen = launches(monkeypatch)
    student, teacher = stages_of(40, 30, dtype=torch.float32)
    expected = icsd.similarity_distillation_loss(student, teacher, backend="reference")
    compiled = torch.compile(lambda a, b: icsd.similarity_distillation_loss(a, b), fullgraph=True, dynamic=dynamic)

    def check(launched):
        seen.clear()
        torch.testing.assert_close(compiled(student, teacher), expected)
        assert len(seen) == launched

    check(1)
    with icsd.use_backend("reference"):
        check(0)
        thread = threading.Thread(target=compiled, args=(student, teacher), name="another")
        thread.start()
        thread.join()
        assert seen == ["another"]
    check(1)


def test_choice_of_backend_inside_a_compiled_function(monkeypatch):
    seen = launches(monkeypatch)
    student, teacher = stages_of(40, 30, dtype=torch.float32)

    @torch.compile(fullgraph=True)
    def twice(student, teacher):
        with icsd.use_backend("reference"):
            loss = icsd.similarity_distillation_loss(student, teacher)
        return loss + icsd.similarity_distillation_loss(student, teacher)

    torch.testing.assert_close(twice(student, teacher), 2 * icsd.similarity_distillation_loss(student, teacher))
    assert len(seen) == 2
    assert icsd.ops.registry.select(None, [student]).name == "cpu"

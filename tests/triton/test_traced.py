"""Check which kernels torch.compile sees of the Triton backend; test_interpreted_memory.py runs such graphs."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from traced import inputs, launched, launches, loss_of, trace, traceable

import icsd
from icsd.ops.regimes import force_regime

SHAPES = [(16, 8192), (16, 4096)]
GRAMS = ["gram_kernel", "gram_kernel", "sum_grams_kernel"]
SAMPLE_SPACE = [[*GRAMS, "rows_backward_kernel"], ["combine_kernel"] * 2]


def operators(graph):
    """Return the names of this package's operators in a graph."""
    return [node.target.name() for node in graph.graph.nodes if str(node.target).startswith("icsd.")]


def loss(*stages, backend="triton"):
    return loss_of(stages, "mse", backend)


def test_sample_space_is_transparent():
    with traceable():
        graphs = trace(loss, *inputs(SHAPES))
        assert [launched(graph) for graph in graphs] == SAMPLE_SPACE
        assert [operators(graph) for graph in graphs] == [[], []]
        # Tensors are copied where a launch writes to a view of them: the values and both saved matrices, no other ones.
        assert sum("scatter" in str(node.target) for graph in graphs for node in graph.graph.nodes) == 3


def test_statistics_need_a_pass_of_their_own():
    with traceable():
        graphs = trace(lambda *stages: loss_of(stages, "kl", "triton"), *inputs(SHAPES))
        assert launched(graphs[0]) == [*GRAMS, "rows_forward_kernel", "rows_backward_kernel"]


@pytest.mark.parametrize("regime", ["feature", "streamed"])
def test_other_regimes_are_operators(regime):
    with traceable(), force_regime(regime):
        graphs = trace(loss, *inputs(SHAPES))
    assert [launched(graph) for graph in graphs] == [[], []]
    assert [operators(graph) for graph in graphs] == [["icsd::distill"], ["icsd::distill_backward"]]


def test_other_backends_are_operators():
    graphs = trace(lambda *stages: loss(*stages, backend="cpu"), *inputs(SHAPES))
    assert [operators(graph) for graph in graphs] == [["icsd::distill"], ["icsd::distill_backward"]]


def test_similarities_are_transparent():
    with traceable():
        graphs = trace(lambda x: icsd.cross_sample_similarity(x, backend="triton").sum(), *inputs(SHAPES[:1]))
        assert [launched(graph) for graph in graphs] == [["gram_kernel", "sum_grams_kernel"], ["combine_kernel"]]


def compiling(dynamic):
    """Return a compiler for `trace` that calls torch.compile."""
    if torch.__version__ < (2, 11):
        pytest.skip("PyTorch 2.10 compiles nothing for the tensors of a FakeTensorMode of the caller")

    def compile_(function, **compilers):
        return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=aot_autograd(**compilers))

    return compile_


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_compiled_for_given_sizes(precision, monkeypatch):
    monkeypatch.setenv("ICSD_TRITON_PRECISION", precision)
    with traceable():
        graphs = trace(loss, *inputs(SHAPES), compiling=compiling(dynamic=False))
        assert [launched(graph) for graph in graphs] == SAMPLE_SPACE
        assert {node.kwargs["kwargs"].get("PRECISION", precision) for node in launches(graphs[0])} == {precision}


def test_compiled_for_any_sizes():
    with traceable():
        graphs = trace(loss, *inputs(SHAPES), compiling=compiling(dynamic=True))
    assert [launched(graph) for graph in graphs] == [[], []]
    assert [operators(graph) for graph in graphs] == [["icsd::distill"], ["icsd::distill_backward"]]


def test_exported_programs_keep_the_operator():
    class Loss(torch.nn.Module):
        def forward(self, *stages):
            return loss(*stages)

    with traceable():
        program = torch.export.export(Loss(), tuple(x.detach() for x in inputs(SHAPES))).run_decompositions()
    assert operators(program) == ["icsd::distill"]
    assert launched(program) == []


def test_compiled_code_follows_the_settings(monkeypatch):
    # Compiled code is cached by the key of the operator, which holds the settings.
    keys = []

    def backend(graph, _):
        keys.extend(node.args[-1] for node in graph.graph.nodes if str(node.target).startswith("icsd."))
        return graph.forward

    compiled = torch.compile(loss, backend=backend)
    with traceable(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        stages = [mode.from_tensor(x) for x in inputs(SHAPES)]
        for precision in ("ieee", "tf32", "ieee"):
            monkeypatch.setenv("ICSD_TRITON_PRECISION", precision)
            compiled(*stages)
    assert len(keys) == len(set(keys)) == 2

"""Hostile calls of the native module, drawn by hypothesis; a crash ends the process.

`python fuzz_native.py EXAMPLES SEED` prints for each function how many calls were refused and how many went through.

Every tensor is a view of one arena, of whatever sizes, strides and element type fit it. Whatever is drawn, the module
must refuse with an error or return results that can be read, and leave the arena as it is.
"""

import sys
from collections import Counter

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

from icsd import _native

ARENA = 1 << 14
HUGE = 2**60  # refused, or more than there is memory

PATTERN = torch.rand(ARENA // 4, generator=torch.Generator().manual_seed(0)).view(torch.uint8)
memory = PATTERN.clone()
tally = Counter()


def mostly(usual, *hostile):
    """Nearly always something usual."""
    return st.integers(0, 29).flatmap(lambda n: usual if n else st.sampled_from(hostile))


no_tensors = st.sampled_from([
    None, 5, "x", (), np.ones((3, 4), np.float32), torch.ones(3, 4, device="meta"), torch.ones(3, 4).to_sparse()
])  # fmt: skip
dtypes = mostly(
    st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    torch.int32,
    torch.complex64,
    torch.bool,
    torch.float8_e4m3fn,
)
sizes = mostly(st.integers(0, 5), HUGE)
numbers = mostly(st.floats(0.01, 2), 0.0, -1.0, float("nan"), float("inf"), "x", None)


@st.composite
def tensors(draw, *shape):
    """Return a tensor in the arena, mostly a dense one."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, 0 if size == HUGE else step)
        step *= max(1, size % HUGE)
    if shape and not draw(st.integers(0, 9)):
        strides[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 12))
    try:
        return torch.as_strided(memory.view(draw(dtypes)), shape, strides, draw(st.integers(0, 40)))
    except RuntimeError:
        assume(False)  # it does not fit


@st.composite
def features(draw, *leading):
    """(*leading, D), or something else."""
    shape = draw(mostly(sizes.map(lambda width: (*leading, width)), (), leading[:1], (3, 4, 5)))
    return draw(st.integers(0, 29).flatmap(lambda n: tensors(*shape) if n else no_tensors))


batches = st.tuples(st.lists(sizes, max_size=2), sizes).map(lambda pair: (*pair[0], pair[1]))


@st.composite
def distillations(draw):
    """Inputs, then the arguments of a specification."""
    batch = draw(batches)
    inputs = draw(mostly(st.lists(features(*batch), min_size=2, max_size=3), [], None, 5))
    students = max(0, len(inputs) - 1) if isinstance(inputs, list) else 0
    weights = draw(mostly(st.lists(numbers, min_size=students, max_size=students), [1.0] * 9))
    regime = draw(mostly(st.sampled_from(["sample", "streamed", "feature"]), "dense", "", None, 0))
    center = draw(st.booleans()) if regime == "sample" else draw(mostly(st.just(False), True))
    names = sorted(_native.LOSSES) if regime != "feature" else ["mse", "mse", "kl"]
    loss = draw(mostly(st.sampled_from(names), "l2", "", "\0", None, 0))
    count = _native.LOSSES.get(loss, 1)
    parameters = draw(mostly(st.lists(numbers, min_size=count, max_size=count), [], [1.0] * 5, None))
    return inputs, (
        loss,
        parameters,
        weights,
        draw(numbers),
        draw(st.booleans()),
        regime,
        center,
    )


def call(function, *arguments):
    """Return the result of the call after reading it once, or None if the call was refused."""
    try:
        results = function(*arguments)
    except (ValueError, TypeError, MemoryError, RuntimeError):
        results = None
    assert torch.equal(memory, PATTERN), "a call wrote into what it was given"
    tally["made" if results is not None else "refused"] += 1
    for result in results if isinstance(results, (tuple, list)) else [results]:
        if result is not None:
            result.clone()
    return results


@given(batches.flatmap(lambda batch: features(*batch)))
def gram(x):
    call(_native.cpu.gram, x)


@given(st.data())
def combine(data):
    *groups, samples = data.draw(batches)
    matrix = data.draw(mostly(tensors(*groups, data.draw(sizes), samples), None, torch.ones(3)))
    call(_native.cpu.combine, matrix, data.draw(features(*groups, samples)))


def call_with_spec(function, arguments, spec, *others):
    """Does the same for a call that takes a specification, which may be refused first."""
    return call(lambda: function(*arguments, _native.Spec(*spec), *others))


@given(distillation=distillations(), save=st.booleans())
def distill(distillation, save):
    inputs, spec = distillation
    call_with_spec(_native.cpu.distill, [inputs], spec, save)


@given(st.data())
def distill_backward(data):
    inputs, spec = data.draw(distillations())
    grad = saved = None
    results = call_with_spec(_native.cpu.distill, [inputs], spec, True)
    if results is not None:
        grad, saved = results
        *_, teacher_gradient, regime = spec
        if regime == "sample" and not teacher_gradient:
            inputs = inputs[:-1]
    grad = data.draw(mostly(st.just(grad), None, 1.0, torch.ones(7), torch.ones(1)))
    saved = data.draw(mostly(st.just(saved), None, torch.ones(7), torch.empty(0), torch.ones(40).double()))
    inputs = data.draw(mostly(st.just(inputs), [], None, [torch.ones(4, 5)]))
    count = len(inputs) if isinstance(inputs, list) else 1
    wanted = data.draw(mostly(st.lists(st.booleans(), min_size=count, max_size=count), [], [True] * 9, None, [2]))
    call_with_spec(_native.cpu.distill_backward, [grad, saved, inputs, wanted], spec)


def main(examples: int, number: int) -> None:
    torch.set_num_threads(1)
    checks = list(HealthCheck)
    how = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=checks, phases=[Phase.generate]
    )
    for fuzz in (gram, combine, distill, distill_backward):
        tally.clear()
        seed(number)(how(fuzz))()
        print(fuzz.__name__, tally["refused"], tally["made"], flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

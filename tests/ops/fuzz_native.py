"""Hostile calls of the native module, drawn by hypothesis; a crash ends the process.

`python fuzz_native.py EXAMPLES SEED` prints for each function how many calls were refused and how many went through.

An address that points nowhere cannot be told from one that does, so every drawn address is null or lies in an arena,
and a call whose sizes lead out of it without being refusable is not made. Whatever is drawn, the module must refuse
with a ValueError or TypeError, or write its result and nothing else.
"""

import sys
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

from icsd import _native

ARENA = 1 << 14
MOST = 2**63 - 1
SIZES = (4, 8, 2, 2)  # bytes of an element, by dtype code
PARAMETERS = (0, 3, 1, 0, 3, 0, 0)  # of each divergence, by its code

memory = torch.zeros(2 * ARENA, dtype=torch.uint8)
READ, WRITE = memory.data_ptr(), memory.data_ptr() + ARENA


def mostly(usual, *hostile):
    """Nearly always something usual."""
    return st.integers(0, 29).flatmap(lambda n: usual if n else st.sampled_from(hostile))


counts = mostly(st.integers(0, 5), -1, -(2**63), 2**31, 2**32, 2**62, MOST, 2**64, -(2**64), 1.5, None, "3")
strides = mostly(st.integers(0, 12), -1, 2**61, 2**62, MOST, 2**64, None)
dtypes = mostly(st.integers(0, 3), -1, 4, 2**31 - 1, 2**40, None)
numbers = mostly(st.floats(0.01, 2), 0.0, -1.0, float("nan"), float("inf"), "x", None)


def addresses(start):
    offsets = mostly(st.integers(0, 40).map(lambda n: 8 * n), 1, 2, 3, 4, ARENA - 8, -start, None)
    return offsets.map(lambda offset: None if offset is None else start + offset)


def features(start):
    usual = st.tuples(addresses(start), dtypes, counts, strides, strides)
    return mostly(usual, (), (start,), None, "features", (0, 0, 0, 0, 0))


def results_of(features_):
    """Where a result for such features may be written; mostly it fits them."""
    if not isinstance(features_, tuple) or len(features_) < 5:
        return features(WRITE)
    _, dtype, width, group_stride, _ = features_
    fitting = st.tuples(
        addresses(WRITE), st.just(dtype), st.just(width), st.sampled_from([group_stride, 60]), st.just(12)
    )
    return st.integers(0, 9).flatmap(lambda n: fitting if n else st.one_of(features(WRITE), features(READ)))


@st.composite
def stages_and_results(draw):
    stages = draw(st.lists(features(READ), min_size=1, max_size=3))
    outs = [draw(results_of(stage)) for stage in stages]
    return stages, draw(mostly(st.just(outs), outs[1:], [*outs, *outs], None))


@st.composite
def distillations(draw):
    """Stages, weights, a divergence and its parameters."""
    stages = draw(mostly(st.lists(features(READ), min_size=1, max_size=3), [], None))
    students = max(0, len(stages or ()) - 1)
    weights = draw(mostly(st.lists(numbers, min_size=students, max_size=students), [1.0] * 9))
    divergence = draw(mostly(st.integers(0, 6), -1, 7, 99, 2**40, None))
    count = PARAMETERS[divergence] if divergence in range(7) else 1
    parameters = draw(mostly(st.lists(numbers, min_size=count, max_size=count), [], [1.0] * 5, None))
    return stages, weights, divergence, parameters


def end_of(features, groups, samples):
    """Where the memory behind a features tuple ends, if all its numbers are usable."""
    try:
        address, dtype, width, group_stride, sample_stride = features
        numbers = (width, group_stride, sample_stride, groups, samples)
        if not address or min(numbers) < 0 or not 0 <= dtype < 4:
            return 0
        if not (width and groups and samples):
            return address
        elements = (groups - 1) * group_stride + (samples - 1) * sample_stride + width
        return 0 if elements * SIZES[dtype] > MOST else address + elements * SIZES[dtype]
    except (TypeError, ValueError):
        return 0


def inside(start, end):
    """Passes over a call that reads or writes past the arena at `start`: no check could refuse it."""
    assume(end <= start + ARENA)


def matrices(address, *sizes):
    """Where a matrix of doubles of such sizes at most ends."""
    try:
        elements = 8
        for size in sizes:
            elements *= max(0, size)
        return 0 if not address or elements > MOST else address + elements
    except TypeError:
        return 0


def most_saved(address, stages, groups, samples):
    """Where what a distillation saves ends, in any regime."""
    try:
        widest = max([0, *(width for _, _, width, _, _ in stages or [])])
        numbers = max(3 * samples * (samples + 1), samples * (3 + 2 * 5), 5 * widest * widest)
    except (TypeError, ValueError):
        return 0
    return matrices(address, groups, numbers)


def call(function, *arguments, read_only=True):
    """Makes the call; what is in the arena of inputs stays as it is, unless a result was drawn there."""
    memory.copy_(PATTERN)
    try:
        function(*arguments)
    except (ValueError, TypeError, MemoryError):
        assert torch.equal(memory, PATTERN), "a refused call wrote something"
        tally["refused"] += 1
        return
    tally["made"] += 1
    if read_only:
        assert torch.equal(memory[:ARENA], PATTERN[:ARENA]), "a call wrote into its inputs"


tally = Counter()
PATTERN = torch.rand(2 * ARENA // 4, generator=torch.Generator().manual_seed(0)).view(torch.uint8)


@given(x=features(READ), groups=counts, samples=counts, out=addresses(WRITE))
def gram(x, groups, samples, out):
    inside(READ, end_of(x, groups, samples))
    inside(WRITE, matrices(out, groups, samples, samples))
    call(_native.gram, x, groups, samples, out)


@given(matrix=addresses(READ), outputs=counts, pair=stages_and_results(), groups=counts, samples=counts)
def combine(matrix, outputs, pair, groups, samples):
    (x, *_), (out, *_) = pair[0], pair[1] or [None]
    inside(READ, matrices(matrix, groups, outputs, samples))
    inside(READ, end_of(x, groups, samples))
    end = end_of(out, groups, outputs)
    inside(WRITE if end > WRITE else READ, end)
    call(_native.combine, matrix, outputs, x, groups, samples, out, read_only=end > WRITE)


@given(
    function=st.sampled_from([_native.distill, _native.distill_streamed, _native.distill_feature]),
    distillation=distillations(),
    groups=counts,
    samples=counts,
    eps=numbers,
    teacher_gradient=st.booleans(),
    loss=addresses(WRITE),
    slots=st.one_of(st.just(0), addresses(WRITE + 512)),
)
def distill(function, distillation, groups, samples, eps, teacher_gradient, loss, slots):
    stages, *how = distillation
    for stage in stages or []:
        inside(READ, end_of(stage, groups, samples))
    inside(WRITE, matrices(loss, groups))
    inside(WRITE, most_saved(slots, stages, groups, samples))
    call(function, stages, groups, samples, *how, eps, teacher_gradient, loss, slots)


@given(
    grad=addresses(READ),
    slots=addresses(READ),
    pair=stages_and_results(),
    wide=st.booleans(),
    groups=counts,
    samples=counts,
)
def distill_backward(grad, slots, pair, wide, groups, samples):
    stages, outs = pair
    inside(READ, matrices(grad, groups))
    inside(READ, most_saved(slots, stages, groups, samples))
    for stage in stages:
        inside(READ, end_of(stage, groups, samples))
    ends = [end_of(out, groups, samples) for out in outs or []]
    for end in ends:
        inside(WRITE if end > WRITE else READ, end)
    read_only = all(end > WRITE or not end for end in ends)
    call(_native.distill_backward, grad, slots, stages, outs, wide, groups, samples, read_only=read_only)


@given(
    function=st.sampled_from([_native.distill_streamed_backward, _native.distill_feature_backward]),
    grad=addresses(READ),
    saved=addresses(READ),
    distillation=distillations(),
    data=st.data(),
    groups=counts,
    samples=counts,
    eps=numbers,
    teacher_gradient=st.booleans(),
)
def distill_many_backward(function, grad, saved, distillation, data, groups, samples, eps, teacher_gradient):
    stages, *how = distillation
    outs = [data.draw(results_of(stage)) for stage in stages or []]
    inside(READ, matrices(grad, groups))
    inside(READ, most_saved(saved, stages, groups, samples))
    for stage in stages or []:
        inside(READ, end_of(stage, groups, samples))
    ends = [end_of(out, groups, samples) for out in outs]
    for end in ends:
        inside(WRITE if end > WRITE else READ, end)
    read_only = all(end > WRITE or not end for end in ends)
    arguments = (stages, outs, groups, samples, *how, eps, teacher_gradient)
    call(function, grad, saved, *arguments, read_only=read_only)


def main(examples: int, number: int) -> None:
    torch.set_num_threads(1)
    checks = list(HealthCheck)
    how = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=checks, phases=[Phase.generate]
    )
    for fuzz in (gram, combine, distill, distill_backward, distill_many_backward):
        tally.clear()
        seed(number)(how(fuzz))()
        print(fuzz.__name__, tally["refused"], tally["made"], flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""The reference against an independent transcription of the formulas, one element at a time, and the laws it obeys."""

import math

import pytest
import torch

import icsd
from icsd.losses import make_loss


def cosine(x, i, j):
    dot = sum(a * b for a, b in zip(x[i], x[j], strict=True))
    norms = [max(math.sqrt(sum(a * a for a in x[k])), 1e-8) for k in (i, j)]
    return dot / (norms[0] * norms[1])


def similarities(x):
    rows = x.tolist()
    return [[cosine(rows, i, j) for j in range(len(rows))] for i in range(len(rows))]


def mean_squared(s, t, **_):
    n = len(s)
    return sum((s[i][j] - t[i][j]) ** 2 for i in range(n) for j in range(n)) / n**2


def huber(s, t, beta=1.0):
    n = len(s)

    def h(x):
        return x * x / (2 * beta) if abs(x) < beta else abs(x) - beta / 2

    return sum(h(s[i][j] - t[i][j]) for i in range(n) for j in range(n)) / n**2


def kullback_leibler(s, t, student_temperature=0.1, teacher_temperature=0.1, include_diagonal=True):
    n = len(s)
    total = 0.0
    for i in range(n):
        others = [j for j in range(n) if include_diagonal or j != i]
        p = [math.exp(s[i][j] / student_temperature) for j in others]
        q = [math.exp(t[i][j] / teacher_temperature) for j in others]
        total += sum(b / sum(q) * math.log((b / sum(q)) / (a / sum(p))) for a, b in zip(p, q, strict=True))
    return total / n


CASES = [
    ("mse", mean_squared, {}),
    ("smooth_l1", huber, {}),
    ("smooth_l1", huber, {"beta": 0.05}),
    ("kl", kullback_leibler, {}),
    ("kl", kullback_leibler, {"student_temperature": 0.3, "teacher_temperature": 0.07}),
    ("kl", kullback_leibler, {"include_diagonal": False}),
]


@pytest.mark.parametrize(("name", "definition", "parameters"), CASES)
def test_definition(name, definition, parameters, backend):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 9, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    expected = definition(similarities(student), similarities(teacher), **parameters)
    loss = make_loss(name, **parameters)
    value = icsd.similarity_distillation_loss(student, teacher, loss, backend=backend)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    terms = 6 if name == "kl" else 36
    total = icsd.similarity_distillation_loss(student, teacher, loss, backend=backend, reduction="sum")
    assert total.item() == pytest.approx(terms * expected, rel=1e-12)


@pytest.mark.parametrize("teacher", [-1, 0, 1])
def test_interstage_is_the_weighted_sum_of_pairs(teacher, backend):
    torch.manual_seed(1)
    stages = [torch.randn(5, d, dtype=torch.float64, requires_grad=True) for d in (4, 300, 77)]
    weights = [0.5, 2.0]
    loss = icsd.interstage_distillation_loss(stages, "kl", weights=weights, teacher=teacher, backend=backend)
    students = [stage for i, stage in enumerate(stages) if i != teacher % 3]
    expected = sum(
        weight * icsd.similarity_distillation_loss(student, stages[teacher], "kl", backend="reference")
        for weight, student in zip(weights, students, strict=True)
    )
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, stages, allow_unused=True)
    assert gradients[teacher] is None
    for got, want in zip(gradients, torch.autograd.grad(expected, stages, allow_unused=True), strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("loss", ["mse", "kl", "smooth_l1"])
def test_laws(loss, backend):
    torch.manual_seed(2)
    x, y = torch.randn(12, 40, dtype=torch.float64), torch.randn(12, 30, dtype=torch.float64)

    def value(student, teacher):
        return icsd.similarity_distillation_loss(student, teacher, loss, backend=backend)

    similarity = icsd.cross_sample_similarity(x, backend=backend)
    torch.testing.assert_close(similarity, similarity.mT, rtol=0, atol=0)
    torch.testing.assert_close(similarity.diagonal(), torch.ones(12, dtype=torch.float64))
    assert value(x, x).abs() < 1e-14
    order = torch.randperm(12)
    torch.testing.assert_close(value(x[order], y[order]), value(x, y))
    scales = torch.rand(12, 1, dtype=torch.float64) * 100 + 0.01
    torch.testing.assert_close(value(x * scales, y), value(x, y))
    torch.testing.assert_close(value(x[:, torch.randperm(40)], y), value(x, y))
    assert value(x, y) > 0

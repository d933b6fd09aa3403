"""Similarities of a batch to another one, and the losses of a student's to its bank from a teacher's to its own."""

import math

import pytest
import torch
from torch.func import grad, vmap
from torch.nn import functional as F

import icsd
from icsd import cross_sample_similarity, similarity_distillation_loss
from icsd.losses import KL, PKT, SmoothL1

CASES = [
    "mse",
    SmoothL1(0.2),
    KL(0.3, 0.2),
    "pkt",
    PKT(mode="code"),
    "dist",
    lambda s, t: ((s - t) ** 4).sum((-2, -1)),
]


def features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(*batch, n=4, m=6, student=5, teacher=3, dtype=torch.float64):
    shapes = [(n, student), (n, teacher), (m, student), (m, teacher)]
    return [features(*batch, *shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def loss_of(student, teacher, student_bank, teacher_bank, loss="mse", **options):
    return similarity_distillation_loss(
        student, teacher, loss, student_bank=student_bank, teacher_bank=teacher_bank, **options
    )


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_similarity_to_another_batch(batch, backend):
    x, y = features(*batch, 4, 7), features(*batch, 6, 7, seed=1)
    similarity = cross_sample_similarity(x, y, backend=backend)
    torch.testing.assert_close(similarity, F.cosine_similarity(x.unsqueeze(-2), y.unsqueeze(-3), dim=-1))
    torch.testing.assert_close(similarity, cross_sample_similarity(y, x, backend=backend).mT)
    torch.testing.assert_close(cross_sample_similarity(x, x), cross_sample_similarity(x, backend=backend))


def test_zero_and_bad_samples_of_another_batch(backend):
    x, y = features(4, 7).requires_grad_(), features(6, 7, seed=1)
    with torch.no_grad():
        x[1] = 0
    y[2], y[3, 0] = 0, math.nan
    similarity = cross_sample_similarity(x, y, backend=backend)
    assert (similarity[1, [0, 1, 2, 4, 5]] == 0).all()
    assert (similarity[:, 2] == 0).all()
    assert similarity[:, 3].isnan().all()
    assert similarity[:, [0, 1, 2, 4, 5]].isfinite().all()
    (gradient,) = torch.autograd.grad(cross_sample_similarity(x, y[:3], backend=backend).sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize(
    ("dtypes", "result"),
    [
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float16), torch.float32),
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_mixed_dtypes(dtypes, result, backend):
    x, y = features(4, 300, dtype=dtypes[0]).requires_grad_(), features(6, 300, seed=1, dtype=dtypes[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        similarity = cross_sample_similarity(x, y, backend=backend)
    assert similarity.dtype == result
    torch.testing.assert_close(
        similarity.double(), cross_sample_similarity(x.double(), y.double(), backend="reference"), rtol=1e-5, atol=1e-6
    )
    (gradient,) = torch.autograd.grad(similarity.sum(), x)
    assert gradient.dtype == x.dtype


def row_softmax_kl(s, t, student_temperature, teacher_temperature):
    total = 0.0
    for i in range(len(s)):
        p = [math.exp(value / student_temperature) for value in s[i].tolist()]
        q = [math.exp(value / teacher_temperature) for value in t[i].tolist()]
        total += sum(b / sum(q) * math.log((b / sum(q)) / (a / sum(p))) for a, b in zip(p, q, strict=True))
    return total / len(s)


def pkt(s, t):
    p, q = ((matrix + 1) / (matrix + 1).sum(1, keepdim=True) for matrix in (s, t))
    return sum(q[i, j] * math.log(q[i, j] / p[i, j]) for i in range(len(s)) for j in range(s.shape[1])) / len(s)


def dist(s, t):
    return sum(1 - torch.corrcoef(torch.stack([s[i], t[i]]))[0, 1] for i in range(len(s))) / len(s)


@pytest.mark.parametrize("m", [6, 4])  # as many as there are samples, which are still others
@pytest.mark.parametrize(
    ("loss", "definition", "terms"),
    [
        ("mse", lambda s, t: (s - t).square().mean(), lambda n, m: n * m),
        (SmoothL1(0.2), lambda s, t: F.smooth_l1_loss(s, t, beta=0.2), lambda n, m: n * m),
        (KL(0.3, 0.2), lambda s, t: row_softmax_kl(s, t, 0.3, 0.2), lambda n, m: n),
        ("pkt", pkt, lambda n, m: n),
        ("dist", dist, lambda n, m: n),
    ],
)
def test_definitions(loss, definition, terms, m, backend):
    tensors = inputs(m=m)
    student, teacher, student_bank, teacher_bank = tensors
    s = F.cosine_similarity(student[:, None], student_bank[None], dim=-1)
    t = F.cosine_similarity(teacher[:, None], teacher_bank[None], dim=-1)
    expected = float(definition(s, t))
    assert loss_of(*tensors, loss, backend=backend).item() == pytest.approx(expected, rel=1e-9)
    total = loss_of(*tensors, loss, reduction="sum", backend=backend)
    assert total.item() == pytest.approx(terms(4, m) * expected, rel=1e-9)


def test_pkt_code_mode_averages_over_all_pairs():
    tensors = inputs()
    assert loss_of(*tensors, PKT(mode="code")) == pytest.approx(loss_of(*tensors, "pkt").item() / 6, rel=1e-4)


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("loss", CASES)
def test_gradients_reach_all_that_want_one(loss, batch, backend):
    tensors = [tensor.requires_grad_() for tensor in inputs(*batch)]

    def value(*tensors):
        options = {"detach_teacher": False, "reduction": "none", "backend": backend}
        return loss_of(*tensors, loss, **options)

    assert torch.autograd.gradcheck(value, tensors)
    assert torch.autograd.gradgradcheck(value, tensors)


def test_teacher_and_its_bank_are_constant_by_default():
    tensors = [tensor.requires_grad_() for tensor in inputs()]
    gradients = torch.autograd.grad(loss_of(*tensors), tensors, allow_unused=True)
    assert [gradient is not None for gradient in gradients] == [True, False, True, False]


def test_groups_are_independent(backend):
    tensors = inputs(3)
    losses = loss_of(*tensors, "kl", reduction="none", backend=backend)
    alone = [loss_of(*(tensor[i] for tensor in tensors), "kl", backend=backend) for i in range(3)]
    torch.testing.assert_close(losses, torch.stack(alone))
    torch.testing.assert_close(loss_of(*tensors, "kl", backend=backend), losses.mean())


def test_one_bank_for_all_by_vmap():
    student, teacher, student_bank, teacher_bank = inputs(3)
    dims = (0, 0, None, None)
    mapped = vmap(grad(loss_of), dims)(student, teacher, student_bank[0], teacher_bank[0])
    for i in range(3):
        torch.testing.assert_close(mapped[i], grad(loss_of)(student[i], teacher[i], student_bank[0], teacher_bank[0]))


def test_compiled():
    compiled = torch.compile(lambda *tensors: loss_of(*tensors, "kl"), fullgraph=True, backend="aot_eager")
    for m in (6, 9):
        torch.testing.assert_close(compiled(*inputs(m=m)), loss_of(*inputs(m=m), "kl"))


def test_empty_batches(backend):
    assert loss_of(*inputs(n=0, m=3), backend=backend) == 0
    assert loss_of(*inputs(n=0, m=3), "kl", backend=backend) == 0


def test_module():
    tensors = inputs()
    torch.testing.assert_close(icsd.SimilarityDistillationLoss("kl")(*tensors), loss_of(*tensors, "kl"))


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("teacher_bank must be given too", lambda s, t, a, b: loss_of(s, t, a, None)),
        ("student_bank must be given too", lambda s, t, a, b: loss_of(s, t, None, b)),
        (r"student_bank and student must agree.*\(6, 3\) and \(4, 5\)", lambda s, t, a, b: loss_of(s, t, b, b)),
        (
            r"student_bank and teacher_bank must agree.*\(6, 5\) and \(5, 3\)",
            lambda s, t, a, b: loss_of(s, t, a, b[:5]),
        ),
        (r"are empty, got \(0, 5\) and \(0, 3\): enqueue", lambda s, t, a, b: loss_of(s, t, a[:0], b[:0])),
        ("student and teacher must agree", lambda s, t, a, b: loss_of(s[:3], t, a, b)),
        ("'rkd_angle' compares the samples of one batch", lambda s, t, a, b: loss_of(s, t, a, b, "rkd_angle")),
        ("'cka' compares the samples of one batch", lambda s, t, a, b: loss_of(s, t, a, b, "cka")),
        ("include_diagonal must be True", lambda s, t, a, b: loss_of(s, t, a, b, KL(include_diagonal=False))),
        ("reduction must be", lambda s, t, a, b: loss_of(s, t, a, b, reduction="max")),
        ("eps must be", lambda s, t, a, b: loss_of(s, t, a, b, eps=-1)),
        ("other and x must agree", lambda s, t, a, b: cross_sample_similarity(s, b)),
        ("is on meta", lambda s, t, a, b: cross_sample_similarity(s, a.to("meta"))),
        ("'tpu' is unknown", lambda s, t, a, b: loss_of(s, t, a, b, backend="tpu")),
    ],
)
def test_bad_input(match, call):
    with pytest.raises(ValueError, match=match):
        call(*inputs())


def test_each_side_is_centered_by_its_own_mean(backend):
    sides = inputs(2, n=4, m=6)
    sides[3] += 10
    centered = [side - side.mean(-2, keepdim=True) for side in sides]
    loss = loss_of(*sides, "kl", center=True, backend=backend)
    torch.testing.assert_close(loss, loss_of(*centered, "kl", backend=backend))
    assert not torch.isclose(loss, loss_of(*sides, "kl", backend=backend))


@pytest.mark.parametrize("m", [6, 20_000], ids=["in memory", "streamed"])
def test_zero_samples_have_second_derivatives(m):
    tensors = [x.requires_grad_() for x in inputs(m=m)]
    with torch.no_grad():
        tensors[0][1] = 0
    (gradient,) = torch.autograd.grad(loss_of(*tensors, KL(0.3, 0.2)), tensors[0], create_graph=True)
    for second in torch.autograd.grad(gradient.square().sum(), tensors, materialize_grads=True):
        assert second.isfinite().all()
    assert (gradient[1] == 0).all()

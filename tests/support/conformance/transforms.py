"""The transforms of torch.func, of any order, over any dimension, compiled, without loops; dual numbers."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import icsd
from icsd.ops import registry
from icsd.ops.banks import PIECE

LOSSES = ["mse", "kl", "smooth_l1", "sp", "cc", "pkt", "cka", "dist", "rkd_distance", "rkd_angle"]


def features(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = features(3, 5, 7), features(3, 5, 4, seed=1)


def loss_of(loss, backend):
    return lambda student, teacher: icsd.similarity_distillation_loss(student, teacher, loss, backend=backend)


@pytest.fixture
def launches(fused_backend, monkeypatch):
    """Record the names of the launches, one for each call."""
    seen = []
    launcher = registry.get(fused_backend).launcher
    for name in ("gram", "combine"):
        original = getattr(launcher, name)

        def record(*arguments, name=name, original=original):
            seen.append(name)
            return original(*arguments)

        monkeypatch.setattr(launcher, name, record)
    return seen


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 2), (0, None), (None, -1)], ids=str)
def test_vmap_is_one_launch_for_each_stage(loss, in_dims, launches, fused_backend):
    value = loss_of(loss, fused_backend)
    moved = [
        features[0] if dim is None else features.movedim(0, dim)
        for features, dim in zip((STUDENT, TEACHER), in_dims, strict=True)
    ]
    expected = torch.stack(
        [value(STUDENT[i * (in_dims[0] is not None)], TEACHER[i * (in_dims[1] is not None)]) for i in range(3)]
    )
    launches.clear()
    torch.testing.assert_close(vmap(value, in_dims=in_dims)(*moved), expected)
    assert launches == ["gram"] * 2


@pytest.mark.parametrize("loss", LOSSES)
def test_vmapped_gradients(loss, launches, fused_backend):
    gradients = vmap(grad(loss_of(loss, fused_backend)))(STUDENT, TEACHER)
    assert launches == ["gram"] * 2 + ["combine"]
    for i in range(3):
        student = STUDENT[i].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss_of(loss, fused_backend)(student, TEACHER[i]), student)
        torch.testing.assert_close(gradients[i], expected)


@pytest.mark.parametrize("loss", ["mse", "kl", "dist", "cka"])
def test_higher_derivatives_and_both_modes(loss, fused_backend):
    ours, reference = (loss_of(loss, backend) for backend in (fused_backend, "reference"))
    student, teacher = STUDENT[0, :, :3], TEACHER[0]
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: grad(lambda x, y: grad(f)(x, y).square().sum())):
        torch.testing.assert_close(transform(ours)(student, teacher), transform(reference)(student, teacher))
    tangent = features(*student.shape, seed=2)
    value, slope = jvp(lambda x: ours(x, teacher), (student,), (tangent,))
    torch.testing.assert_close(value, ours(student, teacher))
    torch.testing.assert_close(slope, (grad(ours)(student, teacher) * tangent).sum())


def test_similarities():
    similarity = vmap(icsd.cross_sample_similarity, in_dims=1)(STUDENT.movedim(0, 1))
    torch.testing.assert_close(similarity, icsd.cross_sample_similarity(STUDENT))
    _, pullback = vjp(icsd.cross_sample_similarity, STUDENT)
    weight = features(3, 5, 5, seed=3)
    x = STUDENT.clone().requires_grad_()
    (expected,) = torch.autograd.grad(icsd.cross_sample_similarity(x), x, weight)
    torch.testing.assert_close(pullback(weight)[0], expected)


def test_nested_maps_over_groups(launches, fused_backend):
    student, teacher = features(2, 3, 2, 5, 7), features(2, 3, 2, 5, 4, seed=1)
    mapped = vmap(vmap(loss_of("kl", fused_backend)))(student, teacher)
    assert launches == ["gram"] * 2
    expected = icsd.similarity_distillation_loss(student, teacher, "kl", reduction="none", backend=fused_backend).mean(
        -1
    )
    torch.testing.assert_close(mapped, expected)


def test_many_gradients_of_one_backward(fused_backend):
    student = STUDENT.clone().requires_grad_()
    losses = icsd.similarity_distillation_loss(student, TEACHER, "kl", reduction="none", backend=fused_backend)
    ones = torch.eye(3).double()
    (batched,) = torch.autograd.grad(losses, student, ones, is_grads_batched=True, retain_graph=True)
    mapped = vmap(lambda one: torch.autograd.grad(losses, student, one, retain_graph=True)[0])(ones)
    for i in range(3):
        (alone,) = torch.autograd.grad(losses[i], student, retain_graph=True)
        torch.testing.assert_close(batched[i], alone)
        torch.testing.assert_close(mapped[i], alone)


@pytest.mark.parametrize("batched", [False, True], ids=["vmap", "is_grads_batched"])
@pytest.mark.parametrize("loss", ["mse", "kl", "pkt", "cka"])
def test_second_derivatives_of_many_gradients(loss, batched, fused_backend):
    student = STUDENT.clone().requires_grad_()
    value = icsd.similarity_distillation_loss(student, TEACHER, loss, reduction="none", backend=fused_backend)
    upstream = features(2, 3, seed=2)

    def gradient(upstream, **options):
        return torch.autograd.grad(value.square(), student, upstream, create_graph=True, **options)[0]

    gradients = gradient(upstream, is_grads_batched=True) if batched else vmap(gradient)(upstream)
    expected = torch.stack([gradient(one) for one in upstream])
    torch.testing.assert_close(gradients, expected)
    weight = features(*expected.shape, seed=3)
    (second,) = torch.autograd.grad(gradients, student, weight, retain_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(expected, student, weight)[0])


@pytest.mark.parametrize("loss", ["mse", "cka"])
def test_vectorized_hessian(loss, fused_backend):
    hessians = [
        torch.autograd.functional.hessian(
            lambda x, backend=backend: loss_of(loss, backend)(x, TEACHER[0]), STUDENT[0], vectorize=vectorize
        )
        for backend, vectorize in ((fused_backend, True), ("reference", False))
    ]
    torch.testing.assert_close(*hessians)


@pytest.mark.parametrize("loss", ["mse", "cka"])
def test_many_float16_gradients_do_not_underflow(loss, fused_backend):
    student, teacher = (torch.randn(2, 40, 64).half() for _ in range(2))
    student.mul_(20).requires_grad_()
    value = icsd.similarity_distillation_loss(student, teacher, loss, reduction="none", backend=fused_backend)
    upstream = 2.0**16 * torch.eye(2)
    (batched,) = torch.autograd.grad(value, student, upstream, is_grads_batched=True, retain_graph=True)
    for gradient, one in zip(batched, upstream, strict=True):
        (alone,) = torch.autograd.grad(value, student, one, retain_graph=True)
        torch.testing.assert_close(gradient.float(), alone.float(), rtol=2**-9, atol=2**-9 * alone.abs().max().item())


def test_gradient_of_angles_that_are_too_many_to_hold(fused_backend, monkeypatch):
    monkeypatch.setattr("icsd.losses.relations._ANGLES", 30)
    expected = grad(loss_of("rkd_angle", "reference"))
    loss = loss_of("rkd_angle", fused_backend)
    student = STUDENT[0].clone().requires_grad_()
    (alone,) = torch.autograd.grad(loss(student, TEACHER[0]), student)
    for got in (alone, grad(loss)(STUDENT[0], TEACHER[0])):
        torch.testing.assert_close(got, expected(STUDENT[0], TEACHER[0]))


@pytest.mark.parametrize("transform", [vmap, lambda f: vmap(grad(f))], ids=["vmap", "vmap of grad"])
def test_compiled(transform, fused_backend):
    transformed = transform(loss_of("kl", fused_backend))
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(STUDENT, TEACHER), transformed(STUDENT, TEACHER))


@pytest.mark.parametrize("loss", ["mse", "cka", "rkd_distance"])
def test_recorded_by_make_fx(loss, fused_backend):
    """A recorded graph computes the loss of other inputs, too, instead of repeating the value that was recorded."""

    def value_and_gradient(student, teacher):
        student = student.detach().requires_grad_()
        value = icsd.similarity_distillation_loss(student, teacher, loss, backend=fused_backend)
        return value.detach(), torch.autograd.grad(value, student)[0]

    def similarity(student, teacher):
        return icsd.cross_sample_similarity(student, backend=fused_backend)

    first, others = ([features(6, dim, seed=seed + dim) for dim in (9, 11)] for seed in (0, 100))
    for function in (value_and_gradient, similarity):
        torch.testing.assert_close(make_fx(function)(*first)(*others), function(*others))


def test_banks_recorded_by_make_fx(fused_backend, monkeypatch):
    monkeypatch.setitem(PIECE, "cpu", 64)  # several pieces

    def value(student, bank):
        return icsd.similarity_distillation_loss(
            student, student, "kl", student_bank=bank, teacher_bank=bank.square(), backend=fused_backend
        )

    first, others = ((features(6, 9, seed=seed), features(400, 9, seed=seed + 1)) for seed in (0, 100))
    torch.testing.assert_close(make_fx(value)(*first)(*others), value(*others))


def test_functional_call_of_a_model():
    model = torch.nn.Linear(7, 6).double()
    criterion = icsd.SimilarityDistillationLoss("mse")

    def loss(parameters):
        return criterion(functional_call(model, parameters, STUDENT[0]), TEACHER[0])

    gradients = grad(loss)(dict(model.named_parameters()))
    loss(dict(model.named_parameters())).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.parametrize("transform", [vmap, lambda f: vmap(grad(f)), lambda f: vmap(jacrev(f))])
@pytest.mark.parametrize("loss", LOSSES)
def test_vmap_over_no_samples(loss, transform, fused_backend):
    mapped = transform(loss_of(loss, fused_backend))(STUDENT[:0], TEACHER[:0])
    assert mapped.shape == transform(loss_of(loss, fused_backend))(STUDENT, TEACHER)[:0].shape
    assert (
        transform(lambda student: loss_of(loss, fused_backend)(student, TEACHER[0]))(STUDENT[:0]).shape == mapped.shape
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_vmap_over_no_stages_groups_and_banks(reduction):
    student, teacher = STUDENT[:0].unsqueeze(1), TEACHER[:0].unsqueeze(1)

    def interstage(student, teacher):
        weights = {"weights": [0.5, 2.0], "reduction": reduction}
        return icsd.interstage_distillation_loss([student, student, teacher], "kl", **weights)

    def own(similarity, target):
        return (similarity - target).abs().mean((-2, -1))

    shape = (0, 1) if reduction == "none" else (0,)
    assert vmap(interstage)(student, teacher).shape == shape
    assert vmap(lambda x: icsd.similarity_distillation_loss(x, x, own))(STUDENT[:0]).shape == (0,)
    assert vmap(icsd.cross_sample_similarity)(STUDENT[:0]).shape == (0, 5, 5)

    def to_bank(x):
        return icsd.similarity_distillation_loss(
            x, x, "pkt", student_bank=STUDENT[0], teacher_bank=STUDENT[1], reduction=reduction
        )

    assert vmap(to_bank)(STUDENT[:0]).shape == (0,)


def tangents_of(function, *inputs):
    """Return the value and the tangent by `forward_ad`, where an input is a pair of a primal and its tangent."""
    with forward_ad.dual_level():
        inputs = [forward_ad.make_dual(*x) if isinstance(x, tuple) else x for x in inputs]
        return forward_ad.unpack_dual(function(*inputs))


def dual_jvp(function, primals, tangents):
    """`jvp` by `forward_ad`."""
    return tangents_of(function, *zip(primals, tangents, strict=True))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_dual_numbers_keep_their_tangents(loss, requires_grad, fused_backend):
    student, tangent = STUDENT[0].clone().requires_grad_(requires_grad), features(5, 7, seed=2)
    value, slope = tangents_of(loss_of(loss, fused_backend), (student, tangent), TEACHER[0])
    torch.testing.assert_close(value, loss_of(loss, fused_backend)(student, TEACHER[0]))
    gradient = grad(loss_of(loss, fused_backend))(student.detach(), TEACHER[0])
    torch.testing.assert_close(slope.detach(), (gradient * tangent).sum())
    assert value.requires_grad == requires_grad


def test_dual_teachers_banks_and_similarities():
    tangent, bank_tangent = features(5, 4, seed=2), features(5, 4, seed=3)

    def loss(student, teacher, student_bank, teacher_bank, **options):
        banks = {"student_bank": student_bank, "teacher_bank": teacher_bank}
        return icsd.similarity_distillation_loss(student, teacher, "kl", **banks, **options)

    inputs = (STUDENT[0], (TEACHER[0], tangent), STUDENT[1], (TEACHER[1], bank_tangent))
    assert tangents_of(loss, *inputs).tangent is None  # the teacher is a constant
    expected = jvp(
        lambda *teacher: loss(STUDENT[0], teacher[0], STUDENT[1], teacher[1], detach_teacher=False),
        (TEACHER[0], TEACHER[1]),
        (tangent, bank_tangent),
    )
    slope = tangents_of(lambda *inputs: loss(*inputs, detach_teacher=False), *inputs).tangent
    torch.testing.assert_close(slope, expected[1])
    slope = tangents_of(icsd.cross_sample_similarity, (TEACHER[0], tangent)).tangent
    torch.testing.assert_close(slope, jvp(icsd.cross_sample_similarity, (TEACHER[0],), (tangent,))[1])


def test_forward_over_reverse(fused_backend):
    student, tangent = STUDENT[0].clone().requires_grad_(), features(5, 7, seed=2)

    def gradient(x):
        return torch.autograd.grad(loss_of("kl", fused_backend)(x, TEACHER[0]), x, create_graph=True)[0]

    expected = jvp(grad(lambda x: loss_of("kl", fused_backend)(x, TEACHER[0])), (STUDENT[0],), (tangent,))[1]
    torch.testing.assert_close(tangents_of(gradient, (student, tangent)).tangent, expected)


@pytest.mark.parametrize("mode", [jvp, dual_jvp])
@pytest.mark.parametrize("loss", ["mse", "kl", "pkt", "cka"])
def test_tangents_of_upstream_gradients(loss, mode, fused_backend):
    student = STUDENT.clone().requires_grad_()
    value = icsd.similarity_distillation_loss(student, TEACHER, loss, reduction="none", backend=fused_backend)

    def gradient(upstream):
        return torch.autograd.grad(value, student, upstream, retain_graph=True)[0]

    upstream, tangent = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.3, 2.0, -1.0]).double()
    got, got_tangent = mode(gradient, (upstream,), (tangent,))
    torch.testing.assert_close(got, gradient(upstream))
    torch.testing.assert_close(got_tangent, gradient(tangent))


def test_plain_tensors_within_a_dual_level_stay_fused(launches, fused_backend):
    with forward_ad.dual_level():
        loss_of("mse", fused_backend)(STUDENT[0], TEACHER[0])
    assert launches == []

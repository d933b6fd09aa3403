"""The transforms of torch.func: without a loop, of any order, over any dimension, compiled too."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import icsd
from icsd.ops.cpu import CPUBackend

LOSSES = ["mse", "kl", "smooth_l1", "sp", "cc", "pkt", "cka", "dist", "rkd_distance", "rkd_angle"]


def features(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = features(3, 5, 7), features(3, 5, 4, seed=1)


def loss_of(loss, backend="cpu"):
    return lambda student, teacher: icsd.similarity_distillation_loss(student, teacher, loss, backend=backend)


@pytest.fixture
def launches(monkeypatch):
    """Names of the launchers called, one for each call."""
    seen = []
    for name in ("launch_gram", "launch_combine"):
        original = getattr(CPUBackend, name)

        def record(self, *arguments, name=name, original=original):
            seen.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(CPUBackend, name, record)
    return seen


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("in_dims", [(0, 0), (1, 2), (0, None), (None, -1)], ids=str)
def test_vmap_is_one_launch_for_each_stage(loss, in_dims, launches):
    value = loss_of(loss)
    moved = [
        features[0] if dim is None else features.movedim(0, dim)
        for features, dim in zip((STUDENT, TEACHER), in_dims, strict=True)
    ]
    expected = torch.stack(
        [value(STUDENT[i * (in_dims[0] is not None)], TEACHER[i * (in_dims[1] is not None)]) for i in range(3)]
    )
    launches.clear()
    torch.testing.assert_close(vmap(value, in_dims=in_dims)(*moved), expected)
    assert launches == ["launch_gram"] * 2


@pytest.mark.parametrize("loss", LOSSES)
def test_vmapped_gradients(loss, launches):
    gradients = vmap(grad(loss_of(loss)))(STUDENT, TEACHER)
    assert launches == ["launch_gram"] * 2 + ["launch_combine"]
    for i in range(3):
        student = STUDENT[i].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss_of(loss)(student, TEACHER[i]), student)
        torch.testing.assert_close(gradients[i], expected)


@pytest.mark.parametrize("loss", ["mse", "kl", "dist", "cka"])
def test_higher_derivatives_and_both_modes(loss):
    ours, reference = (loss_of(loss, backend) for backend in ("cpu", "reference"))
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


def test_nested_maps_over_groups(launches):
    student, teacher = features(2, 3, 2, 5, 7), features(2, 3, 2, 5, 4, seed=1)
    mapped = vmap(vmap(loss_of("kl")))(student, teacher)
    assert launches == ["launch_gram"] * 2
    expected = icsd.similarity_distillation_loss(student, teacher, "kl", reduction="none", backend="cpu").mean(-1)
    torch.testing.assert_close(mapped, expected)


def test_many_gradients_of_one_backward():
    student = STUDENT.clone().requires_grad_()
    losses = icsd.similarity_distillation_loss(student, TEACHER, "kl", reduction="none", backend="cpu")
    ones = torch.eye(3).double()
    (batched,) = torch.autograd.grad(losses, student, ones, is_grads_batched=True, retain_graph=True)
    mapped = vmap(lambda one: torch.autograd.grad(losses, student, one, retain_graph=True)[0])(ones)
    for i in range(3):
        (alone,) = torch.autograd.grad(losses[i], student, retain_graph=True)
        torch.testing.assert_close(batched[i], alone)
        torch.testing.assert_close(mapped[i], alone)


@pytest.mark.parametrize("transform", [vmap, lambda f: vmap(grad(f))], ids=["vmap", "vmap of grad"])
def test_compiled(transform):
    transformed = transform(loss_of("kl"))
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(STUDENT, TEACHER), transformed(STUDENT, TEACHER))


def test_functional_call_of_a_model():
    model = torch.nn.Linear(7, 6).double()
    criterion = icsd.SimilarityDistillationLoss("mse")

    def loss(parameters):
        return criterion(functional_call(model, parameters, STUDENT[0]), TEACHER[0])

    gradients = grad(loss)(dict(model.named_parameters()))
    loss(dict(model.named_parameters())).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_dual_numbers_outside_of_torch_func_are_refused():
    import torch.autograd.forward_ad as forward

    with forward.dual_level(), pytest.raises(RuntimeError, match=r"forward (AD|mode)|jvp"):
        loss_of("mse")(forward.make_dual(STUDENT[0].clone().requires_grad_(), features(5, 7)), TEACHER[0])

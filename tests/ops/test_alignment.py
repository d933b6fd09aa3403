"""Centered kernel alignment of several stages by the products of a backend, against its definition."""

import pytest
import torch
from inputs import normal
from torch.utils.checkpoint import checkpoint

import icsd
from icsd.ops.regimes import cka_in_feature_space, force_regime

OPTIONS = {"weights": [0.5, -2.0], "detach_teacher": False, "reduction": "none"}


def stages(dtype=torch.float64):
    """Return two students and a teacher with something in common, of 2 x 2 groups, one without variation in each."""
    teacher = normal(2, 2, 7, 3, seed=1, dtype=torch.float64)
    students = [teacher @ normal(3, dim, seed=dim, dtype=torch.float64) for dim in (4, 5)]
    found = [(x + 0.5 * normal(*x.shape, seed=9, dtype=torch.float64)).to(dtype) for x in (*students, teacher)]
    for k, x in enumerate(found):
        x[k // 2, k % 2] = 2.0
    return [x.requires_grad_() for x in found]


def value_and_gradients(features, wanted, backend, **options):
    leaves = [x.detach().requires_grad_(want) for x, want in zip(features, wanted, strict=True)]
    value = icsd.interstage_distillation_loss(leaves, "cka", backend=backend, **OPTIONS, **options)
    inputs = [x for x in leaves if x.requires_grad]
    return value.detach(), *torch.autograd.grad((value * torch.tensor([[1, 2], [3, -1]])).sum(), inputs)


@pytest.mark.parametrize(("regime", "center"), [("sample", False), ("sample", True), ("feature", False)])
@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False), (True, False, True)])
def test_same_as_the_definition(wanted, regime, center):
    features = stages()
    expected = value_and_gradients(features, wanted, "reference", center=center)
    with force_regime(regime):
        found = value_and_gradients(features, wanted, "cpu", center=center)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_mixed_dtypes():
    features = [x.to(dtype) for x, dtype in zip(stages(), (torch.bfloat16, torch.float32, torch.float64), strict=True)]
    found = value_and_gradients(features, (True, True, True), "cpu")
    assert [x.dtype for x in found] == [torch.float64, torch.bfloat16, torch.float32, torch.float64]
    expected = value_and_gradients([x.double() for x in features], (True, True, True), "reference")
    for got, want, tolerance in zip(found, expected, (1e-6, 1e-2, 1e-5, 1e-5), strict=True):
        assert torch.dist(got.double(), want) < tolerance * want.norm()


def test_derivatives():
    features = stages()

    def loss(*leaves):
        return icsd.interstage_distillation_loss(leaves, "cka", backend="cpu", **OPTIONS)

    varied = [x[:1, :, :4] + normal(1, 2, 4, x.shape[-1], seed=3, dtype=torch.float64) for x in features]
    varied = [x.detach().requires_grad_() for x in varied]
    assert torch.autograd.gradgradcheck(loss, varied, fast_mode=True)
    value = loss(*features).flatten()
    batched = torch.autograd.grad(
        value, features, torch.eye(4, dtype=value.dtype), is_grads_batched=True, retain_graph=True
    )
    for i in range(4):
        one = torch.autograd.grad(value[i], features, retain_graph=True)
        torch.testing.assert_close([x[i] for x in batched], list(one))


@pytest.mark.parametrize("grad", [True, False])
def test_one_matrix_of_each_student_is_kept(grad):
    x, y = (normal(9, dim, seed=dim).requires_grad_(grad and dim == 4) for dim in (4, 5))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
        loss = icsd.similarity_distillation_loss(x, y, "cka", backend="cpu")
    assert kept == ([(9, 4), (9, 5), (9, 9)] if grad else [])
    assert loss.requires_grad == grad


def test_many_samples_take_feature_space():
    def chosen(*shape):
        return cka_in_feature_space([torch.empty(shape, device="meta")] * 2)

    assert chosen(8192, 256)
    assert not chosen(4096, 256)
    assert chosen(16, 2048, 256)
    assert not chosen(8192, 8192)


@pytest.mark.parametrize("difference", [1e-2, 1e-5])
def test_feature_space_does_not_cancel(difference):
    x, noise = normal(300, 9, dtype=torch.float64), normal(300, 9, seed=1, dtype=torch.float64)
    features = [(x + 2).float(), (x + 2 + difference * noise).float()]
    with force_regime("feature"):
        loss = icsd.similarity_distillation_loss(*features, "cka", backend="cpu")
    exact = icsd.similarity_distillation_loss(*(z.double() for z in features), "cka", backend="reference")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_overflow_is_not_a_constant_batch(backend):
    student, teacher = 1e10 * normal(5, 3), normal(5, 4, seed=1)  # |x|² is finite in float32, and |K|² is not
    assert icsd.similarity_distillation_loss(student, teacher, "cka", backend=backend).isnan()


def test_checkpoint():
    features = stages()
    expected = value_and_gradients(features, (True, True, True), "cpu")

    def value(*leaves):
        return icsd.interstage_distillation_loss(leaves, "cka", backend="cpu", **OPTIONS)

    again = checkpoint(value, *features, use_reentrant=False)
    gradients = torch.autograd.grad((again * torch.tensor([[1, 2], [3, -1]])).sum(), features)
    torch.testing.assert_close(gradients, expected[1:])

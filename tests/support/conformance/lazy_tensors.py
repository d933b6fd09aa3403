"""Tensors whose elements are not what their memory holds: lazily negated or zero, subclasses, nested tensors."""

import pytest
import torch
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

import icsd
from icsd.ops.regimes import force_regime

REGIMES = [("sample", "kl"), ("feature", "mse"), ("streamed", "kl")]


def features(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


STUDENT, TEACHER = features(9, 40), features(9, 30, seed=1)


def negated(x):
    """Return the same values, by a view of their negation that is lazily negated."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


def negated_by_conjugation(x):
    """Return the same values, as PyTorch makes them of the imaginary part of a conjugate."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


NEGATIONS = [negated, negated_by_conjugation]


def loss_and_gradients(loss, student, teacher, **options):
    student, teacher = (x.detach().requires_grad_() for x in (student, teacher))
    value = icsd.similarity_distillation_loss(student, teacher, loss, detach_teacher=False, **options)
    return value.detach(), *torch.autograd.grad(value, (student, teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("negate", NEGATIONS)
@pytest.mark.parametrize(("regime", "loss"), REGIMES)
def test_lazily_negated_features(backend, regime, loss, negate, dtype):
    if negate is negated_by_conjugation and dtype == torch.bfloat16:
        pytest.skip("PyTorch has no complex bfloat16")
    student, teacher = STUDENT.to(dtype), TEACHER.to(dtype)
    with force_regime(regime):
        expected = loss_and_gradients(loss, student, teacher, backend=backend)
        results = loss_and_gradients(loss, negate(student), negate(teacher), backend=backend)
        torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("negate", NEGATIONS)
@pytest.mark.parametrize(("regime", "loss"), REGIMES)
def test_lazily_negated_gradients(backend, regime, loss, negate):
    student = STUDENT.clone().requires_grad_()
    with force_regime(regime):
        value = icsd.similarity_distillation_loss(student, TEACHER, loss, backend=backend)
        (expected,) = torch.autograd.grad(value, student, torch.tensor(-2.0), retain_graph=True)
        for create_graph in (False, True):
            (gradient,) = torch.autograd.grad(
                value, student, negate(torch.tensor(-2.0)), retain_graph=True, create_graph=create_graph
            )
            torch.testing.assert_close(gradient, expected)


def test_gradients_through_complex_losses(backend):
    """Public functions alone make lazy negations."""
    student = STUDENT.clone().requires_grad_()
    value = icsd.similarity_distillation_loss(student, TEACHER, backend=backend)
    (expected,) = torch.autograd.grad(value, student, retain_graph=True)
    (torch.complex(torch.zeros(()), value).conj() * 1j).real.backward(retain_graph=True)
    torch.testing.assert_close(student.grad, expected)
    student.grad = None
    torch.view_as_real(torch.complex(torch.ones(()), value).conj().resolve_conj())[1].backward()
    torch.testing.assert_close(student.grad, -expected)


@pytest.mark.parametrize("negate", NEGATIONS)
def test_lazily_negated_similarities(backend, negate):
    x = negate(STUDENT).requires_grad_()
    similarity = icsd.cross_sample_similarity(x, backend=backend)
    torch.testing.assert_close(similarity, icsd.cross_sample_similarity(STUDENT, backend=backend))
    (gradient,) = torch.autograd.grad(similarity, x, negate(torch.ones(9, 9)), create_graph=True)
    again = STUDENT.clone().requires_grad_()
    expected = torch.autograd.grad(icsd.cross_sample_similarity(again).sum(), again, create_graph=True)[0]
    torch.testing.assert_close(gradient, expected)
    second = torch.autograd.grad(gradient, x, negate(torch.ones(9, 40)))[0]
    torch.testing.assert_close(second, torch.autograd.grad(expected.sum(), again)[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("negate", NEGATIONS)
def test_lazily_negated_banks(negate):
    banks = features(12, 40, seed=2), features(12, 30, seed=3)
    expected, value = (
        icsd.similarity_distillation_loss(STUDENT, TEACHER, "kl", student_bank=first, teacher_bank=second)
        for first, second in (banks, map(negate, banks))
    )
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("loss", ["kl", "cka"])
def test_lazily_negated_features_under_torch_func(loss, fused_backend):
    def value(student):
        return icsd.similarity_distillation_loss(student, TEACHER, loss, backend=fused_backend)

    students = features(3, 9, 40, seed=4)
    for transform in (vmap(value), vmap(grad(value))):
        torch.testing.assert_close(transform(negated(students)), transform(students))


@pytest.mark.parametrize(("regime", "loss"), REGIMES)
def test_saved_tensors_that_hooks_negate(regime, loss, fused_backend):
    expected = loss_and_gradients(loss, STUDENT, TEACHER, backend=fused_backend)
    with force_regime(regime), torch.autograd.graph.saved_tensors_hooks(lambda x: -x, torch._neg_view):
        results = loss_and_gradients(loss, STUDENT, TEACHER, backend=fused_backend)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("regime", "loss"), REGIMES)
def test_saved_tensors_that_hooks_lay_out_anew(regime, loss, fused_backend):
    def strided(x):
        return torch.stack([x, x], -1)[..., 0]

    expected = loss_and_gradients(loss, STUDENT, TEACHER, backend=fused_backend)
    with force_regime(regime), torch.autograd.graph.saved_tensors_hooks(lambda x: x, strided):
        results = loss_and_gradients(loss, STUDENT, TEACHER, backend=fused_backend)
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("regime", "loss"), REGIMES)
def test_zero_tensors(backend, regime, loss):
    student = STUDENT.clone().requires_grad_()
    with force_regime(regime):
        value = icsd.similarity_distillation_loss(student, TEACHER, loss, reduction="none", backend=backend)
        for create_graph in (False, True):
            (gradient,) = torch.autograd.grad(
                value, student, torch._efficientzerotensor(()), retain_graph=True, create_graph=create_graph
            )
            assert gradient.eq(0).all()
        zeros = torch._efficientzerotensor((9, 40))
        results, expected = (
            icsd.similarity_distillation_loss(x, TEACHER, loss, backend=backend) for x in (zeros, torch.zeros(9, 40))
        )
        torch.testing.assert_close(results, expected)


def test_zero_tensors_as_gradients_of_groups_and_similarities(backend):
    student = features(3, 9, 40).requires_grad_()
    values = icsd.similarity_distillation_loss(student, features(3, 9, 30), "kl", reduction="none", backend=backend)
    assert torch.autograd.grad(values, student, torch._efficientzerotensor((3,)))[0].eq(0).all()
    similarity = icsd.cross_sample_similarity(student, backend=backend)
    zeros = torch._efficientzerotensor((3, 9, 9))
    (gradient,) = torch.autograd.grad(similarity, student, zeros, create_graph=True)
    assert gradient.eq(0).all()


class Named(torch.Tensor):
    """A subclass that has its elements in its memory."""


class Scaled(torch.Tensor):
    """A subclass that keeps half of its values in another tensor, and has no memory itself."""

    @staticmethod
    def __new__(cls, half):
        return torch.Tensor._make_wrapper_subclass(
            cls, half.shape, strides=half.stride(), dtype=half.dtype, requires_grad=half.requires_grad
        )

    def __init__(self, half):
        self.half = half

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        def unwrap(x):
            return 2 * x.half if isinstance(x, Scaled) else x

        return function(*tree_map(unwrap, arguments), **tree_map(unwrap, keywords or {}))


@pytest.mark.parametrize("wrap", [lambda x: x.as_subclass(Named), lambda x: Scaled(x / 2)], ids=["memory", "none"])
@pytest.mark.parametrize(("regime", "loss"), REGIMES)
def test_subclasses(backend, regime, loss, wrap):
    with force_regime(regime):
        results, expected = (
            icsd.similarity_distillation_loss(student, TEACHER, loss, backend=backend)
            for student in (wrap(STUDENT), STUDENT)
        )
    torch.testing.assert_close(results.as_subclass(torch.Tensor), expected)
    similarity = icsd.cross_sample_similarity(wrap(STUDENT), backend=backend)
    torch.testing.assert_close(similarity.as_subclass(torch.Tensor), icsd.cross_sample_similarity(STUDENT))


def test_gradients_that_are_subclasses(fused_backend):
    student = STUDENT.clone().requires_grad_()
    value = icsd.similarity_distillation_loss(student, TEACHER, backend=fused_backend)
    (expected,) = torch.autograd.grad(value, student, torch.tensor(3.0), retain_graph=True)
    for grad_ in (torch.tensor(3.0).as_subclass(Named), torch.nn.Parameter(torch.tensor(3.0))):
        (gradient,) = torch.autograd.grad(value, student, grad_, retain_graph=True)
        torch.testing.assert_close(gradient.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout):
    nested = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=layout)
    for call in (icsd.cross_sample_similarity, lambda x: icsd.similarity_distillation_loss(x, x)):
        with pytest.raises(TypeError, match="nested tensor: pad it"):
            call(nested)


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
def test_tensors_that_are_not_dense_are_refused(convert, backend):
    with pytest.raises(TypeError, match=r"student must be dense, got the layout torch\.\w+: convert it"):
        icsd.similarity_distillation_loss(convert(STUDENT), TEACHER, backend=backend)

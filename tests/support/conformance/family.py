"""The losses of the literature, each against its paper's (or its well-known code's) formula on the features."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import icsd
from icsd.losses import make_loss, relations


def sp(x, y):
    rows = [F.normalize(torch.einsum("id,jd->ij", z, z), dim=1) for z in (x, y)]
    return (rows[0] - rows[1]).norm() ** 2 / len(x) ** 2


def cc_bilinear(x, y):
    n = len(x)
    return sum((x[i].dot(x[j]) - y[i].dot(y[j])) ** 2 for i in range(n) for j in range(n)) / n**2


def taylor(x, gamma, order):
    products = torch.einsum("id,jd->ij", x, x)
    return math.exp(-2 * gamma) * sum((2 * gamma * products) ** p / math.factorial(p) for p in range(order + 1))


def cc_rbf(x, y, gamma=0.4, order=2):
    kernels = [taylor(z / z.norm(dim=1, keepdim=True), gamma, order) for z in (x, y)]
    return (kernels[0] - kernels[1]).norm() ** 2 / len(x) ** 2


def cc_rbf_exact(x, y, gamma):
    kernels = [torch.exp(-gamma * torch.cdist(z, z) ** 2) for z in (F.normalize(x), F.normalize(y))]
    return F.mse_loss(*kernels)


def cc_code(x, y, kernel="rbf"):
    kernels = [torch.einsum("id,jd->ij", z, z) if kernel == "bilinear" else taylor(z, 0.4, 2) for z in (x, y)]
    return torch.dist(*kernels) / len(x) ** 2


def affinities(x):
    return (1 + F.cosine_similarity(x[:, None], x[None], dim=-1)) / 2


def pkt(x, y):
    n, loss = len(x), 0
    p, q = affinities(x), affinities(y)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for j in others:
            q_ij, p_ij = (k[i, j] / sum(k[i, m] for m in others) for k in (q, p))
            loss = loss + q_ij * torch.log(q_ij / p_ij)
    return loss / n


def pkt_code(x, y):
    p, q = (affinities(z) / affinities(z).sum(1, keepdim=True) for z in (x, y))
    return (q * torch.log((q + 1e-7) / (p + 1e-7))).mean()


def cka(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    return 1 - (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def dist(x, y):
    s, t = (F.cosine_similarity(z[:, None], z[None], dim=-1) for z in (x, y))
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s, t, strict=True)]
    columns = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s.T, t.T, strict=True)]
    return 1 - (sum(correlations) + sum(columns)) / (2 * len(x))


def huber(a, b):
    x = (a - b).abs()
    return x * x / 2 if x <= 1 else x - 0.5


def rkd_distance(x, y):
    pairs = list(itertools.permutations(range(len(x)), 2))
    d, e = ([(z[i] - z[j]).norm() for i, j in pairs] for z in (x, y))
    return sum(huber(a / (sum(d) / len(d)), b / (sum(e) / len(e))) for a, b in zip(d, e, strict=True)) / len(pairs)


def rkd_distance_code(x, y):
    d, e = (torch.cdist(z, z) for z in (x, y))
    return F.smooth_l1_loss(d / d[d > 0].mean(), e / e[e > 0].mean())


def angles(x):
    directions = F.normalize(x[None] - x[:, None], dim=2)
    return torch.bmm(directions, directions.mT)


def rkd_angle(x, y):
    triplets = list(itertools.permutations(range(len(x)), 3))
    a, b = angles(x), angles(y)
    return sum(huber(a[j, i, k], b[j, i, k]) for i, j, k in triplets) / len(triplets)


def rkd_angle_code(x, y):
    return F.smooth_l1_loss(angles(x), angles(y))


CASES = {
    "sp": (sp, {}, 36),
    "cc": (cc_rbf, {}, 36),
    "cc-order-1": (lambda x, y: cc_rbf(x, y, 1.3, 1), {"gamma": 1.3, "order": 1}, 36),
    "cc-order-5": (lambda x, y: cc_rbf(x, y, 0.7, 5), {"gamma": 0.7, "order": 5}, 36),
    "cc-order-40": (lambda x, y: cc_rbf_exact(x, y, 2.0), {"gamma": 2.0, "order": 40}, 36),
    "cc-code": (cc_code, {"mode": "code"}, 36),
    "cc-bilinear": (cc_bilinear, {"kernel": "bilinear"}, 36),
    "cc-bilinear-code": (lambda x, y: cc_code(x, y, "bilinear"), {"kernel": "bilinear", "mode": "code"}, 36),
    "pkt": (pkt, {}, 6),
    "pkt-code": (pkt_code, {"mode": "code"}, 36),
    "cka": (cka, {}, 1),
    "dist": (dist, {}, 6),
    "rkd_distance": (rkd_distance, {}, 30),
    "rkd_distance-code": (rkd_distance_code, {"mode": "code"}, 36),
    "rkd_angle": (rkd_angle, {}, 120),
    "rkd_angle-code": (rkd_angle_code, {"mode": "code"}, 216),
}
# One of each, for the laws that hold whatever the parameters.
FAMILY = {name: parameters for name, (_, parameters, _) in CASES.items() if "order" not in name}
NORMALIZED = [name for name in FAMILY if not name.startswith("cc-")]


def loss_named(case):
    return make_loss(case.split("-")[0], **CASES[case][1])


def loss_of(case, x, y, **options):
    return icsd.similarity_distillation_loss(x, y, loss_named(case), **options)


def features(n=6, student=9, teacher=5, *batch, dtype=torch.float64, seed=0):
    """Return a student and a teacher that have something in common."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, n, student, generator=generator, dtype=torch.float64) + 0.3
    y = x @ torch.randn(student, teacher, generator=generator, dtype=torch.float64) / 3
    return x.to(dtype).requires_grad_(), (y + 0.2).to(dtype).requires_grad_()


@pytest.fixture
def chunked(monkeypatch):
    """Compute few angles at once, as for large batches."""
    monkeypatch.setattr(relations, "_ANGLES", 2**8)


@pytest.mark.parametrize("case", CASES)
def test_definition(case, backend):
    definition, _, terms = CASES[case]
    x, y = features()
    expected = definition(x, y)
    loss = loss_of(case, x, y, detach_teacher=False, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    gradients = zip(torch.autograd.grad(loss, (x, y)), torch.autograd.grad(expected, (x, y)), strict=True)
    for got, want in gradients:
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(loss_of(case, x, y, reduction="sum", backend=backend), expected * terms)


@pytest.mark.parametrize("case", FAMILY)
def test_groups_and_stages(case):
    x, y = (z.detach() for z in features(6, 9, 5, 2, 3))
    each = loss_of(case, x, y, reduction="none")
    expected = [[loss_of(case, x[i, j], y[i, j]) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(each, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(loss_of(case, x, y), each.mean())
    torch.testing.assert_close(loss_of(case, x, y, reduction="sum"), each.sum() * CASES[case][2])
    stages = [x[0, 0], x[1, 1, :, :4], y[0, 0]]
    both = icsd.interstage_distillation_loss(stages, loss_named(case), weights=[0.5, 2.0])
    torch.testing.assert_close(both, 0.5 * loss_of(case, *stages[::2]) + 2 * loss_of(case, *stages[1:]))


@pytest.mark.parametrize("case", FAMILY)
def test_gradcheck_and_gradgradcheck(case, backend):
    x, y = features(4, 3, 4, 1)

    def loss(x, y):
        return loss_of(case, x, y, detach_teacher=False, backend=backend, reduction="none")

    assert torch.autograd.gradcheck(loss, (x, y))
    assert torch.autograd.gradgradcheck(loss, (x, y))


@pytest.mark.parametrize("case", FAMILY)
def test_functional_gradient(case):
    x, y = features()
    expected = torch.autograd.grad(loss_of(case, x, y), x)[0]
    gradient = torch.func.grad(lambda x: loss_of(case, x, y, backend="reference"))(x)
    torch.testing.assert_close(gradient, expected)
    batch = torch.stack([x, 2 * y @ y.mT @ x])
    each = torch.vmap(lambda x: loss_of(case, x, y, backend="reference"))(batch)
    torch.testing.assert_close(each, torch.stack([loss_of(case, z, y) for z in batch]))


@pytest.mark.parametrize("case", FAMILY)
def test_laws(case, backend):
    x, y = (z.detach() for z in features(12, 40, 30))

    def loss(x, y):
        return loss_of(case, x, y, backend=backend)

    generator = torch.Generator().manual_seed(1)
    value, order = loss(x, y), torch.randperm(12, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    assert value > 0
    torch.testing.assert_close(loss(x[order], y[order]), value)
    torch.testing.assert_close(loss(x @ rotation, y), value)
    assert loss(x, x @ rotation).abs() < 1e-12
    if case in NORMALIZED:
        torch.testing.assert_close(loss(3e-3 * x, 70 * y), value)
    if case.startswith(("pkt", "dist", "cc")) and case in NORMALIZED:
        scales = torch.rand(12, 1, generator=generator, dtype=torch.float64) * 100 + 0.01
        torch.testing.assert_close(loss(x * scales, y), value)
    if case.startswith(("cka", "rkd")):
        torch.testing.assert_close(loss(x + 5, y - x.mean()), value)


def test_bounds():
    x = torch.eye(4, dtype=torch.float64)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert 0 < loss_of("cka", x, opposite) < 1
    assert loss_of("dist", opposite, -opposite) == 0
    assert loss_of("pkt", opposite, x).isfinite()  # the student finds impossible what the teacher does not
    x, y = features(50, 3, 3)
    assert 0 < loss_of("cka", x, torch.randn_like(y)) < 1
    assert 0 < loss_of("dist", x, torch.randn_like(y)) < 2


def gradients_of(case, x, y, backend):
    """Return the loss, its gradient and that of a gradient penalty."""
    x = x.detach().requires_grad_()
    loss = loss_of(case, x, y, backend=backend)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x) if gradient.requires_grad else (gradient,)
    return loss.detach(), gradient.detach(), second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", FAMILY)
def test_identical_features(case, dtype, backend):
    x, _ = features(dtype=dtype)
    loss, gradient, second = gradients_of(case, x, x.detach(), backend)
    assert loss == 0
    # That code adds 1e-7 to some probabilities; then equal ones are not quite stationary.
    assert gradient.abs().max() < 50 * torch.finfo(dtype).eps + (1e-7 if case == "pkt-code" else 0)
    assert second.isfinite().all()


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("case", FAMILY)
def test_few_samples(case, n, backend):
    x, y = features(n)
    loss, gradient, second = gradients_of(case, x, y.detach(), backend)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert second.isfinite().all()
    if n == 0 or (n == 1 and case in NORMALIZED):
        assert loss.abs() < 1e-14
    if n == 2 and case in ("pkt", "cka", "dist", "rkd_distance", "rkd_angle"):  # nothing to relate to the only relation
        assert loss.abs() < 1e-14


def constant(x):
    return x[:1].expand_as(x)


def some_zero(x):
    return x * (torch.arange(len(x)) % 3 > 0).unsqueeze(1)


def twins(x):
    return x[torch.arange(len(x)) // 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("degenerate", [torch.zeros_like, constant, some_zero, twins])
@pytest.mark.parametrize("case", FAMILY)
def test_degenerate_features(case, degenerate, dtype, backend):
    x, y = (z.detach() for z in features(7, 9, 5, dtype=dtype))
    for student, teacher in ((degenerate(x), y), (x, degenerate(y)), (degenerate(x), degenerate(y))):
        loss, gradient, second = gradients_of(case, student, teacher, backend)
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e3
        assert second.isfinite().all()
    if degenerate in (torch.zeros_like, constant) and case in NORMALIZED:
        assert loss.abs() < 1e-6  # two collapsed batches agree


def test_collapse_is_no_agreement():
    x, y = features()
    assert loss_of("cka", constant(x), y).item() == pytest.approx(1)
    assert loss_of("dist", x, constant(y)).item() == pytest.approx(1)
    collapsed = torch.full((6, 4099), 0.1)  # whose sums round
    assert loss_of("cka", collapsed, y.float()).item() == pytest.approx(1)
    assert loss_of("rkd_angle", collapsed, collapsed) == 0


def test_coincident_samples_follow_the_papers():
    x, y = features(6, 3, 4)
    x, y = twins(x), y.detach()
    a, b = angles(x), angles(y)
    triplets = [(j, i, k) for i, j, k in itertools.permutations(range(6), 3)]
    expected = sum(huber(a[t], b[t]) for t in triplets) / len(triplets)
    torch.testing.assert_close(loss_of("rkd_angle", x, y), expected)
    torch.testing.assert_close(loss_of("rkd_angle-code", x, y), rkd_angle_code(x, y))
    torch.testing.assert_close(loss_of("rkd_distance-code", x, y), rkd_distance_code(x, y))
    assert loss_of("rkd_distance", x, y) != loss_of("rkd_distance-code", x, y) * 36 / 30  # μ differs


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("case", FAMILY)
def test_nan_and_inf_are_not_hidden(case, backend, value):
    x, y = (z.detach() for z in features(5, 3, 4, 2, dtype=torch.float32))
    x[1, 2, 0] = value
    loss = loss_of(case, x, y, backend=backend, reduction="none")
    assert loss.isfinite().tolist() == [True, False]
    assert loss.isnan()[1] or (case.startswith("cc-") and value == math.inf)
    assert loss_of(case, y, x, backend=backend, reduction="none").isfinite().tolist() == [True, False]


@pytest.mark.parametrize("case", ["sp", "cka", "dist"])
def test_nan_is_not_hidden_by_a_teacher_without_variation(case, backend):
    x, y = torch.randn(3, 4), torch.zeros(3, 2)
    x[1] = torch.nan
    assert loss_of(case, x, y, backend=backend).isnan()
    assert loss_of(case, y, x, backend=backend).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FAMILY)
def test_accumulates_in_float32(case, dtype):
    x, y = (z.detach() for z in features(16, 500, 300, dtype=dtype))
    loss = loss_of(case, x, y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), loss_of(case, x.double(), y.double()), rtol=2e-4, atol=1e-7)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("case", ["rkd_angle", "rkd_angle-code"])
def test_angles_in_chunks(case):
    x, y = features(7, 3, 4, 2)

    def loss(x, y):
        return loss_of(case, x, y, detach_teacher=False, reduction="none")

    expected = torch.stack([CASES[case][0](*pair) for pair in zip(x, y, strict=True)])
    torch.testing.assert_close(loss(x, y), expected)
    assert torch.autograd.gradcheck(loss, (x, y), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x, y), fast_mode=True)


@pytest.mark.usefixtures("chunked")
def test_angles_never_take_cubic_memory():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
            self.elements = max(self.elements, *(tensor.numel() for tensor in tensors), 0)
            return result

    held = {}
    n = 48
    x, y = features(n, 3, 4)
    with (
        Largest() as largest,
        torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: held.setdefault(tensor.untyped_storage().data_ptr(), tensor), lambda tensor: tensor
        ),
    ):
        loss_of("rkd_angle", x, y).backward()
    assert largest.elements <= n * n
    assert sum(tensor.numel() for tensor in held.values()) < 20 * n * n < n**3


def test_compile_fullgraph(backend):
    def losses(x, y):
        return torch.stack([loss_of(case, x, y, backend=backend) for case in FAMILY])

    x, y = features(dtype=torch.float32)
    expected = losses(x, y)
    results = torch.compile(losses, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(results, expected)
    gradients = [torch.autograd.grad(each.sum(), x) for each in (results, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

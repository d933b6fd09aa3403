"""The implementations that the operator is compared with: the same losses in PyTorch, each as fast as it can be."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

import icsd
from icsd.losses import Loss

Implementation = Callable[[Tensor, Tensor], Tensor]

# The implementations of mse and kl, and of losses of groups. The literature's have two: icsd's and torchdistill's.
IMPLEMENTATIONS = ["icsd", "plain", "compile", "composite"]
if torch.backends.mkldnn.is_available():
    IMPLEMENTATIONS.append("composite-onednn")
if find_spec("pytorch_metric_learning"):
    IMPLEMENTATIONS.append("metric-learning")
OF_GROUPS = ["icsd", "plain", "compile", "composite", "composite-whole"]


def implementations(loss: Loss, groups: int = 1) -> dict[str, Implementation]:
    """Return all implementations of a loss as functions of a student `(N, D_s)` and a teacher `(N, D_t)`.

    `mse` and `kl` have the `IMPLEMENTATIONS`; the losses in `TORCHDISTILL` have icsd's and torchdistill's, which takes
    one group after the other. Several groups, `(B, N, D)`, have those in `OF_GROUPS`, with the public formula as plain.
    """
    ours = partial(
        icsd.similarity_distillation_loss,
        loss=loss,
        backend="cpu",
    )
    if loss.name in TORCHDISTILL:
        theirs = torchdistill_loss(loss.name)
        return {"icsd": ours, "torchdistill": partial(mean_of_groups, theirs) if groups > 1 else theirs}
    plain = partial(public_loss if groups > 1 else plain_loss, loss=loss)
    compiled = torch.compile(partial(combination, loss=loss), dynamic=False)
    found: dict[str, Implementation] = {
        "icsd": ours,
        "plain": plain,
        "compile": torch.compile(plain, dynamic=False),
        "composite": CompositeLoss(compiled),
    }
    if groups > 1:
        return found | {"composite-whole": WholeCompositeLoss(compiled)}
    if "composite-onednn" in IMPLEMENTATIONS:
        found["composite-onednn"] = OneDNNCompositeLoss(compiled)
    if "metric-learning" in IMPLEMENTATIONS:
        from pytorch_metric_learning.distances import CosineSimilarity

        found["metric-learning"] = partial(plain, similarity=CosineSimilarity())
    return found


# torchdistill's modules, the names by which they find the features, and their other arguments. Not its SPKDLoss, which
# divides the rows of "sp" by their L1 norms, nor its DISTLoss, which is of class probabilities.
TORCHDISTILL = {
    "cc": ("CCKDLoss", ("features", "features"), ({"type": "gaussian", "gamma": 0.4, "max_p": 2}, "batchmean")),
    "pkt": ("PKTLoss", ("features", "output", "features", "output"), ()),
    "rkd_distance": ("RKDLoss", ("features", "features"), (1.0, 0.0, "mean")),
    "rkd_angle": ("RKDLoss", ("features", "features"), (0.0, 1.0, "mean")),
}


def torchdistill_loss(name: str) -> Implementation:
    """Return torchdistill's version of a loss, which icsd computes in `mode="code"`."""
    from torchdistill.losses import mid_level

    module, paths, arguments = TORCHDISTILL[name]
    loss = getattr(mid_level, module)(*paths, *arguments)
    return lambda student, teacher: loss({"features": {"output": student}}, {"features": {"output": teacher}})


def mean_of_groups(loss: Implementation, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of a loss over groups `(B, N, D)`, for code that takes one group at a time."""
    return torch.stack([loss(x, y) for x, y in zip(student, teacher, strict=True)]).mean()


def plain_similarity(x: Tensor) -> Tensor:
    """Return the cosine similarities in the straightforward way: normalized copies and their product."""
    x = F.normalize(x, dim=-1, eps=1e-8)
    return x @ x.mT


def plain_loss(
    student: Tensor,
    teacher: Tensor,
    loss: Loss,
    similarity: Callable[[Tensor], Tensor] = plain_similarity,
) -> Tensor:
    """Return the loss of two similarity matrices, by PyTorch's own losses."""
    return _kl(similarity(student), similarity(teacher), loss)


def public_loss(student: Tensor, teacher: Tensor, loss: Loss) -> Tensor:
    """Return the mean loss of groups `(B, N, D)` as public code computes it: in float32, from float32 copies."""
    if loss.name == "cka":
        return _kernel_alignment(student.float(), teacher.float())
    s, t = (plain_similarity(x.float()).flatten(0, -2) for x in (student, teacher))
    return _kl(s, t, loss)


def _kernel_alignment(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean of 1 - CKA as lightly computes it, from kernels of centered tokens."""
    kernels = [x @ x.mT for x in (z - z.mean(1, keepdim=True) for z in (student, teacher))]
    products = [(a * b).sum((1, 2)) for a, b in ((kernels[0], kernels[1]), (kernels[0],) * 2, (kernels[1],) * 2)]
    return 1 - (products[0] / (products[1] * products[2]).sqrt()).mean()


def _kl(s: Tensor, t: Tensor, loss: Loss) -> Tensor:
    if loss.name == "mse":
        if loss.clamp == "both":
            s, t = s.clamp(min=0), t.clamp(min=0)
        return F.mse_loss(s, t)
    if loss.name == "smooth_l1":
        return F.smooth_l1_loss(s, t, beta=loss.beta)
    log_p = F.log_softmax(s / loss.student_temperature, dim=-1)
    log_q = F.log_softmax(t / loss.teacher_temperature, dim=-1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


class CompositeLoss:
    """The fastest losses of `(N, D)` or of groups `(B, N, D)` that we could make of PyTorch's operators.

    It makes no normalized copy, because the diagonal of K = X Xᵀ holds the norms. It computes only one triangle of K
    by products, compiles all work on N x N matrices into one function, and the gradient is one product. The product is
    written into a buffer that is kept, because fresh memory costs as much as the product where D is large. So each
    gradient is overwritten by the next backward pass.

    Args:
        combination: `combination` of a loss, compiled.
    """

    def __init__(self, combination: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        self.combination = combination
        self.buffer = torch.empty(0)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the loss of `(*B, N, D_s)` and `(*B, N, D_t)`; only the student gets a gradient."""
        return _Composite.apply(self, student, teacher)

    def gram(self, x: Tensor) -> Tensor:
        """Return X Xᵀ from one triangle; blocks of 32 rows are too small to gain from the symmetry."""
        if x.shape[-2] <= 32:
            return self.product(x, x)
        upper, lower = x.tensor_split(2, dim=-2)
        corner = self.product(upper, lower)
        rows = torch.cat([self.gram(upper), corner], -1), torch.cat([corner.mT, self.gram(lower)], -1)
        return torch.cat(rows, -2)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Return A Bᵀ."""
        return a @ b.mT

    def gradient(self, combination: Tensor, student: Tensor) -> Tensor:
        """Return the product of `combination` and `student`."""
        if self.buffer.shape != student.shape or self.buffer.dtype != student.dtype:
            self.buffer = torch.empty_like(student)
        return torch.matmul(combination, student, out=self.buffer)


class WholeCompositeLoss(CompositeLoss):
    """The composite with whole Gram matrices, which are faster where products of parts of a triangle are small."""

    def gram(self, x: Tensor) -> Tensor:
        return self.product(x, x)


class OneDNNCompositeLoss(CompositeLoss):
    """The composite with oneDNN's products, which are faster than those of `torch.mm` (MKL) on some processors.

    `torch.mm` takes oneDNN for bfloat16 but not for float32, so this calls the operator that torch.compile emits.
    """

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    def gradient(self, combination: Tensor, student: Tensor) -> Tensor:
        return self.product(combination, student.mT)


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: CompositeLoss, student: Tensor, teacher: Tensor) -> Tensor:
        value, combination = loss.combination(loss.gram(student), loss.gram(teacher))
        ctx.loss = loss
        ctx.save_for_backward(student, combination)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None]:
        student, combination = ctx.saved_tensors
        return None, ctx.loss.gradient(combination * grad, student), None


def combination(gram: Tensor, teacher_gram: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Return the loss and the matrices M of the gradient M X."""
    if loss.name == "cka":
        return _cka_combination(gram, teacher_gram)
    s, inverse = _similarity_and_inverse_norms(gram)
    t, _ = _similarity_and_inverse_norms(teacher_gram)
    if loss.name == "mse":
        if loss.clamp == "both":
            symmetric_gradient = (s.clamp(min=0) - t.clamp(min=0)) * (s > 0) * (4 / s.numel())
        else:
            symmetric_gradient = (s - t) * (4 / s.numel())
    else:
        p = F.softmax(s / loss.student_temperature, dim=-1)
        q = F.softmax(t / loss.teacher_temperature, dim=-1)
        gradient = (p - q) * (s.shape[-1] / s.numel() / loss.student_temperature)
        symmetric_gradient = gradient + gradient.mT
    off_diagonal = symmetric_gradient - torch.diag_embed(symmetric_gradient.diagonal(dim1=-2, dim2=-1))
    projection = (off_diagonal * s).sum(-1)
    scaled = off_diagonal * inverse[..., :, None] * inverse[..., None, :]
    return _kl(s.flatten(0, -2), t.flatten(0, -2), loss), scaled - torch.diag_embed(projection * inverse.square())


def _cka_combination(gram: Tensor, teacher_gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of 1 - CKA and the matrices of its gradient, both from centered Gram matrices in float32."""
    student, teacher = (_centered(x.float()) for x in (gram, teacher_gram))
    pairs = (student, teacher), (student, student), (teacher, teacher)
    product, square, teachers_square = ((a * b).sum((-2, -1), keepdim=True) for a, b in pairs)
    scale = (square * teachers_square).rsqrt()
    matrices = (product / square * student - teacher) * scale * (2 / scale.numel())
    return 1 - (product * scale).mean(), matrices.to(gram.dtype)


def _centered(gram: Tensor) -> Tensor:
    means = gram.mean(-1, keepdim=True)
    return gram - means - means.mT + means.mean(-2, keepdim=True)


def _similarity_and_inverse_norms(gram: Tensor) -> tuple[Tensor, Tensor]:
    inverse = gram.diagonal(dim1=-2, dim2=-1).clamp(min=1e-16).rsqrt()
    return gram * inverse[..., :, None] * inverse[..., None, :], inverse

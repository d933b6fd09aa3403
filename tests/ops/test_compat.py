"""The losses of other projects against independent transcriptions of their formulas: values and gradients."""

import math
import re
from pathlib import Path

import pytest
import torch
from inputs import normal
from torch.nn import functional as F

from icsd.compat import cirkd, dinov3, lightly, lightly_train, open_clip, vavae


def related(*shape, teacher_dim=None, seed=0):
    """Return a student and a teacher in float64 that have something in common; both require gradients."""
    x = normal(*shape, seed=seed, dtype=torch.float64)
    y = x @ normal(shape[-1], teacher_dim or shape[-1], seed=seed + 1, dtype=torch.float64) / 2
    y += normal(*y.shape, seed=seed + 2, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_()


def assert_same(losses, expected, inputs):
    torch.testing.assert_close(losses, expected, rtol=1e-11, atol=1e-13)
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (losses, expected)]
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def cosine(a, b):
    return a.dot(b) / (a.norm() * b.norm())


def gram_anchoring(x, y, product, clamp):
    """Return DINOv3's loss of one Gram matrix, pair by pair."""
    total = 0
    for i in range(len(x)):
        for j in range(len(x)):
            s, t = product(x[i], x[j]), product(y[i], y[j])
            if clamp == "both":
                s = s.clamp(min=0)
            total = total + (s - (t if clamp == "none" else t.clamp(min=0))) ** 2
    return total / len(x) ** 2


@pytest.mark.parametrize("apply_norm", [True, False])
@pytest.mark.parametrize("clamp", ["both", "teacher", "none"])
def test_gram_anchoring(clamp, apply_norm):
    x, y = related(2, 5, 4, teacher_dim=6)
    loss = dinov3.GramLoss(
        apply_norm=apply_norm, remove_neg=clamp == "both", remove_only_teacher_neg=clamp == "teacher"
    )
    product = cosine if apply_norm else torch.dot
    expected = torch.stack([gram_anchoring(*pair, product, clamp) for pair in zip(x, y, strict=True)]).mean()
    assert_same(loss(x, y), expected, (x, y))
    of_batch = gram_anchoring(x.flatten(0, 1), y.flatten(0, 1), product, clamp)
    assert_same(loss(x, y, img_level=False), of_batch, (x, y))
    assert_same(loss(x.flatten(0, 1), y.flatten(0, 1), img_level=False), of_batch, (x, y))


def test_default_arguments_of_gram_anchoring_clamp_both():
    x, y = related(3, 4, 5)
    torch.testing.assert_close(dinov3.GramLoss()(x, y), dinov3.GramLoss(True, True, True, False)(x, y, True))
    assert dinov3.GramLoss().loss.clamp == "both"


def test_vision_foundation_loss():
    z, feature = related(2, 3, 2, 4)
    z, feature = (x.movedim(-1, 1) for x in (z, feature))  # (B, C, H, W)
    distances, cosines = 0, 0
    for image, target in zip(z.flatten(2).mT, feature.flatten(2).mT, strict=True):
        n = len(image)
        for i in range(n):
            cosines = cosines + (1 - 0.3 - cosine(image[i], target[i])).clamp(min=0) / n / 2
            for j in range(n):
                difference = cosine(image[i], image[j]) - cosine(target[i], target[j])
                distances = distances + (difference.abs() - 0.25).clamp(min=0) / n**2 / 2
    loss = vavae.VFLoss(distmat_margin=0.25, cos_margin=0.3, distmat_weight=2.0, cos_weight=0.5)
    assert_same(loss(z, feature), 2 * distances + 0.5 * cosines, (z, feature))


def test_zero_positions_have_gradient_zero():
    z, feature = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1)
    z[..., 1, 1] = feature[..., 0, 2] = 0
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(vavae.VFLoss()(z, feature), z)
    assert (gradient[..., 1, 1] == 0).all()
    assert gradient[..., 0, 0].abs().max() > 0


def centered_kernel(x):
    h = torch.eye(len(x), dtype=x.dtype) - 1 / len(x)
    return h @ x @ x.T @ h


def kernel_alignment(x, y):
    a, b = centered_kernel(x), centered_kernel(y)
    return 1 - torch.trace(a @ b) / (torch.trace(a @ a) * torch.trace(b @ b)).sqrt()


def test_patch_kernel_alignment():
    x, y = related(3, 6, 4)
    y = y.detach()
    expected = sum(kernel_alignment(*pair) for pair in zip(x, y, strict=True)) / 3
    assert_same(lightly.PatchKernelAlignmentLoss()(x, y), expected, (x,))


def test_patch_kernel_alignment_of_masked_tokens():
    x, y = related(4, 6, 5)
    y = y.detach()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, [1, 4]] = mask[1, 0] = mask[3, 1:] = True  # a single token of the last image is left
    kept = [~row for row in mask[:3]]
    expected = sum(kernel_alignment(x[i, kept[i]], y[i, kept[i]]) for i in range(3)) / 3
    loss = lightly.PatchKernelAlignmentLoss()
    assert_same(loss(x, y, mask), expected, (x,))
    assert loss(x, y, torch.ones_like(mask)) == 0
    assert lightly.PatchKernelAlignmentLoss()(x[:, :1], y[:, :1]) == 0


def test_equal_tokens_have_no_gradient_under_a_mask():
    x, y = normal(1, 1, 7).mul(3.3).expand(1, 5, 7).clone().requires_grad_(), normal(1, 5, 7, seed=1)
    mask = torch.tensor([[True, False, False, False, True]])
    loss = lightly.PatchKernelAlignmentLoss()(x, y, mask)
    assert loss == 1
    assert torch.autograd.grad(loss, x)[0].eq(0).all()


def test_drawn_tokens_are_those_of_both_and_valid_first():
    x, y = related(2, 9, 4)
    mask = torch.arange(9) >= 4  # four tokens are left, as many as are drawn
    loss = lightly.PatchKernelAlignmentLoss(max_tokens=4)(x, y, mask.expand(2, 9))
    torch.testing.assert_close(loss, lightly.PatchKernelAlignmentLoss()(x[:, :4], y[:, :4]))
    torch.manual_seed(3)
    drawn = torch.rand(2, 9).topk(4, dim=1, largest=False).indices
    rows = torch.arange(2)[:, None]
    torch.manual_seed(3)
    loss = lightly.PatchKernelAlignmentLoss(max_tokens=4)(x, y)
    torch.testing.assert_close(loss, lightly.PatchKernelAlignmentLoss()(x[rows, drawn], y[rows, drawn]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_patch_kernel_alignment_does_not_underflow(dtype):
    x = (1 + 1e-2 * normal(2, 30, 16)).to(dtype)
    y = (1 + 1e-2 * (normal(2, 30, 16) + 0.5 * normal(2, 30, 16, seed=1))).to(dtype)
    small, alike = (x * 2.0**-9).requires_grad_(), y * 2.0**-9  # their kernels vary by 1e-9
    loss = lightly.PatchKernelAlignmentLoss()(small, alike)
    expected = sum(kernel_alignment(*pair) for pair in zip(small.double(), alike.double(), strict=True)) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    wanted = torch.autograd.grad(expected, small)[0]
    gradient = torch.autograd.grad(loss, small)[0]
    assert torch.dist(gradient.float(), wanted.float()) < 0.02 * wanted.float().norm()


def divergence(s, t, temperature):
    """Return KL(softmax(t / temperature) || softmax(s / temperature)) of two lists of numbers."""
    p, q = (torch.stack(row).div(temperature).exp() for row in (s, t))
    p, q = p / p.sum(), q / q.sum()
    return (q * (q / p).log()).sum()


def test_similarities_within_images_and_to_a_queue():
    local = related(2, 4, 5)
    images = related(2, 5, seed=7)
    queue = F.normalize(normal(6, 5, seed=9, dtype=torch.float64), dim=-1)
    x, y, student, teacher = (F.normalize(z, dim=-1) for z in (*local, *images))
    expected_global = sum(
        divergence([student[i].dot(c) for c in queue], [teacher[i].dot(c) for c in queue], 0.3) for i in range(2)
    )
    expected_local = sum(
        divergence([x[b, i].dot(z) for z in x[b]], [y[b, i].dot(z) for z in y[b]], 0.2)
        for b in range(2)
        for i in range(4)
    )
    losses = lightly_train.DistillationV3Loss(0.3, 0.2)(teacher, y, student, x, queue)
    assert_same(losses[0], expected_global / 2, images)
    assert_same(losses[1], expected_local / 8, local)


def test_pairs_of_images():
    x, y = related(3, 2, 2, 4)
    x, y = (z.movedim(-1, 1) for z in (x, y))
    tokens = [z.flatten(2).mT for z in (x, y)]
    expected = 0
    for i in range(3):
        for j in range(3):
            for a in range(4):
                rows = [[cosine(z[i, a], other) for other in z[j]] for z in tokens]
                expected = expected + divergence(*rows, 0.5) / 36
    assert_same(cirkd.CriterionMiniBatchCrossImagePair(0.5)(x, y), expected, (x, y))
    assert cirkd.CriterionMiniBatchCrossImagePair(0.5)(x[:0], y[:0]) == 0


def clip_losses(images, texts, scale, teacher_images, teacher_texts, teacher_scale):
    """Return the contrastive loss and the distillation loss of open_clip, logit by logit."""
    contrastive = distill = 0
    pairs = ((images, texts), (teacher_images, teacher_texts)), ((texts, images), (teacher_texts, teacher_images))
    for (x, y), (u, v) in pairs:
        n = len(x)
        for i in range(n):
            log_p = torch.stack([scale * x[i].dot(y[j]) for j in range(len(y))])
            log_p = log_p - log_p.exp().sum().log()
            q = torch.stack([teacher_scale * u[i].dot(v[j]) for j in range(len(y))]).exp()
            contrastive = contrastive - log_p[i] / (2 * n)
            distill = distill - (q / q.sum() * log_p).sum() / (2 * n)
    return contrastive, distill


def test_images_and_texts():
    images, texts = related(5, 4)
    teacher = [F.normalize(x.detach(), dim=-1) for x in related(5, 7, seed=5)]
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    student = [F.normalize(x, dim=-1) for x in (images, texts)]
    expected = clip_losses(*student, scale, *teacher, 6.0)
    losses = open_clip.DistillClipLoss()(*student, scale, *teacher, 6.0)
    for got, want in zip(losses, expected, strict=True):
        assert_same(got, want, (images, texts, scale))
    named = open_clip.DistillClipLoss()(*student, 4.0, *teacher, torch.tensor(6.0), output_dict=True)
    torch.testing.assert_close([named["contrastive_loss"], named["distill_loss"]], list(losses))


def test_losses_are_scalars_for_a_factor_in_a_vector():
    features = [F.normalize(x.detach(), dim=-1) for x in (*related(5, 4), *related(5, 7))]
    # `create_loss` of open_clip gives all of these.
    criterion = open_clip.DistillClipLoss(False, False, cache_labels=True, rank=0, world_size=1, use_horovod=False)
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    losses = criterion(*features[:2], scale, *features[2:], torch.ones(1))
    torch.testing.assert_close(losses, criterion(*features[:2], 1.0, *features[2:], 1.0))
    assert torch.autograd.grad(sum(losses), scale)[0].shape == (1,)


MAPS, TOKENS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 20, 3)


@pytest.mark.parametrize(
    ("match", "call"),
    [
        (
            r"output_feats must be patch tokens \(B, N, D\), got maps .*: give output_feats.flatten\(2\).mT",
            lambda: dinov3.GramLoss()(MAPS, MAPS),
        ),
        (r"target_feats must be .* \(N, D\) or \(B, N, D\), got maps", lambda: dinov3.GramLoss()(TOKENS, MAPS, False)),
        (r"patch tokens \(B, N, D\), got the shape \(20, 3\)", lambda: dinov3.GramLoss()(TOKENS[0], TOKENS[0])),
        ("both True: choose one", lambda: dinov3.GramLoss(remove_only_teacher_neg=True)),
        (
            r"z must be maps \(B, C, H, W\), got the shape \(2, 20, 3\): give z.mT.unflatten",
            lambda: vavae.VFLoss()(TOKENS, MAPS),
        ),
        (
            r"z and aux_feature must have the same shape, got \(2, 1, 4, 5\) and \(2, 3, 4, 5\)",
            lambda: vavae.VFLoss()(MAPS[:, :1], MAPS),
        ),
        (r"distmat_margin must be in \[0, 2\), got 2", lambda: vavae.VFLoss(distmat_margin=2)),
        (r"cos_margin must be in \[0, 2\), got -1", lambda: vavae.VFLoss(cos_margin=-1)),
        ("cos_weight must be finite, got nan", lambda: vavae.VFLoss(cos_weight=math.nan)),
        ("student_features must be patch tokens", lambda: lightly.PatchKernelAlignmentLoss()(MAPS, MAPS)),
        (
            r"must agree in all but the last dimension, got \(2, 20, 3\) and \(2, 12, 5\)",
            lambda: lightly.PatchKernelAlignmentLoss(max_tokens=4)(TOKENS, MAPS.flatten(1, 2)),
        ),
        ("max_tokens must be at least 2", lambda: lightly.PatchKernelAlignmentLoss(1)),
        (
            r"mask must be a boolean tensor \(2, 20\).*got torch.float32",
            lambda: lightly.PatchKernelAlignmentLoss()(TOKENS, TOKENS, torch.zeros(2, 20)),
        ),
        (
            "student_features_local must be patch tokens",
            lambda: lightly_train.DistillationV3Loss(0.1, 0.1)(TOKENS[:, 0], TOKENS, TOKENS[:, 0], MAPS, TOKENS[0]),
        ),
        ("student_temperature must be a positive", lambda: lightly_train.DistillationV3Loss(0.0, 0.1)),
        (
            r"text_features must have the shape \(20, D\), one row for each row of image_features, got \(2, 20, 3\)",
            lambda: open_clip.DistillClipLoss()(TOKENS[0], TOKENS, 1.0, TOKENS[0], TOKENS[0], 1.0),
        ),
        (
            "dist_logit_scale must be a positive finite number, got inf",
            lambda: open_clip.DistillClipLoss()(*[TOKENS[0]] * 2, 1.0, *[TOKENS[0]] * 2, math.inf),
        ),
        (
            r"logit_scale must be one number, got a tensor of the shape \(2,\)",
            lambda: open_clip.DistillClipLoss()(*[TOKENS[0]] * 2, torch.ones(2), *[TOKENS[0]] * 2, 1.0),
        ),
        ("use_horovod must be False, got True", lambda: open_clip.DistillClipLoss(use_horovod=True)),
        (r"feat_S must be maps", lambda: cirkd.CriterionMiniBatchCrossImagePair(1.0)(TOKENS, MAPS)),
    ],
)
def test_bad_input(match, call):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    "page", sorted((Path(__file__).parents[2] / "docs" / "compat").glob("*.md")), ids=lambda p: p.stem
)
def test_pages(page):
    text = page.read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, {})
    (line,) = re.findall(r"^\+from icsd.*", text, re.MULTILINE)  # of the diff
    assert line[1:] in example


def test_the_page_of_patch_tokens():
    text = (Path(__file__).parents[2] / "docs" / "patch-tokens.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(example, namespace := {})
    assert namespace["loss"].isfinite()

import pytest
import torch

import icsd
from icsd.errors import InputError
from icsd.losses import make_loss
from icsd.models import InterstageDistillation, SideDistillationConfig, similarity_matrices


def stages(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    shapes = [(4, 3, 8, 8), (4, 3, 16, 16), (4, 5, 4, 4)]
    return [torch.randn(shape).to(memory_format=memory_format).requires_grad_() for shape in shapes]


def test_refined_stage_teaches_and_gets_no_gradient():
    coarse, middle, refined = stages()
    InterstageDistillation(SideDistillationConfig())([coarse, middle, refined]).backward()
    assert coarse.grad.abs().sum() > 0
    assert middle.grad.abs().sum() > 0
    assert refined.grad is None


def test_coarse_stage_teaches_when_asked():
    coarse, middle, refined = stages()
    InterstageDistillation(SideDistillationConfig(direction="coarse-to-refined"))([coarse, middle, refined]).backward()
    assert coarse.grad is None
    assert refined.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("loss", "parameters"), [("mse", {}), ("kl", {"student_temperature": 0.5}), ("smooth_l1", {"beta": 0.2})]
)
def test_is_the_weighted_public_function(loss, parameters):
    maps = stages()
    value = InterstageDistillation(SideDistillationConfig(loss=loss, parameters=parameters, stage_weights=[0.5, 2.0]))(
        maps
    )
    flat = [stage.flatten(1) for stage in maps]
    torch.testing.assert_close(
        value, icsd.interstage_distillation_loss(flat, make_loss(loss, **parameters), weights=[0.5, 2.0])
    )


def test_memory_format_does_not_matter():
    block = InterstageDistillation(SideDistillationConfig())
    torch.testing.assert_close(block(stages()), block(stages(torch.channels_last)))


def test_similarity_matrices_are_cosines():
    maps = stages()
    for matrix, stage in zip(similarity_matrices(maps), maps, strict=True):
        expected = torch.nn.functional.cosine_similarity(stage.flatten(1)[:, None], stage.flatten(1)[None], dim=-1)
        torch.testing.assert_close(matrix, expected.detach())
        assert not matrix.requires_grad


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kl", "parameters": {"student_temperature": -1.0}},
        {"parameters": {"beta": 1.0}},
        {"loss": "cosine"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match="distillation"):
        SideDistillationConfig(**options)

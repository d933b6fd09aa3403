import pytest
import torch

import icsd
from icsd.errors import InputError
from icsd.losses import make_loss
from icsd.models import (
    GeneratorDistillationConfig,
    InterstageDistillation,
    SideDistillationConfig,
    similarity_matrices,
)


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


def test_a_queue_takes_maps_of_any_memory_format():
    same, changing = (InterstageDistillation(SideDistillationConfig(queue=8)) for _ in range(2))
    for block, memory_format in ((same, torch.contiguous_format), (changing, torch.channels_last)):
        block(stages(memory_format))
    torch.testing.assert_close(same(stages()), changing(stages()))


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
        {"queue": -1},
        {"loss": "cka", "queue": 4},
        {"loss": "kl", "parameters": {"include_diagonal": False}, "queue": 4},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(InputError, match="distillation"):
        SideDistillationConfig(**options)


def test_real_images_have_no_hidden_maps():
    with pytest.raises(InputError, match=r"set distillation\.generator\.source to discriminator or rgb"):
        GeneratorDistillationConfig(teacher="real", source="hidden")


@pytest.mark.parametrize("direction", ["refined-to-coarse", "coarse-to-refined"])
def test_a_teacher_takes_the_place_of_the_stage_that_teaches(direction):
    maps, other = stages(), torch.randn(4, 7, 2, 2)
    value = InterstageDistillation(SideDistillationConfig(direction=direction))(maps, other)
    flat = [stage.flatten(1) for stage in maps]
    flat[-1 if direction == "refined-to-coarse" else 0] = other.flatten(1)
    teacher = -1 if direction == "refined-to-coarse" else 0
    torch.testing.assert_close(value, icsd.interstage_distillation_loss(flat, teacher=teacher))


def test_centered_features_are_compared_when_asked():
    maps = stages()
    value = InterstageDistillation(SideDistillationConfig(center=True))(maps)
    flat = [(stage - stage.mean(0)).flatten(1) for stage in maps]
    torch.testing.assert_close(value, icsd.interstage_distillation_loss(flat))


@pytest.mark.parametrize("size", [1, 3, 6, 100])
@pytest.mark.parametrize("direction", ["refined-to-coarse", "coarse-to-refined"])
def test_samples_are_compared_with_those_of_the_queue(size, direction):
    block = InterstageDistillation(
        SideDistillationConfig(loss="kl", queue=size, direction=direction, stage_weights=[0.5, 2.0])
    )
    seen = [[], [], []]
    for step in range(4):
        torch.manual_seed(step)
        flat = [torch.randn(3, dim, dtype=torch.float64, requires_grad=True) for dim in (5, 7, 4)]
        value = block([stage[:, :, None, None] for stage in flat])
        banks = [torch.cat([*old, stage.detach()]) for stage, old in zip(flat, seen, strict=True)]
        teacher = 2 if direction == "refined-to-coarse" else 0
        students = [index for index in range(3) if index != teacher]
        expected = 0
        for weight, student in zip((0.5, 2.0), students, strict=True):
            s, t = (
                torch.nn.functional.cosine_similarity(flat[index][:, None], banks[index][None], dim=-1)
                for index in (student, teacher)
            )
            p, q = (s / 0.1).log_softmax(1), (t / 0.1).softmax(1)
            expected = expected + weight * (q * (q.log() - p)).sum(1).mean()
        torch.testing.assert_close(value, expected.detach(), check_dtype=False)
        value.backward()
        assert flat[teacher].grad is None
        assert all(flat[index].grad.abs().sum() > 0 for index in students)
        seen = [[bank[-size:]] for bank in banks]  # the newest ones

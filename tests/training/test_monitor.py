import pytest
import torch

from icsd.training.monitor import ALIKE, NO_CONTEST, NO_CONTEST_LINES, TrainingMonitor, diversity


def losses(coarse, fine):
    return {"discriminator/adversarial/8": coarse, "discriminator/adversarial/16": fine, "generator/8": 0.0}


def test_a_discriminator_that_has_long_won_is_named_once():
    monitor = TrainingMonitor([8, 16])
    warnings = [monitor.losses(losses(NO_CONTEST / 2, 1.0)) for _ in range(2 * NO_CONTEST_LINES)]
    (index,) = [index for index, one in enumerate(warnings) if one]
    assert index == NO_CONTEST_LINES - 1
    assert "8 pixels" in warnings[index][0]
    assert "optimizer.discriminator_lr" in warnings[index][0]


def test_a_contest_in_between_starts_the_count_again():
    monitor = TrainingMonitor([8, 16])
    for _ in range(3):
        for _ in range(NO_CONTEST_LINES - 1):
            assert monitor.losses(losses(1.0, 0.0)) == []
        assert monitor.losses(losses(1.0, 1.0)) == []


def test_images_that_look_alike_are_told_of_again_after_a_recovery():
    monitor = TrainingMonitor([8])
    told = [bool(monitor.diversity(share)) for share in (1.0, ALIKE / 2, ALIKE / 3, 0.5, ALIKE / 2)]
    assert told == [False, True, False, False, True]


def test_diversity_is_that_between_images_not_within():
    pattern = torch.rand(1, 3, 8, 8)
    assert diversity(pattern.expand(5, -1, -1, -1)) == pytest.approx(0, abs=1e-6)
    shades = torch.tensor([-1.0, 1.0])[:, None, None, None] * torch.ones(2, 3, 8, 8)
    assert diversity(shades) == pytest.approx(1)

import pytest
import torch

from icsd.training.monitor import (
    ALIKE,
    NO_CONTEST,
    NO_CONTEST_LINES,
    SMALL_SHARE,
    SMALL_SHARE_LINES,
    TrainingMonitor,
    diversity,
)


def losses(coarse, fine):
    return {"discriminator/adversarial/8": coarse, "discriminator/adversarial/16": fine, "generator/8": 0.0}


def test_a_discriminator_that_has_long_won_is_named_once():
    monitor = TrainingMonitor([8, 16], 0.9)
    warnings = [monitor.line(losses(NO_CONTEST / 2, 1.0)) for _ in range(2 * NO_CONTEST_LINES)]
    (index,) = [index for index, one in enumerate(warnings) if one]
    assert index == NO_CONTEST_LINES - 1
    assert "8 pixels" in warnings[index][0]
    assert "optimizer.discriminator_lr" in warnings[index][0]


def test_a_contest_in_between_starts_the_count_again():
    monitor = TrainingMonitor([8, 16], 0.9)
    for _ in range(3):
        for _ in range(NO_CONTEST_LINES - 1):
            assert monitor.line(losses(1.0, 0.0)) == []
        assert monitor.line(losses(1.0, 1.0)) == []


def test_a_loss_with_a_small_share_of_the_gradient_is_named_once_for_each_network():
    monitor = TrainingMonitor([8], 0.9)
    line = {"share/generator/distillation": SMALL_SHARE / 2, "share/discriminator/8/r1": SMALL_SHARE * 2}
    warnings = [monitor.line(line) for _ in range(2 * SMALL_SHARE_LINES)]
    (index,) = [index for index, one in enumerate(warnings) if one]
    assert index == SMALL_SHARE_LINES - 1
    assert warnings[index][0].startswith("distillation has had less than 1% of the gradient")
    assert "of generator" in warnings[index][0]


@pytest.mark.parametrize("loss", ["r1", "adversarial/16"])
def test_a_small_share_names_the_discriminator_with_its_resolution(loss):
    monitor = TrainingMonitor([8, 16], 0.9)
    lines = [monitor.line({f"share/discriminator/16/{loss}": SMALL_SHARE / 2}) for _ in range(SMALL_SHARE_LINES)]
    (warning,) = lines[-1]
    assert warning.startswith(f"{loss} has had less than 1% of the gradient of the other losses of discriminator/16 ")


def test_a_larger_share_in_between_starts_the_count_again():
    monitor = TrainingMonitor([8], 0.9)
    for share in ([SMALL_SHARE / 2] * (SMALL_SHARE_LINES - 1) + [SMALL_SHARE]) * 2:
        assert monitor.line({"share/discriminator/8/adversarial/8": share}) == []


def test_images_that_look_alike_give_a_warning_again_after_a_recovery():
    monitor = TrainingMonitor([8], 0.9)
    warned = [bool(monitor.diversity(100, share)) for share in (1.0, ALIKE / 2, ALIKE / 3, 0.5, ALIKE / 2)]
    assert warned == [False, True, False, False, True]


@pytest.mark.parametrize(("decay", "moved"), [(0.0, 1), (0.9, 22), (0.99, 230), (0.999, 2302)])
def test_images_alike_count_once_the_moving_average_has_moved(decay, moved):
    for first in (1, moved // 2, moved - 1):
        assert TrainingMonitor([8], decay).diversity(first, 0.0) == [] or first == moved
    monitor = TrainingMonitor([8], decay)
    assert [bool(monitor.diversity(step, 0.0)) for step in (moved, moved + 1)] == [True, False]


def test_diversity_is_that_between_images_not_within():
    pattern = torch.rand(1, 3, 8, 8)
    assert diversity(pattern.expand(5, -1, -1, -1)) == pytest.approx(0, abs=1e-6)
    shades = torch.tensor([-1.0, 1.0])[:, None, None, None] * torch.ones(2, 3, 8, 8)
    assert diversity(shades) == pytest.approx(1)

import itertools

import inputs
import pytest
import torch

from icsd.errors import InputError
from icsd.evaluation import distances
from icsd.evaluation.distances import frechet_distance, inception_score, kernel_distance, precision_and_recall


def normal(count, dim, mean=0.0, seed=0):
    return inputs.normal(count, dim, seed=seed) + mean


def test_kernel_distance_is_the_unbiased_estimate_of_its_definition(monkeypatch):
    x, y = normal(7, 5).double(), normal(4, 5, 0.3, 1).double()

    def kernel(a, b):
        return float((a @ b / 5 + 1) ** 3)

    expected = (
        sum(kernel(a, b) for a, b in itertools.permutations(x, 2)) / (7 * 6)
        + sum(kernel(a, b) for a, b in itertools.permutations(y, 2)) / (4 * 3)
        - 2 * sum(kernel(a, b) for a, b in itertools.product(x, y)) / (7 * 4)
    )
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(distances, "ROW_BLOCK", 3)
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_samples_of_one_distribution_is_zero_within_its_error():
    values = [kernel_distance(normal(300, 8, seed=k), normal(250, 8, seed=k + 50)) for k in range(8)]
    assert all(abs(each.value) < 4 * each.error for each in values)
    shifted = kernel_distance(normal(300, 8), normal(250, 8, 0.5, 1))
    assert shifted.value > 5 * shifted.error


@pytest.mark.parametrize("counts", [(200, 200), (40, 300), (300, 40)])
def test_the_error_of_a_kernel_distance_is_its_spread_over_fresh_draws(counts):
    draws = ((normal(counts[0], 6, seed=2 * k), normal(counts[1], 6, 0.5, 2 * k + 1)) for k in range(200))
    values = [kernel_distance(*pair) for pair in draws]
    spread = torch.tensor([each.value for each in values]).std().item()
    typical = torch.tensor([each.error for each in values]).square().mean().sqrt().item()
    assert 0.85 < typical / spread < 1.15


@pytest.mark.parametrize("counts", [(1, 5), (5, 0)])
def test_a_kernel_distance_needs_two_images_of_each_set(counts):
    with pytest.raises(InputError, match=f"needs two images of each set, got {counts[0]} and {counts[1]}"):
        kernel_distance(*(torch.ones(count, 3) for count in counts))


def test_a_singular_covariance_is_refused_and_the_kernel_distance_named():
    with pytest.raises(InputError, match=r"8 generated images have a singular covariance.*use the kernel distance"):
        frechet_distance(normal(20, 8), normal(8, 8))


def test_frechet_distance_of_known_gaussians(fidelity):
    shift = frechet_distance(normal(20000, 3), normal(20000, 3, 2.0, 1)).value
    assert shift == pytest.approx(3 * 2.0**2, rel=0.03)
    scale = frechet_distance(normal(20000, 3), 3 * normal(20000, 3, seed=1)).value
    assert scale == pytest.approx(3 * (3 - 1) ** 2, rel=0.03)


def test_precision_and_recall_of_identical_and_of_disjoint_sets(fidelity):
    x = normal(50, 4)
    assert [each.value for each in precision_and_recall(x, x).values()] == [1, 1]
    assert [each.value for each in precision_and_recall(x, x + 100).values()] == [0, 0]


def test_inception_score_of_certain_and_of_uncertain_classes(fidelity):
    certain = 50 * torch.eye(10).repeat(20, 1)
    assert inception_score(certain, splits=2).value == pytest.approx(10, rel=0.05)
    assert inception_score(torch.zeros(20, 10), splits=2).value == pytest.approx(1)


def test_our_kernel_distance_is_that_of_torch_fidelity(fidelity):
    from torch_fidelity.metric_kid import kernel_mmd

    x, y = normal(60, 9).double(), normal(60, 9, 0.2, 1).double()
    options = {
        "kid_kernel": "poly",
        "kid_kernel_poly_degree": 3,
        "kid_kernel_poly_gamma": None,
        "kid_kernel_poly_coef0": 1,
    }
    assert kernel_distance(x, y).value == pytest.approx(kernel_mmd(x.numpy(), y.numpy(), **options), rel=1e-9)

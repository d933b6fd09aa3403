"""Distances between the features of real and of generated images.

The kernel distance is implemented here, since it needs no further library. The Fréchet distance, precision and recall,
and the inception score come from torch-fidelity, which needs torchvision: `pip install -e ".[fidelity]"`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from icsd.errors import InputError

ROW_BLOCK = 1024


@dataclass(frozen=True)
class Estimate:
    """A value and its uncertainty.

    Attributes:
        value: The estimate.
        error: The standard error over subsets of the images, or None where it is not estimated.
    """

    value: float
    error: float | None = None


def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Estimate:
    """Return the unbiased squared maximum mean discrepancy with the kernel (<x, y> / D + 1)³.

    Binkowski et al., "Demystifying MMD GANs", ICLR 2018. With features of Inception-v3 it is the kernel inception
    distance (KID). The value uses all images; the error is the standard deviation over random subsets, divided by
    the square root of the number of disjoint subsets that the smaller set holds. Values slightly below 0 are possible.

    Args:
        real: Features `(P, D)` of real images, P >= 2.
        generated: Features `(Q, D)` of generated images, Q >= 2.
        subsets: Number of random subsets for the error.
        subset_size: Images of each subset; at most half of the smaller set.
        seed: Seed of the subsets.

    Returns:
        The distance and its standard error.

    Raises:
        InputError: A set holds fewer than two images.
    """
    real, generated = real.double(), generated.double()
    fewest = min(len(real), len(generated))
    if fewest < 2:
        raise InputError(f"a kernel distance needs two images of each set, got {len(real)} and {len(generated)}")
    size = max(2, min(subset_size, fewest // 2))
    generator = torch.Generator().manual_seed(seed)
    values = torch.stack(
        [
            _unbiased_discrepancy(*(_subset(features, size, generator) for features in (real, generated)))
            for _ in range(subsets)
        ]
    )
    error = values.std().item() / (fewest / size) ** 0.5
    return Estimate(_unbiased_discrepancy(real, generated).item(), error)


def _subset(features: Tensor, size: int, generator: torch.Generator) -> Tensor:
    return features[torch.randperm(len(features), generator=generator)[:size]]


def _unbiased_discrepancy(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate of the squared discrepancy of two sets of at least two samples."""
    within = [(_kernel_sum(each, each) - _kernel(each, each).sum()) / (len(each) * (len(each) - 1)) for each in (x, y)]
    return sum(within) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return the kernel of each row of `x` with the same row of `y`."""
    return ((x * y).sum(1) / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the kernel over all pairs, by blocks of rows: 30,000 x 30,000 values need too much memory."""
    return torch.stack([((rows @ y.T / x.shape[1] + 1) ** 3).sum() for rows in x.split(ROW_BLOCK)]).sum()


def frechet_distance(real: Tensor, generated: Tensor) -> Estimate:
    """Return the Fréchet distance of two Gaussians fitted to the features (Heusel et al., NeurIPS 2017).

    Args:
        real: Features `(P, D)` of real images, P > D.
        generated: Features `(Q, D)` of generated images, Q > D.

    Raises:
        InputError: A set has too few images for a regular covariance matrix, or torch-fidelity is missing.
    """
    dim = real.shape[1]
    for name, features in (("real", real), ("generated", generated)):
        if len(features) <= dim:
            raise InputError(
                f"{len(features)} {name} images have a singular covariance of {dim} features: give more than {dim} "
                "images, or use the kernel distance, which is unbiased for any number"
            )
    metric = _torch_fidelity("metric_fid")
    statistics = [metric.fid_features_to_statistics(features.double()) for features in (generated, real)]
    return Estimate(metric.fid_statistics_to_metric(*statistics, verbose=False)[metric.KEY_METRIC_FID])


def precision_and_recall(real: Tensor, generated: Tensor, neighborhood: int = 3) -> dict[str, Estimate]:
    """Return precision and recall by nearest neighbors (Kynkäänniemi et al., NeurIPS 2019).

    Args:
        real: Features `(P, D)` of real images, P > `neighborhood`.
        generated: Features `(Q, D)` of generated images, Q > `neighborhood`.
        neighborhood: The neighbor whose distance is the radius of a sample.

    Raises:
        InputError: A set has too few images, or torch-fidelity is missing.
    """
    if min(len(real), len(generated)) <= neighborhood:
        raise InputError(f"precision and recall need more than {neighborhood} images of each set")
    metric = _torch_fidelity("metric_prc")
    options = {"prc_neighborhood": neighborhood, "prc_batch_size": 10000, "save_cpu_ram": True, "verbose": False}
    values = metric.prc_features_to_metric(generated.float(), real.float(), **options)
    return {name: Estimate(values[name]) for name in (metric.KEY_METRIC_PRECISION, metric.KEY_METRIC_RECALL)}


def inception_score(logits: Tensor, splits: int = 10) -> Estimate:
    """Return the inception score (Salimans et al., NeurIPS 2016) and its standard deviation over the splits.

    Args:
        logits: Class logits `(Q, C)` of generated images, Q >= `splits`.
        splits: Number of equal splits.

    Raises:
        InputError: There are fewer images than splits, or torch-fidelity is missing.
    """
    if len(logits) < splits:
        raise InputError(f"an inception score over {splits} splits needs as many images, got {len(logits)}")
    metric = _torch_fidelity("metric_isc")
    values = metric.isc_features_to_metric(logits, splits)
    return Estimate(values[metric.KEY_METRIC_ISC_MEAN], values[metric.KEY_METRIC_ISC_STD])


def _torch_fidelity(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside another build of torch
        raise InputError(
            f'torch-fidelity cannot be imported ({error}): run pip install -e ".[fidelity]" in the checkout, '
            "beside a torch that torchvision supports"
        ) from error

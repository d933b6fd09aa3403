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
        error: The standard error, or None where it is not estimated.
    """

    value: float
    error: float | None = None


def kernel_distance(real: Tensor, generated: Tensor) -> Estimate:
    """Return the unbiased squared maximum mean discrepancy with the kernel (<x, y> / D + 1)³.

    Binkowski et al., "Demystifying MMD GANs", ICLR 2018. With features of Inception-v3 it is the kernel inception
    distance (KID). Values slightly below 0 are possible. The error is the standard deviation over fresh draws of both
    sets, to first order: the estimate is the sum of two means, and each image moves it by twice its own term.

    Args:
        real: Features `(P, D)` of real images, P >= 2.
        generated: Features `(Q, D)` of generated images, Q >= 2.

    Returns:
        The distance and its standard error, to first order in the sizes of the sets. Where the sets hardly differ, it
        is up to 1.5 times too large.

    Raises:
        InputError: A set holds fewer than two images.
    """
    x, y = real.double(), generated.double()
    if min(len(x), len(y)) < 2:
        raise InputError(f"a kernel distance needs two images of each set, got {len(x)} and {len(y)}")
    across_x, across_y = _kernel_sums(x, y)
    terms = [_mean_kernel_of_others(x) - across_x / len(y), _mean_kernel_of_others(y) - across_y / len(x)]
    error = 2 * sum(each.var() / len(each) for each in terms).sqrt()
    return Estimate(sum(each.mean() for each in terms).item(), error.item())


def _mean_kernel_of_others(x: Tensor) -> Tensor:
    """Return the mean kernel of each row with the other rows."""
    own = (x.square().sum(1) / x.shape[1] + 1) ** 3
    return (_kernel_sums(x, x)[0] - own) / (len(x) - 1)


def _kernel_sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of the kernel over `y` for each row of `x`, and over `x` for each row of `y`.

    They are summed by blocks of rows: 30,000 x 30,000 values need too much memory.
    """
    over_y, over_x = [], torch.zeros_like(y[:, 0])
    for rows in x.split(ROW_BLOCK):
        kernel = (rows @ y.T / x.shape[1] + 1) ** 3
        over_y.append(kernel.sum(1))
        over_x += kernel.sum(0)
    return torch.cat(over_y), over_x


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
    """Return the inception score (Salimans et al., NeurIPS 2016), a mean over splits, and its standard error.

    Args:
        logits: Class logits `(Q, C)` of generated images, Q >= `splits`.
        splits: Number of equal splits, at least 2.

    Raises:
        InputError: There are fewer images than splits, or torch-fidelity is missing.
    """
    if len(logits) < splits:
        raise InputError(f"an inception score over {splits} splits needs as many images, got {len(logits)}")
    metric = _torch_fidelity("metric_isc")
    values = metric.isc_features_to_metric(logits, splits)
    return Estimate(values[metric.KEY_METRIC_ISC_MEAN], values[metric.KEY_METRIC_ISC_STD] / (splits - 1) ** 0.5)


def is_fidelity_available() -> bool:
    """Return whether torch-fidelity can be imported, without which most distances are left out."""
    try:
        _torch_fidelity("metric_fid")
    except InputError:
        return False
    return True


def _torch_fidelity(module: str) -> ModuleType:
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside another build of torch
        raise InputError(
            f'torch-fidelity cannot be imported ({error}): run pip install -e ".[fidelity]" in the checkout, '
            "beside a torch that torchvision supports"
        ) from error

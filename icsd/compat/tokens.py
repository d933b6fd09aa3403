"""Checks of patch tokens and feature maps, and the layout that the operator takes."""

from __future__ import annotations

from torch import Tensor

# `torch.nn.functional.normalize` divides by this norm where the norm of a sample is less.
NORMALIZE_EPS = 1e-12


def check_tokens(name: str, tokens: Tensor, dims: tuple[int, ...] = (3,)) -> None:
    """Raise a ValueError unless these are patch tokens `(B, N, D)`, or have another number of dimensions in `dims`."""
    if tokens.dim() in dims:
        return
    shape = tuple(tokens.shape)
    expected = " or ".join({2: "(N, D)", 3: "(B, N, D)"}[dim] for dim in dims)
    if tokens.dim() == 4:
        raise ValueError(
            f"{name} must be patch tokens {expected}, got maps (B, C, H, W) of the shape {shape}: give "
            f"{name}.flatten(2).mT, the H * W positions as tokens of C features"
        )
    raise ValueError(f"{name} must be patch tokens {expected}, got the shape {shape}")


def tokens_of_maps(name: str, maps: Tensor) -> Tensor:
    """Return the positions of maps `(B, C, H, W)` as tokens `(B, H * W, C)`.

    Raises:
        ValueError: `maps` has another number of dimensions.
    """
    if maps.dim() != 4:
        remedy = (
            f": give {name}.mT.unflatten(2, (H, W)) of patch tokens (B, H * W, C) without class and register tokens"
            if maps.dim() == 3
            else ""
        )
        raise ValueError(f"{name} must be maps (B, C, H, W), got the shape {tuple(maps.shape)}{remedy}")
    return maps.flatten(2).mT

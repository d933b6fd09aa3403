"""Inputs that several tests share."""

import numpy as np
import torch


def normal(*shape, seed=0, dtype=torch.float32):
    """Return numbers of a normal distribution, the same on every machine.

    `torch.randn` returns other numbers where PyTorch uses other vector instructions.
    """
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)

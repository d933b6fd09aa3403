"""Peak memory."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Return the most memory held so far, in bytes: by this process on the CPU, by PyTorch's tensors on a GPU.

    Args:
        device: Which memory.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

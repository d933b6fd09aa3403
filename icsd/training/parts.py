"""Names of the parts of a training step, for `icsd profile`."""

from torch.profiler import record_function

MARK = "icsd: "
"""Beginning of the name of a part in the events of PyTorch's profiler."""

DATA, OPTIMIZERS, REST = "data", "optimizers", "losses and the rest"


def part(name: str) -> record_function:
    """Return a context manager or decorator that gives what happens in it to a part; the innermost part counts."""
    return record_function(MARK + name)

"""A record of the memory that interpreted kernels access."""

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpreterBuilder

from icsd.ops.triton import runtime


class Trace:
    """The memory accesses of every program of every launch.

    Attributes:
        loads: `(launch, program, addresses, bytes of an element)` of the elements that the masks allow.
        stores: The same for stores.
        kernels: The name of the kernel of every launch.
        given: The address ranges of the tensors that every launch was given.
    """

    def __init__(self):
        self.loads, self.stores, self.kernels, self.given = [], [], [], []

    def bytes(self, accesses, tensor):
        """Return how many bytes of a tensor were accessed."""
        begin, end = extent(tensor)
        return sum(int(((at >= begin) & (at < end)).sum()) * size for _, _, at, size in accesses)

    def check(self):
        """Assert that no access is out of bounds, and no program accesses what another one of its launch writes."""
        for launched, _, at, _ in self.loads + self.stores:
            inside = np.zeros(at.shape, bool)
            for begin, end in self.given[launched]:
                inside |= (at >= begin) & (at < end)
            assert inside.all()
        for launched in range(len(self.given)):
            stored, writers = programs(self.stores, launched)
            stored, first = np.unique(stored, return_index=True)
            for accesses in (self.stores, self.loads):
                at, by = programs(accesses, launched)
                if stored.size:
                    found = np.searchsorted(stored, at).clip(max=stored.size - 1)
                    assert ((stored[found] != at) | (writers[first][found] == by)).all()


def programs(accesses, launched):
    """Return the addresses that a launch accessed, and the programs that did so."""
    of_launch = [(at, program) for number, program, at, _ in accesses if number == launched]
    at = [at.ravel() for at, _ in of_launch]
    by = [np.full(at.size, x + (y << 40)) for at, (x, y, _) in of_launch]
    return np.concatenate([*at, np.empty(0, np.uint64)]), np.concatenate([*by, np.empty(0, np.int64)])


def extent(tensor):
    """Return the addresses of the first byte of a tensor and behind its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def record(monkeypatch):
    """Return a trace of all accesses from now on. New memory is filled with NaN and has NaN around it."""
    found = Trace()

    def watch(name, accesses, mask_position):
        original = getattr(InterpreterBuilder, name)

        def access(self, pointers, *arguments):
            at = pointers.data[np.broadcast_to(arguments[mask_position].data, pointers.data.shape)]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            accesses.append((len(found.given) - 1, tuple(self.grid_idx), at, size))
            return original(self, pointers, *arguments)

        monkeypatch.setattr(InterpreterBuilder, name, access)

    watch("create_masked_load", found.loads, 0)
    watch("create_masked_store", found.stores, 1)

    def new_empty(self, *shape, dtype=None, device=None):
        shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
        dtype = dtype or self.dtype
        nothing = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min
        return torch.full((shape.numel() + 64,), nothing, dtype=dtype)[32:-32].view(shape)

    def launched(kernel, out, grid, *arguments, **constants):
        found.kernels.append(getattr(kernel, "base_fn", kernel.fn).__name__)
        found.given.append([extent(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)])
        original(kernel, out, grid, *arguments, **constants)

    original = runtime.launch
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(runtime, "launch", launched)
    return found

"""CUDA calls take stream and workspace from the exchange table of their tensors' type: one of each for a call."""

import ctypes
import platform
from collections import Counter

import pytest
import torch
from emulated import EmulatedBackend

from icsd import _native as native

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is written for x86-64")

CAPSULE = b"dlpack_exchange_api"


class Table(ctypes.Structure):
    """DLPackExchangeAPI."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("prev_api", ctypes.c_void_p),
        ("managed_tensor_allocator", ctypes.c_void_p),
        ("managed_tensor_from_py_object_no_sync", ctypes.c_void_p),
        ("managed_tensor_to_py_object_no_sync", ctypes.c_void_p),
        ("dltensor_from_py_object_no_sync", ctypes.c_void_p),
        ("current_work_stream", ctypes.c_void_p),
    ]


class Prototype(ctypes.Structure):
    """The first fields of DLTensor, as the allocator gets it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    ]


class Managed(ctypes.Structure):
    """The first fields of DLManagedTensorVersioned."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


ALLOCATE = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.POINTER(Managed)), ctypes.c_void_p, ctypes.c_void_p
)
STREAM = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p)
DELETE = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
SET_ERROR = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p)


def pytorch_table():
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return Table.from_address(get(torch.Tensor.__dlpack_c_exchange_api__, CAPSULE))


def tensor_type(table):
    """A type of tensors with another exchange table."""
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    capsule = make(ctypes.addressof(table), CAPSULE, None)
    return type("Tensor", (torch.Tensor,), {"__dlpack_c_exchange_api__": capsule, "table": table})


class Counted:
    """PyTorch's exchange table, which counts the calls that matter; `fails` makes its allocator fail.

    `bytes` are those of all workspaces.
    """

    def __init__(self):
        self.calls = Counter()
        self.bytes = 0
        self.fails = False
        self.table = Table.from_buffer_copy(pytorch_table())
        allocate = ALLOCATE(self.table.managed_tensor_allocator)
        stream = STREAM(self.table.current_work_stream)
        delete = None

        def count_allocate(prototype, out, context, set_error):
            nonlocal delete
            self.calls["allocate"] += 1
            self.bytes += Prototype.from_address(prototype).shape[0]
            if self.fails:
                SET_ERROR(set_error)(context, b"MemoryError", b"no memory is left")
                return -1
            status = allocate(prototype, out, context, set_error)
            delete = DELETE(out.contents.contents.deleter)
            out.contents.contents.deleter = ctypes.cast(self.functions[2], ctypes.c_void_p).value
            return status

        def count_stream(*arguments):
            self.calls["stream"] += 1
            return stream(*arguments)

        def count_delete(managed):
            self.calls["delete"] += 1
            delete(managed)

        self.functions = ALLOCATE(count_allocate), STREAM(count_stream), DELETE(count_delete)
        self.table.managed_tensor_allocator, self.table.current_work_stream = (
            ctypes.cast(function, ctypes.c_void_p).value for function in self.functions[:2]
        )
        self.type = tensor_type(self.table)


@pytest.fixture
def counted():
    return Counted()


@pytest.fixture(scope="module")
def cuda():
    return EmulatedBackend().kernels


@pytest.mark.parametrize("regime", ["sample", "feature", "streamed"])
def test_one_stream_and_at_most_one_workspace_for_each_call(regime, counted, cuda):
    inputs = [torch.randn(9, width).as_subclass(counted.type) for width in (20, 30)]
    spec = native.Spec("mse", [0.0, 1.0], [1.0], 1e-8, True, regime)
    loss, saved = cuda.distill(inputs, spec, True)
    assert counted.calls == {"stream": 1, "allocate": 1, "delete": 1}
    counted.calls.clear()
    grads = cuda.distill_backward(torch.ones(()), saved, inputs, [True, True], spec)
    workspaces = 0 if regime == "sample" else 1
    assert counted.calls == Counter(stream=1, allocate=workspaces, delete=workspaces)
    assert all(result.isfinite().all() for result in (loss, saved, *grads))


@pytest.mark.parametrize("loss", [("mse", [0.0, 1.0]), ("kl", [0.1, 0.1, 1.0])], ids=str)
def test_banks_take_one_workspace_that_holds_no_matrix(loss, counted, cuda):
    n, m = 64, 2048
    inputs = [torch.randn(count, 3).as_subclass(counted.type) for count in (n, n, m, m)]
    spec = native.Spec(*loss, [1.0], 1e-8, False, "streamed")
    value, grads = cuda.distill_to_banks(inputs, [True, False, True, False], spec)
    assert counted.calls == {"stream": 1, "allocate": 1, "delete": 1}
    assert counted.bytes <= n * m * 4 / 4
    assert all(result.isfinite().all() for result in (value, *grads[::2]))
    assert grads[1] is grads[3] is None


def test_a_failed_allocation_is_an_error(counted, cuda):
    counted.fails = True
    with pytest.raises(RuntimeError, match="no memory is left"):
        cuda.gram(torch.randn(9, 20).as_subclass(counted.type))
    assert counted.calls == {"stream": 1, "allocate": 1}


def test_tables_of_later_versions(cuda):
    table = Table.from_buffer_copy(pytorch_table())
    table.major = 2
    x = torch.randn(9, 20)
    with pytest.raises(TypeError, match="Tensor"):
        cuda.gram(x.as_subclass(tensor_type(table)))
    table.prev_api = ctypes.addressof(pytorch_table())
    gram = cuda.gram(x.as_subclass(tensor_type(table)))
    torch.testing.assert_close(gram.as_subclass(torch.Tensor), x @ x.mT)

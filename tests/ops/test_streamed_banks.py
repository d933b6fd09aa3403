"""Losses of similarities to banks, piece by piece, against the same from whole matrices."""

import itertools

import pytest
import torch
from conformance.banks import *  # noqa: F403
from conformance.banks import LOSSES, features, from_whole_matrices, loss_of, value_and_gradients
from inputs import normal
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from icsd.compat.open_clip import DistillClipLoss
from icsd.ops import banks, registry
from icsd.ops.reference import ReferenceBackend


@pytest.fixture
def few_columns(monkeypatch):
    """Let pieces have three columns, so that the last one of eleven has two."""
    monkeypatch.setattr(banks, "_columns", lambda _: 3)


@pytest.fixture
def backend(few_columns):
    """The name of the backend under test. All without kernels for banks have the same pieces."""
    return "cpu"


@pytest.mark.usefixtures("few_columns")
@pytest.mark.parametrize("groups", [(), (2, 2)], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_same_as_whole_matrices(loss, groups):
    tensors = features(*groups)
    for wanted in itertools.product([False, True], repeat=4):
        expected = from_whole_matrices(tensors, wanted, loss, 1.2)
        got = value_and_gradients(tensors, wanted, loss, reduction="none", eps=1.2)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


class BackendForBanks(ReferenceBackend):
    has_bank_kernels = True

    def __init__(self, name="for banks", bank_order=0):
        self.name, self.bank_order = name, bank_order


def test_a_backend_with_kernels_for_banks_is_preferred_on_a_gpu():
    on_gpu, on_cpu = ([torch.empty(2, 3, device=device)] * 4 for device in ("meta", "cpu"))
    first = banks.backend_for(None, on_gpu).name
    with registry.temporarily(BackendForBanks()):
        assert banks.backend_for(None, on_gpu).name == "for banks" != first
        assert banks.backend_for(first, on_gpu).name == first
        assert banks.backend_for(None, on_cpu).name != "for banks"
        with registry.use_backend("reference"):
            assert banks.backend_for(None, on_gpu).name == "reference"


def test_of_backends_with_kernels_for_banks_the_lowest_is_preferred():
    on_gpu = [torch.empty(2, 3, device="meta")] * 4
    with registry.temporarily(BackendForBanks("third", 3)), registry.temporarily(BackendForBanks("second", 2)):
        assert banks.backend_for(None, on_gpu).name == "second"
        assert banks.backend_for("third", on_gpu).name == "third"
    assert registry.get("triton").bank_order < registry.get("cuda").bank_order


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in made)])
        return result


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_no_matrix_of_the_whole_bank_is_made(loss, monkeypatch):
    monkeypatch.setitem(banks.PIECE, "cpu", 64 * 20)
    tensors = [normal(n, 8, seed=k) for k, n in enumerate((20, 20, 1000, 1000))]
    with Largest() as largest:
        value_and_gradients(tensors, (True, False, False, False), loss)
    assert largest.elements <= max(20 * 64, 1000 * 8)  # a piece of the matrix, or a bank


@pytest.mark.usefixtures("few_columns")
@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_nothing_is_differentiated_without_gradients(loss, monkeypatch):
    leaves = [x.requires_grad_() for x in features()]
    added = []
    monkeypatch.setattr(banks._Pass, "add", lambda _, piece, grads: added.extend(x for x in grads if x is not None))
    with torch.no_grad():
        loss_of(leaves, loss)
    assert not added


def test_no_matrix_of_images_and_texts_is_made(monkeypatch):
    monkeypatch.setitem(banks.PIECE, "cpu", 64 * 200)
    images, texts = (normal(200, 8, seed=k).requires_grad_() for k in range(2))
    scale = torch.tensor(9.0, requires_grad=True)
    with Largest() as largest:
        losses = DistillClipLoss()(images, texts, scale, images, texts, 9.0)
        torch.autograd.grad(sum(losses), (images, texts, scale))
    assert largest.elements <= 200 * 64

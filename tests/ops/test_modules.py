"""The operator as modules."""

import copy

import pytest
import torch
from torch import nn

import icsd


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, similarity, target):
        return (self.scale * similarity - target).square().mean((-2, -1))


@pytest.mark.parametrize("criterion", [icsd.SimilarityDistillationLoss, icsd.InterstageDistillationLoss])
def test_a_module_as_a_loss_is_a_submodule(criterion):
    module = criterion(Scaled())
    assert [name for name, _ in module.named_parameters()] == ["function.scale"]
    module.load_state_dict({"function.scale": torch.tensor(3.0)})
    other = copy.deepcopy(module).double()
    with torch.no_grad():
        other.function.scale.zero_()
    assert (module.loss.function.scale.item(), other.loss.function.scale.item()) == (3, 0)
    assert other.loss.function.scale.dtype == torch.float64

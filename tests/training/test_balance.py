import copy

import pytest
import torch
from torch import nn

from icsd.training.balance import MOST, BalancedLosses

SCALER = torch.amp.GradScaler("cpu", enabled=False)


class Networks(nn.Module):
    """Two networks; `two` sees what `one` returns, and a weight of `one` is used by no loss."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(3, 5, dtype=torch.float64)
        self.one.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.two = nn.Linear(5, 2, dtype=torch.float64)

    def losses(self, seed):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        hidden = self.one(x).tanh()
        return {"coarse": hidden.square().sum(), "fine": self.two(hidden).sum(), "apart": hidden[:, :2].exp().sum()}

    def balanced(self, shares):
        return BalancedLosses({name: list(getattr(self, name).parameters()) for name in ("one", "two")}, shares)


def gradient(networks, name, seeds):
    """Return the gradient of a loss by network, flat."""
    networks = copy.deepcopy(networks)
    sum(networks.losses(seed)[name] for seed in seeds).backward()
    return {
        key: torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in net.parameters()]
        )
        for key, net in networks.named_children()
    }


def result(networks):
    return {
        key: torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in net.parameters()]
        )
        for key, net in networks.named_children()
    }


@pytest.mark.parametrize("seeds", [[0], [0, 1, 2]])
@pytest.mark.parametrize("measure", [False, True])
def test_a_share_is_that_of_the_gradient_of_the_other_losses_over_all_micro_batches(seeds, measure):
    networks = Networks()
    losses = networks.balanced({"apart": 0.3})
    for seed in seeds:
        losses.backward(networks.losses(seed), SCALER, measure)
    losses.balance(0.5)
    own, coarse, fine = (gradient(networks, name, seeds) for name in ("apart", "coarse", "fine"))
    rest = coarse["one"] + fine["one"]
    weight = 0.15 * rest.norm() / own["one"].norm()
    torch.testing.assert_close(result(networks)["one"], rest + weight * own["one"])
    torch.testing.assert_close(result(networks)["two"], fine["two"])
    apart = sum(networks.losses(seed)["apart"] for seed in seeds).detach()
    torch.testing.assert_close(losses.take()["apart"], weight * apart)


def test_measured_shares_are_those_of_each_network_that_two_losses_reach():
    networks = Networks()
    losses = networks.balanced({"apart": 0.3})
    for seed in (0, 1):
        losses.backward(networks.losses(seed), SCALER, measure=True)
    losses.balance(1.0)
    shares = losses.measured()
    assert shares.keys() == {"one/coarse", "one/fine", "one/apart"}  # two/fine has nothing beside it
    torch.testing.assert_close(shares["one/apart"], torch.tensor(0.3, dtype=torch.float64))
    coarse, whole = gradient(networks, "coarse", (0, 1))["one"], result(networks)["one"]
    torch.testing.assert_close(shares["one/coarse"], coarse.norm() / (whole - coarse).norm())


def test_a_step_leaves_nothing_to_the_next():
    networks = Networks()
    losses = networks.balanced({"apart": 0.3})
    for _ in range(2):
        networks.zero_grad()
        losses.backward(networks.losses(1), SCALER, measure=True)
        losses.balance(1.0)
        first = result(networks), losses.take()
    networks.zero_grad()
    losses.backward(networks.losses(1), SCALER, measure=False)
    losses.balance(1.0)
    assert losses.measured() == {}
    torch.testing.assert_close((result(networks), losses.take()), first, rtol=0, atol=0)


def test_a_loss_without_gradient_gets_a_bounded_weight():
    networks = Networks()
    losses = networks.balanced({"apart": 0.3})
    terms = networks.losses(0)
    losses.backward({**terms, "apart": 0 * terms["apart"]}, SCALER, measure=False)
    losses.balance(1.0)
    assert all(value.isfinite().all() for value in result(networks).values())
    losses.take()
    losses.backward({"apart": 1e-30 * networks.losses(0)["apart"]}, SCALER, measure=False)
    before = result(networks)["one"]
    losses.balance(1.0)
    step = result(networks)["one"] - before
    assert step.norm() <= MOST * 1e-30 * gradient(networks, "apart", [0])["one"].norm() * (1 + 1e-9)


def test_overflow_stays_visible_to_a_gradient_scaler():
    networks = Networks()
    losses = networks.balanced({"apart": 0.3})
    terms = networks.losses(0)
    losses.backward({**terms, "fine": float("inf") * terms["fine"]}, SCALER, measure=False)
    losses.balance(1.0)
    assert not result(networks)["one"].isfinite().all()
    assert losses.take()["apart"].isfinite()

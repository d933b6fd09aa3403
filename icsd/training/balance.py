"""The backward passes of one side: how much each loss moves a network, and losses whose weights follow from that.

The share of a loss in the gradient of a network is the norm of its gradient divided by the norm of the gradient of all
other losses together. VQGAN (Esser et al. 2021) and VA-VAE (Yao et al. 2025) weight a loss by such a ratio at one
layer. Here it is that of all weights of a network, so that the share in the metrics is the one in the configuration.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn.utils import get_total_norm

MOST = 1e4
"""Largest weight that a share leads to."""


class BalancedLosses:
    """The losses of one side over the micro-batches of a step, and their gradients.

    Args:
        networks: The weights of each network by its name.
        shares: By the name of a loss, its share in the gradient of the networks that it reaches. Other losses come
            weighted.
    """

    def __init__(self, networks: Mapping[str, Sequence[Tensor]], shares: Mapping[str, float]) -> None:
        self.shares = shares
        self._weights = [weight for network in networks.values() for weight in network]
        self._places, start = {}, 0
        for name, network in networks.items():
            self._places[name] = slice(start, start + len(network))
            start += len(network)
        self._losses: Counter[str] = Counter()
        self._gradients: dict[str, list[Tensor | None]] = {}

    def backward(
        self,
        losses: Mapping[str, Tensor],
        scaler: GradScaler,
        measure: bool,
        send: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        """Accumulate the losses of a micro-batch and their gradient.

        Args:
            losses: Scalars by name, of which the step takes the sum over micro-batches.
            scaler: Scales the losses.
            measure: Keep the gradient of each loss for `measured`.
            send: Called in the last micro-batch with the gradients of single losses, before the backward pass of the
                others, during which they travel.
        """
        for name, loss in losses.items():
            self._losses[name] += loss.detach()
            if loss.requires_grad and (measure or name in self.shares):
                self._keep(name, scaler.scale(loss))
        if send is not None:
            send(self.kept())
        # A penalty is a constant 0 in the steps between two penalties.
        weighted = [loss for name, loss in losses.items() if name not in self.shares and loss.requires_grad]
        if weighted:
            scaler.scale(sum(weighted)).backward()

    def kept(self) -> list[Tensor]:
        """Return the gradients of single losses that this step keeps."""
        return [each for gradient in self._gradients.values() for each in gradient if each is not None]

    @torch.no_grad()
    def balance(self, factor: float) -> None:
        """Weight the losses that have a share, and add their gradients to `.grad`, which holds that of the others.

        Args:
            factor: Factor on all shares.
        """
        for name in self.shares.keys() & self._gradients.keys():
            own = self._gradients[name]
            reached = [place for place in self._places.values() if any(each is not None for each in own[place])]
            others = _norm(weight.grad for place in reached for weight in self._weights[place])
            weight = (self.shares[name] * factor * others / _norm(own)).clamp(max=MOST).nan_to_num()  # 0 / 0 becomes 0
            self._losses[name] = self._losses[name] * weight
            self._gradients[name] = own = [None if each is None else each * weight for each in own]
            for parameter, gradient in zip(self._weights, own, strict=True):
                parameter.grad = _plus(parameter.grad, gradient)

    @torch.no_grad()
    def measured(self) -> dict[str, Tensor]:
        """Return the share of each loss in the gradient of each network that it reaches together with other losses.

        Returns:
            Scalars by `NETWORK/LOSS`.
        """
        shares = {}
        for network, place in self._places.items():
            reached = {name: gradient[place] for name, gradient in self._gradients.items()}
            reached = {name: own for name, own in reached.items() if any(each is not None for each in own)}
            if len(reached) < 2:
                continue
            total = [functools.reduce(_plus, each) for each in zip(*reached.values(), strict=True)]
            for name, own in reached.items():
                shares[f"{network}/{name}"] = _norm(own) / _norm(map(_minus, total, own))
        return shares

    def take(self) -> dict[str, Tensor]:
        """Return the weighted losses by name, scalars without graph, and forget the step."""
        losses = dict(self._losses)
        self._losses.clear()
        self._gradients.clear()
        return losses

    def _keep(self, name: str, loss: Tensor) -> None:
        """Add up the gradient of one loss. Its graph stays for the other losses."""
        gradient = torch.autograd.grad(loss, self._weights, retain_graph=True, allow_unused=True)
        kept = self._gradients.get(name, [None] * len(gradient))
        self._gradients[name] = list(map(_plus, kept, gradient))


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else a - b


def _norm(gradient: Iterable[Tensor | None]) -> Tensor:
    return get_total_norm([each for each in gradient if each is not None])

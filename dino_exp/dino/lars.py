"""LARS (You et al. 2017) with the choices of official DINO's `utils.LARS`.

Shapes: P parameters with a gradient that are no vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lars(Optimizer):
    """Momentum on gradients that are scaled to `eta` times their parameter's norm, layer by layer.

    Vectors (biases, norms) get neither that scaling nor weight decay; decay joins the gradient before it is measured.
    The state of a parameter is its momentum `mu`, from its first gradient on. No step waits for the device.

    For parameters that are cut into shares `local_part` gives this process's share of a tensor, and `whole_norms` the
    norms of whole tensors from those of the shares: one collective a group.
    """

    moment_names = frozenset({"mu"})

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        whole_norms: Callable[[Tensor], Tensor] | None = None,
        local_part: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})
        self._whole_norms, self._local_part = whole_norms, local_part

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; gradients stay as they are."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            matrices = [parameter for parameter in parameters if parameter.ndim != 1]
            vectors = [parameter for parameter in parameters if parameter.ndim == 1]
            if matrices:
                self._move(matrices, self._adapted(matrices, group["weight_decay"], group["eta"]), group)
            if vectors:
                self._move(vectors, self._parts([_gradient(vector) for vector in vectors]), group)

    def _adapted(self, parameters: list[Tensor], weight_decay: float, eta: float) -> list[Tensor]:
        """Gradients with decay, each `eta` times as long as its parameter; as they are where either is zero."""
        weights, gradients = self._parts(parameters), self._parts([_gradient(one) for one in parameters])
        moves = list(torch._foreach_add(gradients, weights, alpha=weight_decay))
        norms_2P = torch.stack(torch._foreach_norm(weights) + torch._foreach_norm(moves))
        norms_2P = norms_2P if self._whole_norms is None else self._whole_norms(norms_2P)
        sizes_P, lengths_P = norms_2P.chunk(2)
        factors_P = torch.where((sizes_P > 0) & (lengths_P > 0), eta * sizes_P / lengths_P, 1.0)
        torch._foreach_mul_(moves, list(factors_P.unbind()))
        return moves

    def _move(self, parameters: list[Tensor], moves: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "mu" not in self.state[parameter]:
                self.state[parameter]["mu"] = torch.zeros_like(parameter, requires_grad=False)
        momenta = self._parts([self.state[parameter]["mu"] for parameter in parameters])
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, moves)
        torch._foreach_add_(self._parts(parameters), momenta, alpha=-group["lr"])

    def _parts(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors if self._local_part is None else [self._local_part(tensor) for tensor in tensors]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad

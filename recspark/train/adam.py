"""Adam on all parameters at once, and row by row where gradients are sparse.

Written out, because `torch.optim` imports torch's whole compiler: several seconds of two cores on
every rank of every training; and because one vector is what ranks add up and what a checkpoint holds.
"""

from __future__ import annotations

import torch
from torch import nn

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # as the paper sets them

Rows = tuple[torch.Tensor, torch.Tensor]  # int64 (u,) distinct and ascending, (u, d)


class Adam:
    """The parameters of a network and their running means (Kingma & Ba 2015, algorithm 1).

    All parameters with dense gradients are views of one vector, `state["vector"]` (P,), and their
    gradients of another, `sums` (P + 2,), whose last two entries are the loop's. A parameter named
    in the network's `sparse_parameters` (an embedding table (n, d) read with `sparse=True`) stays
    apart: a step costs the rows that it touched, in time and in what ranks send each other. Such a
    row moves only in steps that give it a gradient, by the same formulas (the lazy variant, as
    `torch.optim.SparseAdam`).

    Parameters
    ----------
    net : its parameters are replaced by views; all of one type, on one device
    weight_decay : times the parameter, added to its gradient; of sparse ones, to the rows touched
    """

    def __init__(self, net: nn.Module, weight_decay: float = 0.0) -> None:
        apart: frozenset[str] = frozenset(getattr(net, "sparse_parameters", ()))
        named = dict(net.named_parameters())
        self.tables = {name: named[name] for name in sorted(apart)}
        dense = [parameter for name, parameter in named.items() if name not in apart]
        vector = _joined(dense, like=next(net.parameters()))  # (P,)
        self.sums = vector.new_zeros(len(vector) + 2)  # (P + 2,)
        at = 0
        for parameter in dense:
            part = slice(at, at + parameter.numel())
            parameter.data = vector[part].view_as(parameter)
            parameter.grad = self.sums[part].view_as(parameter)
            at = part.stop
        self.state = {"vector": vector}
        for name, table in self.tables.items():
            self.state[name] = table.data
        for name in list(self.state):
            self.state[f"{name}.mean"] = torch.zeros_like(self.state[name])
            self.state[f"{name}.square"] = torch.zeros_like(self.state[name])
        self._weight_decay = weight_decay

    def zero(self) -> None:
        """Forget all gradients."""
        self.sums.zero_()
        for table in self.tables.values():
            table.grad = None

    def rows(self) -> dict[str, Rows]:
        """Return the rows that sparse gradients touched since `zero`, and their sums."""
        found = {}
        for name, table in self.tables.items():
            if table.grad is None:
                empty = torch.zeros(0, dtype=torch.int64, device=table.device)
                found[name] = empty, table.data[:0]
            else:
                gradient = table.grad.coalesce()
                found[name] = gradient.indices()[0], gradient.values()
        return found

    def step(self, number: int, rate: float, gradient: torch.Tensor, rows: dict[str, Rows]) -> None:
        """Move the parameters; the step's `number` counts from 1. `gradient` (P,) is used up."""
        correction = (1 - _BETA2**number) ** 0.5
        rate *= correction / (1 - _BETA1**number)
        epsilon = _EPSILON * correction
        # The paper's efficient order (section 2): no copy of a vector but one.
        vector, mean, square = self._of("vector")  # (P,) each
        if self._weight_decay:
            gradient.add_(vector, alpha=self._weight_decay)  # (P,)
        mean.lerp_(gradient, 1 - _BETA1)  # (P,)
        square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)  # (P,)
        vector.addcdiv_(mean, square.sqrt().add_(epsilon), value=-rate)  # (P,)
        for name, (at, values) in rows.items():
            table, mean, square = self._of(name)  # (n, d) each
            if self._weight_decay:
                values = values + self._weight_decay * table[at]  # (u, d)
            new_mean = torch.lerp(mean[at], values, 1 - _BETA1)  # (u, d)
            new_square = _BETA2 * square[at] + (1 - _BETA2) * values**2  # (u, d)
            mean[at], square[at] = new_mean, new_square
            table[at] -= rate * new_mean / (new_square.sqrt() + epsilon)  # (u, d)

    def _of(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.state[name], self.state[f"{name}.mean"], self.state[f"{name}.square"]


def _joined(dense: list[nn.Parameter], like: torch.Tensor) -> torch.Tensor:
    """Return a copy of all parameters in one vector, (P,); P may be 0."""
    return torch.cat([like.new_zeros(0), *(p.detach().reshape(-1) for p in dense)])


def weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what of an `Adam.state` are parameters: without the running means."""
    return {n: t for n, t in state.items() if not n.endswith((".mean", ".square"))}


def load_weights(net: nn.Module, found: dict[str, torch.Tensor]) -> None:
    """Put `weights` of a training into a `net` of the same shape."""
    apart = set(getattr(net, "sparse_parameters", ()))
    named = dict(net.named_parameters())
    nn.utils.vector_to_parameters(
        found["vector"], [parameter for name, parameter in named.items() if name not in apart]
    )
    for name in apart:
        named[name].data.copy_(found[name])

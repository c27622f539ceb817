"""What a training holds: the parameters of a network, what optimisers remember, and buffers.

Most parameters lie in one vector: it is what ranks add up and what a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from recspark.errors import ModelError
from recspark.train.buffers import persistent_buffers
from recspark.train.optimisers import Optimiser

Rows = tuple[torch.Tensor, torch.Tensor]  # int64 (u,) distinct and ascending, (u, d)

_VECTOR = "vector"


class Parameters:
    """The parameters of a network, moved by optimisers.

    Parameters with dense gradients are views of one vector (P,), in the network's order, and their
    gradients of another, `sums` (P + 2,), whose last two entries are the loop's. What is not part of
    the vector keeps its own name:

    - tables: named in the network's `sparse_parameters` (an embedding table (n, d) read with
      `sparse=True`). A step costs the rows that it touched, in time and in what ranks send each
      other, and moves no others;
    - frozen parameters (`requires_grad` False): nothing moves them, weight decay neither;
    - persistent buffers, such as the running means of `nn.BatchNorm1d`.

    Parameters
    ----------
    net : its trainable parameters are replaced by views; all of one type, on one device
    optimisers : by the name of a parameter or of a module above it; the longest that fits counts,
        "" fits all. A name that fits no trainable parameter is a ModelError
    """

    def __init__(self, net: nn.Module, optimisers: Mapping[str, Optimiser]) -> None:
        self._net = net
        self._optimisers = optimisers
        named = dict(net.named_parameters())
        sparse: frozenset[str] = frozenset(getattr(net, "sparse_parameters", ()))
        moving = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        dense = {name: parameter for name, parameter in moving.items() if name not in sparse}
        self._tables = {name: moving[name] for name in sorted(sparse & moving.keys())}

        like = next(iter((moving or named).values()))
        vector = torch.cat([like.new_zeros(0), *(p.detach().reshape(-1) for p in dense.values())])
        self.sums = vector.new_zeros(len(vector) + 2)  # (P + 2,)
        self._parts: list[tuple[Optimiser, slice]] = []  # of the vector, in its order
        begin = 0
        for name, parameter in dense.items():
            part = slice(begin, begin + parameter.numel())
            parameter.data = vector[part].view_as(parameter)
            parameter.grad = self.sums[part].view_as(parameter)
            optimiser, begin = self._optimiser(name), part.stop
            if self._parts and self._parts[-1][0] == optimiser:
                part = slice(self._parts.pop()[1].start, part.stop)
            self._parts.append((optimiser, part))

        apart = {name: p.data for name, p in named.items() if name not in dense}
        self._weights = {_VECTOR: vector, **apart}
        self._slots: dict[str, dict[str, torch.Tensor]] = {_VECTOR: {}}
        for optimiser, part in self._parts:
            for slot, values in optimiser.start(vector[part]).items():
                whole = self._slots[_VECTOR].setdefault(slot, torch.zeros_like(vector))  # (P,)
                whole[part] = values
        for name, table in self._tables.items():
            self._slots[name] = self._optimiser(name).start(table.data)
        self._check_names(moving)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return what `load_weights` takes: the vector, and the rest by name."""
        return {**self._weights, **persistent_buffers(self._net)}

    def state(self) -> dict[str, torch.Tensor]:
        """Return all that a training needs to go on; changed in place, it changes the training."""
        return {**self.weights(), **self._named_slots()}

    def zero(self) -> None:
        """Forget all gradients."""
        self.sums.zero_()
        for table in self._tables.values():
            table.grad = None

    def rows(self) -> dict[str, Rows]:
        """Return the rows that sparse gradients touched since `zero`, and their sums."""
        touched = {}
        for name, table in self._tables.items():
            if table.grad is None:
                empty = torch.zeros(0, dtype=torch.int64, device=table.device)
                touched[name] = empty, table.data[:0]
            else:
                gradient = table.grad.coalesce()
                touched[name] = gradient.indices()[0], gradient.values()
        return touched

    def move(
        self, step: int, n_steps: int, gradient: torch.Tensor, rows: Mapping[str, Rows]
    ) -> None:
        """Take a step, counted from 0, of `n_steps`. `gradient` (P,) and `rows` are used up."""
        vector, slots = self._weights[_VECTOR], self._slots[_VECTOR]
        for optimiser, part in self._parts:
            own = {slot: whole[part] for slot, whole in slots.items()}
            optimiser.move(step, n_steps, vector[part], gradient[part], own)
        for name, (indices, values) in rows.items():
            table, slots = self._weights[name], self._slots[name]  # (n, d) each
            moved = table[indices]  # (u, d)
            of_moved = {slot: whole[indices] for slot, whole in slots.items()}  # (u, d) each
            self._optimiser(name).move_rows(step, n_steps, moved, values, of_moved)
            table[indices] = moved
            for slot, whole in slots.items():
                whole[indices] = of_moved[slot]

    def _named_slots(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{slot}": tensor
            for name, slots in self._slots.items()
            for slot, tensor in slots.items()
        }

    def _optimiser(self, name: str) -> Optimiser:
        return self._optimisers[max((n for n in self._optimisers if _fits(n, name)), key=len)]

    def _check_names(self, moving: Mapping[str, nn.Parameter]) -> None:
        """Raise ModelError where an optimiser has nothing to move, or a name means two things."""
        for name in self._optimisers:
            if name and not any(_fits(name, other) for other in moving):
                raise ModelError(
                    f"optimisers: {name!r} is no trainable parameter or module of the network, "
                    f"which has {', '.join(moving)}"
                )
        own, others = {_VECTOR, *self._named_slots()}, dict(self._net.named_parameters())
        if twice := own & (others.keys() | persistent_buffers(self._net).keys()):
            raise ModelError(f"{', '.join(sorted(twice))}: the network may not use this name")


def _fits(name: str, parameter: str) -> bool:
    """Return whether `name` is the parameter or a module above it.

    >>> [_fits(name, "wide.weight") for name in ("", "wide", "wide.weight", "wid")]
    [True, True, True, False]
    """
    return f"{parameter}.".startswith(f"{name}." if name else "")


def load_weights(net: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put the `Parameters.weights` of a training, or its state, into a `net` of the same shape."""
    named = dict(net.named_parameters())
    joined = [parameter for name, parameter in named.items() if name not in weights]
    nn.utils.vector_to_parameters(weights[_VECTOR], joined)
    for name, parameter in named.items():
        if name in weights:
            parameter.data.copy_(weights[name])
    for name, buffer in persistent_buffers(net).items():
        buffer.copy_(weights[name])

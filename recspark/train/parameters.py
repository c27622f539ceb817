"""The state of a training: the parameters of a network, the slots of optimisers, and buffers.

Most parameters lie in one vector, so that ranks add up one vector of gradients and a checkpoint
holds one vector of weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from recspark.errors import ModelError
from recspark.train.buffers import persistent_buffers
from recspark.train.optimisers import Optimiser

# Some rows of a table: their numbers, int64 (u,), distinct and ascending; a value of each, (u, d).
Rows = tuple[torch.Tensor, torch.Tensor]

_VECTOR = "vector"


class Parameters:
    """The parameters of a network, moved by optimisers.

    Parameters with dense gradients are views of one vector (P,), in the network's order. Their
    gradients are views of another vector, `sums` (P + 2,), whose last two entries belong to the
    loop (the sum of the losses and the sum of the weights). The other tensors keep their own names:

    - tables: the parameters named in the network's `sparse_parameters`, which are embedding tables
      (n, d) read with `sparse=True`. A step moves only the rows that it touched. Its time, and what
      ranks send each other, grow with these rows and not with n;
    - frozen parameters (`requires_grad` False): nothing moves them, not even weight decay;
    - persistent buffers, such as the running means of `nn.BatchNorm1d`.

    Parameters
    ----------
    net : its trainable parameters are replaced by views; all have one type and lie on one device
    optimisers : by the name of a parameter, or of a module that contains parameters; "" is the
        network. Where several names fit a parameter, the longest one counts. Raises ModelError
        where a name fits no trainable parameter
    """

    def __init__(self, net: nn.Module, optimisers: Mapping[str, Optimiser]) -> None:
        self._net = net
        self._optimisers = optimisers
        named = dict(net.named_parameters())
        sparse: frozenset[str] = frozenset(getattr(net, "sparse_parameters", ()))
        moving = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        dense = {name: parameter for name, parameter in moving.items() if name not in sparse}
        self._tables = {name: moving[name] for name in sorted(sparse & moving.keys())}

        first_parameter = next(iter((moving or named).values()))
        vector = torch.cat(
            [first_parameter.new_zeros(0), *(p.detach().reshape(-1) for p in dense.values())]
        )
        self.sums = vector.new_zeros(len(vector) + 2)  # (P + 2,)
        # Each optimiser with the slice of the vector that it moves, in the vector's order.
        self._optimised_slices: list[tuple[Optimiser, slice]] = []
        begin = 0
        for name, parameter in dense.items():
            entries = slice(begin, begin + parameter.numel())
            parameter.data = vector[entries].view_as(parameter)
            parameter.grad = self.sums[entries].view_as(parameter)
            optimiser, begin = self._optimiser_of(name), entries.stop
            # Parameters side by side with an equal optimiser become one longer slice.
            if self._optimised_slices and self._optimised_slices[-1][0] == optimiser:
                entries = slice(self._optimised_slices.pop()[1].start, entries.stop)
            self._optimised_slices.append((optimiser, entries))

        tensors_outside_vector = {name: p.data for name, p in named.items() if name not in dense}
        self._weights = {_VECTOR: vector, **tensors_outside_vector}
        self._slots: dict[str, dict[str, torch.Tensor]] = {_VECTOR: {}}
        for optimiser, entries in self._optimised_slices:
            for slot, values in optimiser.start(vector[entries]).items():
                slot_vector = self._slots[_VECTOR].setdefault(
                    slot, torch.zeros_like(vector)
                )  # (P,)
                slot_vector[entries] = values
        for name, table in self._tables.items():
            self._slots[name] = self._optimiser_of(name).start(table.data)
        self._check_names(moving)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the weights, for `load_weights`: the vector, and other tensors by name."""
        return {**self._weights, **persistent_buffers(self._net)}

    def state(self) -> dict[str, torch.Tensor]:
        """Return all tensors that a training needs to go on: weights and slots, by name.

        They are not copies: changing one in place changes the training.
        """
        return {**self.weights(), **self._named_slots()}

    def zero(self) -> None:
        """Reset all gradients, and the two sums of the loop, to 0."""
        self.sums.zero_()
        for table in self._tables.values():
            table.grad = None

    def rows(self) -> dict[str, Rows]:
        """Return by table the rows with a gradient since `zero`, and their summed gradients."""
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
        """Take step number `step` (from 0) of `n_steps`.

        `gradient` (P,) and `rows` may be overwritten, so do not use them afterwards.
        """
        vector, slots = self._weights[_VECTOR], self._slots[_VECTOR]
        for optimiser, entries in self._optimised_slices:
            slots_of_entries = {slot: tensor[entries] for slot, tensor in slots.items()}
            optimiser.move(step, n_steps, vector[entries], gradient[entries], slots_of_entries)
        for name, (indices, values) in rows.items():
            table, slots = self._weights[name], self._slots[name]  # (n, d) each
            moved = table[indices]  # (u, d)
            slots_of_moved = {
                slot: tensor[indices] for slot, tensor in slots.items()
            }  # (u, d) each
            self._optimiser_of(name).move_rows(step, n_steps, moved, values, slots_of_moved)
            table[indices] = moved
            for slot, tensor in slots.items():
                tensor[indices] = slots_of_moved[slot]

    def _named_slots(self) -> dict[str, torch.Tensor]:
        return {
            f"{name}.{slot}": tensor
            for name, slots in self._slots.items()
            for slot, tensor in slots.items()
        }

    def _optimiser_of(self, name: str) -> Optimiser:
        return self._optimisers[
            max((n for n in self._optimisers if _is_or_contains(n, name)), key=len)
        ]

    def _check_names(self, moving: Mapping[str, nn.Parameter]) -> None:
        """Raise ModelError where an optimiser has nothing to move, or two tensors have one name."""
        for name in self._optimisers:
            if name and not any(_is_or_contains(name, parameter) for parameter in moving):
                raise ModelError(
                    f"optimisers: {name!r} is no trainable parameter or module of the network, "
                    f"which has {', '.join(moving)}"
                )
        reserved, named = {_VECTOR, *self._named_slots()}, dict(self._net.named_parameters())
        if clashes := reserved & (named.keys() | persistent_buffers(self._net).keys()):
            raise ModelError(f"{', '.join(sorted(clashes))}: the network may not use this name")


def _is_or_contains(name: str, parameter: str) -> bool:
    """Return whether `name` is the parameter itself, or a module that contains it.

    >>> [_is_or_contains(name, "wide.weight") for name in ("", "wide", "wide.weight", "wid")]
    [True, True, True, False]
    """
    return f"{parameter}.".startswith(f"{name}." if name else "")


def load_weights(net: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy the `Parameters.weights` of a training into a `net` of the same shape.

    `weights` may also be `Parameters.state`, whose slots are ignored.
    """
    named = dict(net.named_parameters())
    vector_parameters = [parameter for name, parameter in named.items() if name not in weights]
    nn.utils.vector_to_parameters(weights[_VECTOR], vector_parameters)
    for name, parameter in named.items():
        if name in weights:
            parameter.data.copy_(weights[name])
    for name, buffer in persistent_buffers(net).items():
        buffer.copy_(weights[name])

"""Buffers: tensors of a network beside its parameters, such as the running means of BatchNorm."""

from __future__ import annotations

import torch
from torch import nn

from recspark.train.comm import Comm


def persistent_buffers(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return by name the buffers of `net` that are part of its `state_dict`.

    Buffers registered with `persistent=False` are left out: the network can compute them again.
    """
    buffers = dict(net.named_buffers())
    state = net.state_dict() if buffers else {}
    return {name: buffer for name, buffer in buffers.items() if name in state}


def average_buffers(comm: Comm, net: nn.Module, weight: float) -> None:
    """Replace the buffers of `net`, on every rank, by their mean over all ranks.

    Buffers of floating-point numbers become the weighted mean over the ranks. The weight of a rank
    is `weight`, the total weight of the rows that it read since the last call. A rank whose rows
    only filled up its batch has weight 0 and does not count.

    Buffers of whole numbers become those of rank 0. As long as they count batches, as BatchNorm's
    `num_batches_tracked` does, they are equal on all ranks anyway.

    Cost: each call (one per step) exchanges 8 bytes per number. A large constant belongs in a
    frozen parameter instead, which is exchanged only once.
    """
    if comm.size == 1 or not (buffers := list(persistent_buffers(net).values())):
        return
    factors = [weight if b.is_floating_point() else float(comm.rank == 0) for b in buffers]
    weighted_buffers = [b.double().reshape(-1) * factor for b, factor in zip(buffers, factors)]
    buffers_and_weight = torch.cat(
        [*weighted_buffers, weighted_buffers[0].new_tensor([weight])]
    )  # (n + 1,), float64
    sums_of_all_ranks = comm.allreduce(buffers_and_weight)  # (n + 1,): the same bits on every rank
    begin = 0
    for buffer in buffers:
        buffer_sum = sums_of_all_ranks[begin : begin + buffer.numel()].view(buffer.shape)
        buffer.copy_(
            buffer_sum / sums_of_all_ranks[-1] if buffer.is_floating_point() else buffer_sum
        )
        begin += buffer.numel()

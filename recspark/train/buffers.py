"""Buffers: what a network keeps beside its parameters, such as the running means of BatchNorm."""

from __future__ import annotations

import torch
from torch import nn

from recspark.train.comm import Comm


def persistent_buffers(net: nn.Module) -> dict[str, torch.Tensor]:
    """Return the buffers that belong to the state of `net`, by name; those of a constant that it can
    make again (`persistent=False`) do not.
    """
    buffers = dict(net.named_buffers())
    state = net.state_dict() if buffers else {}
    return {name: buffer for name, buffer in buffers.items() if name in state}


def average_buffers(comm: Comm, net: nn.Module, weight: float) -> None:
    """Give every rank the mean of all ranks' buffers, and rank 0's of whole numbers.

    Each rank counts by the `weight` of the rows that it read since the last time: one that only
    filled its batch up does not count. Whole numbers, such as BatchNorm's `num_batches_tracked`, are
    the same on all ranks as it is, as long as they count batches.

    Cost: one exchange of 8 bytes a number, in each step. A constant that is large belongs into a
    frozen parameter instead, which is exchanged once.
    """
    if comm.size == 1 or not (buffers := list(persistent_buffers(net).values())):
        return
    shares = [weight if b.is_floating_point() else float(comm.rank == 0) for b in buffers]
    parts = [b.double().reshape(-1) * share for b, share in zip(buffers, shares)]
    own = torch.cat([*parts, parts[0].new_tensor([weight])])  # (n + 1,)
    of_all = comm.allreduce(own)  # (n + 1,): the same bits on every rank
    begin = 0
    for buffer in buffers:
        total = of_all[begin : begin + buffer.numel()].view(buffer.shape)
        buffer.copy_(total / of_all[-1] if buffer.is_floating_point() else total)
        begin += buffer.numel()

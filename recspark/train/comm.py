"""How ranks talk to each other: the number of a rank, the number of all ranks, exchanged tensors.

After each finished exchange `alive()` is called. It tells the watchdogs of `recspark.train.launch`
that the rank does not hang.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

Tell = Callable[[str], None]
Alive = Callable[[], None]


class Comm(Protocol):
    """A rank's connection to the others. All ranks must make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def allreduce(self, tensor: torch.Tensor, op: Literal["sum", "mean"] = "sum") -> torch.Tensor:
        """Return the sum or mean over all ranks, equal bits on each; `tensor` is not changed."""

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor of rank 0. The other ranks pass any tensor of equal shape and type."""

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, in rank order, joined along their first axis.

        The lengths of the first axis may differ between ranks and between calls.
        """

    def tell(self, text: str) -> None:
        """Send a line of text to whoever watches the driver."""


class HorovodComm:
    """Ranks that are processes connected by gloo; `hvd` is `horovod.torch`, initialised."""

    def __init__(self, hvd: Any, tell: Tell, alive: Alive) -> None:
        self._hvd = hvd
        self.tell = tell
        self._alive = alive
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()

    def allreduce(self, tensor: torch.Tensor, op: Literal["sum", "mean"] = "sum") -> torch.Tensor:
        if tensor.is_cuda:  # gloo cannot send GPU tensors: copy through host memory
            return self.allreduce(tensor.cpu(), op).to(tensor.device)
        reduction = self._hvd.Sum if op == "sum" else self._hvd.Average
        # Horovod negotiates each name once. With equal names in every step, only the first pays.
        name = f"{op} {tensor.dtype} {tuple(tensor.shape)}"
        return self._exchanged(self._hvd.allreduce(tensor, op=reduction, name=name))

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            return self.broadcast(tensor.cpu()).to(tensor.device)
        if tensor.dtype == torch.bool:  # Horovod's torch binding does not support bool
            return self.broadcast(tensor.byte()).bool()
        name = f"{tensor.dtype} {tuple(tensor.shape)}"
        return self._exchanged(self._hvd.broadcast(tensor, root_rank=0, name=name))

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            return self.allgather(tensor.cpu()).to(tensor.device)
        name = f"all {tensor.dtype} {tuple(tensor.shape[1:])}"
        return self._exchanged(self._hvd.allgather(tensor, name=name))

    def _exchanged(self, tensor: torch.Tensor) -> torch.Tensor:
        self._alive()
        return tensor


class Meeting:
    """The tensors that the ranks (threads) of one process exchange, and the barrier they use."""

    def __init__(self, size: int, alive: Alive) -> None:
        self.barrier = threading.Barrier(size, action=alive)
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadComm:
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, meeting: Meeting, tell: Tell) -> None:
        self.rank = rank
        self.size = meeting.barrier.parties
        self.tell = tell
        self._meeting = meeting

    def allreduce(self, tensor: torch.Tensor, op: Literal["sum", "mean"] = "sum") -> torch.Tensor:
        total = torch.stack(self._exchanged(tensor)).sum(dim=0)
        return total if op == "sum" else total / self.size

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._exchanged(tensor)[0].clone()  # each rank gets a copy, not a shared tensor

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchanged(tensor))

    def _exchanged(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._meeting.tensors[self.rank] = tensor.clone()  # this rank may change its tensor next
        self._meeting.barrier.wait()
        tensors_of_all_ranks = list(self._meeting.tensors)
        self._meeting.barrier.wait()  # no rank stores its next tensor before all have read
        return tensors_of_all_ranks

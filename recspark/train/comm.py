"""What a rank knows of the others: its number, theirs, and tensors exchanged between them.

Each finished exchange is a sign of life, `alive()`, to the watchdogs of `recspark.train.launch`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

Tell = Callable[[str], None]
Alive = Callable[[], None]


class Comm(Protocol):
    """What a rank knows of the others. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def allreduce(self, tensor: torch.Tensor, op: Literal["sum", "mean"] = "sum") -> torch.Tensor:
        """Return the sum or mean over all ranks, the same bits on each; `tensor` stays as it is."""

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return rank 0's tensor; the others pass one of the same shape and type."""

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, in rank order, joined along their first axis.

        Lengths along it may differ, also from call to call.
        """

    def tell(self, text: str) -> None:
        """Say a line to whoever watches the driver."""


class HorovodComm:
    """Ranks that gloo connects; `hvd` is the module `horovod.torch`, initialised."""

    def __init__(self, hvd: Any, tell: Tell, alive: Alive) -> None:
        self._hvd = hvd
        self.tell = tell
        self._alive = alive
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()

    def allreduce(self, tensor: torch.Tensor, op: Literal["sum", "mean"] = "sum") -> torch.Tensor:
        if tensor.is_cuda:  # gloo knows no GPU: through the host
            return self.allreduce(tensor.cpu(), op).to(tensor.device)
        kind = self._hvd.Sum if op == "sum" else self._hvd.Average
        # A name that repeats lets Horovod skip its negotiation after the first step.
        name = f"{op} {tensor.dtype} {tuple(tensor.shape)}"
        return self._exchanged(self._hvd.allreduce(tensor, op=kind, name=name))

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            return self.broadcast(tensor.cpu()).to(tensor.device)
        if tensor.dtype == torch.bool:  # Horovod's torch binding knows none
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
    """Where the ranks of one process exchange tensors."""

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
        return self._exchanged(tensor)[0].clone()  # not one tensor for all ranks

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchanged(tensor))

    def _exchanged(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._meeting.tensors[self.rank] = tensor.clone()  # its owner may change it next
        self._meeting.barrier.wait()
        everyones = list(self._meeting.tensors)
        self._meeting.barrier.wait()  # nobody puts in the next one before all have read this
        return everyones

"""The training loop of every network, the same on each rank, from top to bottom.

Each rank adds up the weighted losses of its own rows; gradient, loss and weight are then summed over all
ranks in one vector, and divided by the weight of all. So a step does not depend on how many ranks share
its rows: two ranks at batch B take the step of one at 2B, and the learning rate needs no scaling. This is
one explicit allreduce instead of Horovod's `DistributedOptimizer`, which averages over ranks, however
many rows each has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from recspark.data.blocks import Array
from recspark.errors import DivergedError, FeedError
from recspark.train import checkpoint
from recspark.train.checkpoint import Checkpoint
from recspark.train.feed import Batch
from recspark.train.launch import Comm

# (batch, generator of everything random, share of the training done in [0, 1)) -> loss of each row (B,)
Loss = Callable[[Batch, torch.Generator, float], torch.Tensor]


class Batches(Protocol):
    """What the loop reads: `recspark.train.feed.Feed`."""

    steps: int
    n_rows_of_all: int

    def epoch(self, epoch: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class LoopOptions:
    """How long and how fast.

    Parameters
    ----------
    learning_rate : at the first step, of a batch of all ranks together; falls linearly to 0
    weight_decay : times the parameter, added to its gradient
    seed : with epoch and rank it sets dropout and sampling
    checkpoints : URI of the folder of checkpoints; "" = none, and no resuming
    checkpoint_every_s : seconds between two of them, at the end of an epoch
    identity : settings and data versions; a checkpoint of other ones is not resumed
    """

    epochs: int
    learning_rate: float
    weight_decay: float = 0.0
    seed: int = 1
    checkpoints: str = ""
    checkpoint_every_s: float = 30.0
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave: mean loss of a row, over all ranks, and rows a second, of all ranks."""

    epoch: int
    loss: float
    rows_per_s: float


@dataclass(frozen=True)
class Trained:
    """What a rank returns: small, but for the weights of rank 0 where there is no folder to put them.

    `place` is the last checkpoint where there is one; `vector` else, on rank 0.
    """

    epochs: tuple[Epoch, ...]
    place: str
    vector: Array | None


def train(
    comm: Comm, net: nn.Module, loss: Loss, batches: Batches, options: LoopOptions
) -> Trained:
    """Train `net` in place on the rows of all ranks, by Adam (Kingma & Ba 2015).

    Every rank starts from rank 0's weights, or from the newest checkpoint of the same `identity`, and a
    resumed training ends with the weights of an uninterrupted one. Raises DivergedError, on every rank at
    the same step, when loss or gradient is not finite; FeedError when an epoch's rows do not add up.
    """
    parameters, sums = _as_vectors(net)  # (P,), (P + 2,): gradients, loss, weight
    vector = nn.Parameter(parameters)  # (P,)
    adam = torch.optim.Adam([vector], weight_decay=options.weight_decay)
    first, step, place = _resume(comm, vector, adam, options)
    n_steps = options.epochs * batches.steps
    generator = torch.Generator()
    saved_at = time.monotonic()
    history = []
    for epoch in range(first, options.epochs):
        generator.manual_seed(_seed(options.seed, epoch, comm.rank))
        begun = time.monotonic()
        loss_of_epoch = rows_of_epoch = 0.0
        for batch in batches.epoch(epoch):
            sums.zero_()  # (P + 2,)
            row_loss = loss(batch, generator, step / n_steps)  # (B,)
            batch_loss = (row_loss * batch.weight).sum()  # ()
            batch_loss.backward()  # type: ignore[no-untyped-call]  # adds to sums[:P]
            sums[-2], sums[-1] = batch_loss.detach(), batch.weight.sum()
            of_all = comm.allreduce(sums)  # (P + 2,)
            if not of_all.isfinite().all():
                raise DivergedError(
                    f"step {step + 1} of {n_steps} (epoch {epoch + 1}): the loss is "
                    f"{float(of_all[-2])}, or its gradient is not finite; last good checkpoint: "
                    f"{checkpoint.newest(options.checkpoints) or 'none'}. Lower learning_rate, or look "
                    "for bad weights in the data"
                )
            vector.grad = of_all[:-2] / of_all[-1]  # (P,)
            adam.param_groups[0]["lr"] = options.learning_rate * (1 - step / n_steps)
            adam.step()
            step += 1
            loss_of_epoch += float(of_all[-2])
            rows_of_epoch += float(of_all[-1])
        if round(rows_of_epoch) != batches.n_rows_of_all:
            raise FeedError(
                f"epoch {epoch + 1} counted {rows_of_epoch:.0f} rows over all ranks, "
                f"planned were {batches.n_rows_of_all}"
            )
        seconds = time.monotonic() - begun
        done = Epoch(epoch + 1, loss_of_epoch / rows_of_epoch, rows_of_epoch / seconds)
        history.append(done)
        if comm.rank == 0:
            comm.tell(
                f"epoch {done.epoch} of {options.epochs}: loss {done.loss:.4f}, "
                f"{done.rows_per_s:,.0f} rows/s"
            )
            last = epoch + 1 == options.epochs
            due = last or time.monotonic() - saved_at >= options.checkpoint_every_s
            if options.checkpoints and due:
                state = _state(epoch + 1, step, vector, adam)
                place = checkpoint.save(options.checkpoints, state, options.identity)
                saved_at = time.monotonic()
    by_value = comm.rank == 0 and not options.checkpoints
    return Trained(tuple(history), place, vector.detach().numpy() if by_value else None)


def load_weights(net: nn.Module, trained: Trained) -> None:
    """Put the weights that rank 0 returned into a `net` of the same shape."""
    vector = trained.vector
    if vector is None:
        vector = checkpoint.load(trained.place).vectors["parameters"]
    nn.utils.vector_to_parameters(torch.from_numpy(vector), net.parameters())


def _as_vectors(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Make all parameters views of one vector (P,), and their gradients views of another (P + 2,)."""
    values = nn.utils.parameters_to_vector(net.parameters()).detach()  # (P,)
    sums = torch.zeros(len(values) + 2, dtype=values.dtype)  # (P + 2,)
    at = 0
    for parameter in net.parameters():
        part = slice(at, at + parameter.numel())
        parameter.data = values[part].view_as(parameter)
        parameter.grad = sums[part].view_as(parameter)
        at = part.stop
    return values, sums


def _resume(
    comm: Comm, vector: nn.Parameter, adam: torch.optim.Adam, options: LoopOptions
) -> tuple[int, int, str]:
    """Bring all ranks to rank 0's state; return (epochs done, steps done, place of the checkpoint).

    Rank 0 alone looks for a checkpoint, so that ranks cannot disagree about where to go on.
    """
    place, found = "", None
    if comm.rank == 0:
        place, found = checkpoint.latest(options.checkpoints, options.identity)
    at = torch.tensor([found.epoch, found.step] if found else [0, 0])  # (2,)
    epoch, step = comm.broadcast(at).tolist()
    parts = [vector.detach(), torch.zeros_like(vector), torch.zeros_like(vector)]  # (P,) each
    if found:
        parts = [torch.from_numpy(found.vectors[name]) for name in _VECTORS]
        comm.tell(f"resuming after epoch {epoch} of {options.epochs}")
    parts = [comm.broadcast(part) for part in (parts if epoch else parts[:1])]
    vector.data.copy_(parts[0])
    if epoch:
        adam.state[vector] = {
            "step": torch.tensor(float(step)),
            "exp_avg": parts[1].clone(),
            "exp_avg_sq": parts[2].clone(),
        }
    return epoch, step, place


_VECTORS = ("parameters", "first", "second")


def _state(epoch: int, step: int, vector: nn.Parameter, adam: torch.optim.Adam) -> Checkpoint:
    moments = adam.state[vector]
    parts = (vector.detach(), moments["exp_avg"], moments["exp_avg_sq"])
    return Checkpoint(
        epoch, step, {name: part.numpy() for name, part in zip(_VECTORS, parts, strict=True)}
    )


def _seed(*parts: int) -> int:
    """Return a seed for each combination of `parts`."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))

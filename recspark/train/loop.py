"""The training loop of every network, the same on each rank, from top to bottom.

Each rank adds up the weighted losses of its own rows; gradient, loss and weight are then summed
over all ranks in one vector, and divided by the weight of all. So a step does not depend on how
many ranks share its rows: two ranks at batch B take the step of one at 2B, and the learning rate
needs no scaling. This is one explicit allreduce instead of Horovod's `DistributedOptimizer`, which
averages over ranks, however many rows each has. Adam is written out, because `torch.optim` imports
torch's whole compiler: several seconds of two cores on every rank of every training.
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

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # of Adam, as its paper sets them

# (batch, generator of everything random, share of the training done in [0, 1)) -> loss of each row
# (B,)
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
    """What a rank returns: small, but for rank 0's weights where there is no folder for them.

    `place` is the last checkpoint where there is one; `vector` else, on rank 0.
    """

    epochs: tuple[Epoch, ...]
    place: str
    vector: Array | None


def train(
    comm: Comm, net: nn.Module, loss: Loss, batches: Batches, options: LoopOptions
) -> Trained:
    """Train `net` in place on the rows of all ranks, by Adam (Kingma & Ba 2015, algorithm 1).

    Every rank starts from rank 0's weights, or from the newest checkpoint of the same `identity`,
    and a resumed training ends with the weights of an uninterrupted one. Raises DivergedError, on
    every rank at the same step, when loss or gradient is not finite; FeedError when an epoch's rows
    do not add up.
    """
    vector, sums = _as_vectors(net)  # (P,), (P + 2,): gradients, loss, weight
    state, place = _resume(comm, vector, options)
    vector.copy_(state.vector)  # (P,)
    mean, square = state.mean, state.square  # (P,) each
    step, n_steps = state.step, options.epochs * batches.steps
    generator = torch.Generator()
    saved_at = time.monotonic()
    history = []
    for epoch in range(state.epoch, options.epochs):
        generator.manual_seed(_seed(options.seed, epoch, comm.rank))
        begun = time.monotonic()
        loss_of_epoch = rows_of_epoch = 0.0
        for batch in batches.epoch(epoch):
            sums.zero_()  # (P + 2,)
            row_loss = loss(batch, generator, step / n_steps)  # (B,)
            batch_loss = (row_loss * batch.weight).sum()  # ()
            batch_loss.backward()  # adds to sums[:P]
            sums[-2], sums[-1] = batch_loss.detach(), batch.weight.sum()
            of_all = comm.allreduce(sums)  # (P + 2,)
            if not of_all.sum().isfinite():
                raise DivergedError(
                    f"step {step + 1} of {n_steps} (epoch {epoch + 1}): the loss is "
                    f"{float(of_all[-2])}, or its gradient is not finite; last good checkpoint: "
                    f"{checkpoint.newest(options.checkpoints) or 'none'}. Lower learning_rate, or "
                    "look for bad weights in the data"
                )
            # Adam in its paper's efficient order (section 2): no copy of a vector but one.
            gradient = of_all[:-2].div_(of_all[-1])  # (P,)
            if options.weight_decay:
                gradient.add_(vector, alpha=options.weight_decay)  # (P,)
            rate = options.learning_rate * (1 - step / n_steps)
            step += 1
            mean.lerp_(gradient, 1 - _BETA1)  # (P,)
            square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)  # (P,)
            correction = (1 - _BETA2**step) ** 0.5
            spread = square.sqrt().add_(_EPSILON * correction)  # (P,)
            vector.addcdiv_(mean, spread, value=-rate * correction / (1 - _BETA1**step))  # (P,)
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
                state = Checkpoint(epoch + 1, step, vector, mean, square)
                place = checkpoint.save(options.checkpoints, state, options.identity)
                saved_at = time.monotonic()
    by_value = comm.rank == 0 and not options.checkpoints
    return Trained(tuple(history), place, vector.numpy() if by_value else None)


def load_weights(net: nn.Module, trained: Trained) -> None:
    """Put the weights that rank 0 returned into a `net` of the same shape."""
    if trained.vector is None:
        vector = checkpoint.load(trained.place).vector
    else:
        vector = torch.from_numpy(trained.vector)
    nn.utils.vector_to_parameters(vector, net.parameters())


def _as_vectors(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Make all parameters views of one vector (P,), all gradients views of another (P + 2,)."""
    values = nn.utils.parameters_to_vector(net.parameters()).detach()  # (P,)
    sums = torch.zeros(len(values) + 2, dtype=values.dtype)  # (P + 2,)
    at = 0
    for parameter in net.parameters():
        part = slice(at, at + parameter.numel())
        parameter.data = values[part].view_as(parameter)
        parameter.grad = sums[part].view_as(parameter)
        at = part.stop
    return values, sums


def _resume(comm: Comm, vector: torch.Tensor, options: LoopOptions) -> tuple[Checkpoint, str]:
    """Return where all ranks begin, and on rank 0 the checkpoint's place; `vector` (P,) is fresh.

    Rank 0 alone looks for a checkpoint, so that ranks cannot disagree about where to go on.
    """
    state, place = Checkpoint(0, 0, vector, torch.zeros_like(vector), torch.zeros_like(vector)), ""
    if comm.rank == 0:
        place, found = checkpoint.latest(options.checkpoints, options.identity)
        if found:
            state = found
            comm.tell(f"resuming after epoch {state.epoch} of {options.epochs}")
    epoch, step = comm.broadcast(torch.tensor([state.epoch, state.step])).tolist()
    parts = (comm.broadcast(part) for part in (state.vector, state.mean, state.square))
    return Checkpoint(epoch, step, *parts), place


def _seed(*parts: int) -> int:
    """Return a seed for each combination of `parts`."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))

"""The training loop of every network, the same on each rank, from top to bottom.

Each rank adds up the weighted losses of its own rows; gradient, loss and weight are then summed
over all ranks in one vector, and divided by the weight of all. So a step does not depend on how
many ranks share its rows, nor in how many parts a rank reads them: two ranks at batch B take the
step of one at 2B, and the learning rate is that of the whole step and needs no scaling by ranks.
(Losses against drawn candidates are the exception: each rank and part draws its own, and takes
those of its own rows.)
This is one explicit allreduce instead of Horovod's `DistributedOptimizer`, which averages over
ranks, however many rows each has.

Everything random in a batch is drawn from (seed, epoch, batch, rank), torch's own random numbers
(`nn.Dropout`) too: a training that goes on from a checkpoint ends with the same bits as one that was
never interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from recspark.data.blocks import Array
from recspark.errors import DeviceError, DivergedError, FeedError
from recspark.train import checkpoint, parameters
from recspark.train.buffers import average_buffers
from recspark.train.checkpoint import Position
from recspark.train.comm import Comm
from recspark.train.curve import Curve, Epoch
from recspark.train.feed import Batch
from recspark.train.optimisers import Adam, Optimiser
from recspark.train.parameters import Parameters, Rows
from recspark.train.random_numbers import seed_of, torch_random

_LINE_EVERY_S = 15.0

# (batch, generator of everything random, share of the training done in [0, 1)) -> loss of each row
# (B,). It exchanges nothing between ranks.
Loss = Callable[[Batch, torch.Generator, float], torch.Tensor]


class Batches(Protocol):
    """What the loop reads: `recspark.train.feed.Feed`."""

    steps: int
    n_rows_of_all: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Validation:
    """Rows that are not trained on, and what is measured on them after each epoch.

    `value` returns a figure of each row, (B,), without anything random; its mean over the rows of
    all ranks decides which epoch was best.
    """

    batches: Batches
    value: Callable[[Batch], torch.Tensor]
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class LoopOptions:
    """How long, how fast and by what means.

    Parameters
    ----------
    learning_rate : at the first step, of a batch of all ranks together; falls linearly to 0. It and
        `weight_decay` are those of Adam, which moves what `optimisers` does not name
    weight_decay : times the parameter, added to its gradient
    optimisers : of parameters, by their name or that of a module above them, "" being the whole
        network; see `Parameters`
    clip_norm : largest length of the gradient of a step, over all parameters and ranks together;
        a longer one is scaled down to it. None = any length. Source: Pascanu, Mikolov, Bengio 2013,
        "On the Difficulty of Training Recurrent Neural Networks", algorithm 1
    patience : epochs in a row without a better validation value that end the training; 0 = never.
        With validation the best epoch's weights are returned in any case
    seed : with epoch, batch and rank it sets dropout and sampling
    accumulate : batches of a rank that make a step
    precision : of the network's products; `bfloat16` is torch's autocast. Parameters stay float32
    compression : of dense gradients between ranks; `float16` halves them and rounds
    device : where the network runs: cpu, cuda, or auto: a GPU where the rank sees one
    checkpoints : URI of the folder of checkpoints; "" = none, and no resuming
    checkpoint_every_s : seconds between two of them, at the end of a step
    identity : settings and data versions; a checkpoint of other ones is not resumed
    """

    epochs: int
    learning_rate: float
    weight_decay: float = 0.0
    optimisers: Mapping[str, Optimiser] = field(default_factory=dict)
    clip_norm: float | None = None
    patience: int = 0
    seed: int = 1
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    compression: Literal["none", "float16"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    checkpoints: str = ""
    checkpoint_every_s: float = 30.0
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a rank returns: small, but for rank 0's weights where there is no folder for them.

    Parameters
    ----------
    curve : every epoch, those before a resumption too; `best` is the last without validation
    place : their checkpoint, on rank 0, where there is a folder
    weights : `Parameters.weights` as arrays, on rank 0, where there is none
    """

    curve: Curve
    place: str
    weights: dict[str, Array] | None


def train(
    comm: Comm,
    net: nn.Module,
    loss: Loss,
    batches: Batches,
    options: LoopOptions,
    validation: Validation | None = None,
) -> Trained:
    """Train `net` in place on the rows of all ranks.

    Every rank starts from rank 0's weights, or from the newest checkpoint of the same `identity`.
    With a folder for checkpoints the net's weights are those of the last epoch, not of the best.
    Each rank normalises by its own batch (`nn.BatchNorm1d`); the running means that this leaves are
    averaged over ranks at every step. Raises DivergedError, on every rank at the same step, when loss
    or gradient is not finite; FeedError when an epoch's rows do not add up; ModelError when
    `optimisers` names nothing that is trained.
    """
    device = _device(options)
    net.to(device).train()
    adam = Adam(options.learning_rate, options.weight_decay)
    held = Parameters(net, {"": adam, **options.optimisers})
    position = _begin(comm, held, options)
    last_of_epoch = batches.steps - 1
    n_steps = options.epochs * -(-batches.steps // options.accumulate)
    generator = torch.Generator(device)
    saved_at = printed_at = time.monotonic()
    best_weights: dict[str, Array] | None = None
    while position.epoch < options.epochs and not _patience_is_over(position, options):
        begun = time.monotonic() - position.seconds
        held.zero()
        for n, batch in enumerate(batches.epoch(position.epoch, position.batch), position.batch):
            draw = (options.seed, position.epoch, n, comm.rank)
            generator.manual_seed(seed_of(*draw))
            batch = _to(batch, device)
            with (
                torch_random(seed_of(*draw, 1), device),  # not the numbers that `generator` draws
                torch.autocast(device, torch.bfloat16, enabled=options.precision == "bfloat16"),
            ):
                row_loss = loss(batch, generator, position.step / n_steps)  # (B,)
                batch_loss = (row_loss.to(held.sums.dtype) * batch.weight).sum()  # ()
            batch_loss.backward()  # adds to sums[:P] and to the touched rows of tables
            held.sums[-2] += batch_loss.detach()
            held.sums[-1] += batch.weight.sum()
            if (n + 1) % options.accumulate and n < last_of_epoch:
                continue

            average_buffers(comm, net, float(held.sums[-1]))
            gradient, rows, loss_sum, weight = _of_all_ranks(comm, held, options)
            if not np.isfinite(loss_sum + _checksum(gradient, rows)):
                what = f"the loss is {loss_sum}, or its gradient is not finite"
                raise DivergedError(_diverged(position, n_steps, what, options))
            if options.clip_norm is not None:
                _clip(gradient, rows, options.clip_norm)
            held.move(position.step, n_steps, gradient, rows)
            held.zero()
            position = replace(
                position,
                batch=n + 1,
                step=position.step + 1,
                loss=position.loss + loss_sum,
                rows=position.rows + weight,
                seconds=time.monotonic() - begun,
            )
            if comm.rank == 0 and n < last_of_epoch:
                if time.monotonic() - printed_at >= _LINE_EVERY_S:
                    comm.tell(_batch_line(position, batches, options))
                    printed_at = time.monotonic()
                due = time.monotonic() - saved_at >= options.checkpoint_every_s
                if options.checkpoints and due:
                    checkpoint.save(options.checkpoints, position, held.state(), options.identity)
                    saved_at = time.monotonic()

        if round(position.rows) != batches.n_rows_of_all:
            raise FeedError(
                f"epoch {position.epoch + 1} counted {position.rows:.0f} rows over all ranks, "
                f"planned were {batches.n_rows_of_all}"
            )
        value = None if validation is None else _validate(comm, net, validation, device)
        if value is not None and not np.isfinite(value):
            raise DivergedError(
                _diverged(position, n_steps, f"its validation value is {value}", options)
            )
        done = Epoch(
            position.epoch + 1,
            position.loss / position.rows,
            position.rows / position.seconds,
            value,
            position.seconds,
        )
        improved = validation is None or _is_better(done, position, validation)
        position = Position(
            epoch=done.epoch,
            step=position.step,
            curve=(*position.curve, done),
            best=done.epoch if improved else position.best,
        )
        if comm.rank == 0:
            comm.tell(_epoch_line(done, position, options))
            printed_at = time.monotonic()
            over = position.epoch == options.epochs or _patience_is_over(position, options)
            due = time.monotonic() - saved_at >= options.checkpoint_every_s
            kept = improved and validation is not None
            if options.checkpoints and (due or over or kept):
                checkpoint.save(options.checkpoints, position, held.state(), options.identity)
                saved_at = time.monotonic()
            if not options.checkpoints and improved and (kept or over):
                best_weights = _arrays(held)
    place = checkpoint.at_epoch(options.checkpoints, position.best) if options.checkpoints else ""
    return Trained(
        Curve(position.curve, position.best), place if comm.rank == 0 else "", best_weights
    )


def load_weights(net: nn.Module, trained: Trained) -> None:
    """Put the weights that rank 0 returned into a `net` of the same shape."""
    if trained.weights is None:
        weights = checkpoint.load(trained.place)
    else:
        weights = {name: torch.from_numpy(array) for name, array in trained.weights.items()}
    parameters.load_weights(net, weights)


def load_table(trained: Trained, name: str) -> Array:
    """Return one tensor of `Parameters` alone, of a net that is too large to hold as a whole."""
    if trained.weights is None:
        return checkpoint.load(trained.place, [name])[name].numpy()
    return trained.weights[name]


def _begin(comm: Comm, held: Parameters, options: LoopOptions) -> Position:
    """Give all ranks the state that rank 0 has, fresh or from a checkpoint; return its position.

    Rank 0 alone looks for a checkpoint, so that ranks cannot disagree about where to go on.
    """
    position, state = Position(), held.state()
    if comm.rank == 0:
        newest = checkpoint.latest(options.checkpoints, options.identity, state, comm.tell)
        if newest:
            position, place = newest
            for name, tensor in state.items():  # one at a time: they may fill the memory
                tensor.copy_(checkpoint.load(place, [name])[name])
            within = f", batch {position.batch}" if position.batch else ""
            comm.tell(f"resuming after epoch {position.epoch} of {options.epochs}{within}")
    for tensor in state.values():
        tensor.copy_(comm.broadcast(tensor))
    text = torch.from_numpy(np.frombuffer(position.to_json(), np.uint8).copy())
    length = int(comm.broadcast(torch.tensor([len(text)])))
    text = comm.broadcast(text if comm.rank == 0 else text.new_zeros(length))
    return Position.from_json(text.numpy().tobytes())


def _of_all_ranks(
    comm: Comm, held: Parameters, options: LoopOptions
) -> tuple[torch.Tensor, dict[str, Rows], float, float]:
    """Return the mean gradient of all ranks' rows, (P,) and by table, their loss and weight."""
    rows = held.rows()
    if options.compression == "float16":
        # Rounded as means of a rank, far from float16's largest number.
        loss_and_weight = comm.allreduce(held.sums[-2:])  # (2,)
        mean = held.sums[:-2] / loss_and_weight[1]  # (P,)
        gradient = comm.allreduce(mean.half()).to(mean.dtype)  # (P,)
    else:
        of_all = comm.allreduce(held.sums)  # (P + 2,)
        loss_and_weight = of_all[-2:]  # (2,)
        gradient = of_all[:-2].div_(of_all[-1])  # (P,)
    loss_sum, weight = loss_and_weight.tolist()
    mean_rows = {}
    for name, (indices, values) in rows.items():
        if comm.size > 1:
            indices, values = comm.allgather(indices), comm.allgather(values)  # (v,), (v, d)
        indices, which = torch.unique(indices, return_inverse=True)  # (u,), (v,)
        summed = values.new_zeros(len(indices), *values.shape[1:]).index_add_(0, which, values)
        # Rows at weight 0 only fill a batch up: what they touch must not move.
        moved = summed.any(dim=1)  # (u,)
        mean_rows[name] = indices[moved], summed[moved].div_(weight)  # (u,), (u, d)
    return gradient, mean_rows, loss_sum, weight


def _validate(comm: Comm, net: nn.Module, validation: Validation, device: str) -> float:
    """Return the mean value of all ranks' validation rows, each counted once."""
    sums = torch.zeros(2, dtype=torch.float64)  # value, weight
    net.eval()
    with torch.no_grad():
        for batch in validation.batches.epoch(0):
            batch = _to(batch, device)
            value = validation.value(batch)  # (B,)
            sums[0] += float((value.double() * batch.weight).sum())
            sums[1] += float(batch.weight.sum())
    net.train()
    value_sum, rows = comm.allreduce(sums).tolist()
    if round(rows) != validation.batches.n_rows_of_all:
        raise FeedError(
            f"validation counted {rows:.0f} rows over all ranks, planned were "
            f"{validation.batches.n_rows_of_all}"
        )
    return float(value_sum / rows)


def _is_better(done: Epoch, position: Position, validation: Validation) -> bool:
    """Return whether this epoch's validation value beats the best one so far."""
    assert done.validation is not None
    if position.best == 0:
        return True
    best = position.curve[position.best - 1].validation
    assert best is not None
    lower = validation.better == "lower"
    return done.validation < best if lower else done.validation > best


def _patience_is_over(position: Position, options: LoopOptions) -> bool:
    return 0 < options.patience <= position.epoch - position.best


def _checksum(gradient: torch.Tensor, rows: dict[str, Rows]) -> float:
    """Return a number that is not finite where any gradient is not."""
    return float(gradient.sum()) + sum(float(values.sum()) for _, values in rows.values())


def _clip(gradient: torch.Tensor, rows: dict[str, Rows], longest: float) -> None:
    """Scale the whole gradient, in place, to the length `longest` where it is longer."""
    parts = [gradient, *(values for _, values in rows.values())]
    length = nn.utils.get_total_norm(parts)  # ()
    if length > longest:
        for part in parts:
            part.mul_(longest / length)


def _arrays(held: Parameters) -> dict[str, Array]:
    return {name: tensor.cpu().numpy().copy() for name, tensor in held.weights().items()}


def _diverged(position: Position, n_steps: int, what: str, options: LoopOptions) -> str:
    good = checkpoint.newest(options.checkpoints) or "none"
    return (
        f"step {min(position.step + 1, n_steps)} of {n_steps} (epoch {position.epoch + 1}): "
        f"{what}; last good checkpoint: {good}. Lower learning_rate, or look for bad weights in the data"
    )


def _batch_line(position: Position, batches: Batches, options: LoopOptions) -> str:
    """Return the line that says how far an epoch is."""
    share = position.batch / batches.steps
    left = position.seconds / share * (1 - share)
    return (
        f"epoch {position.epoch + 1} of {options.epochs}, "
        f"batch {position.batch} of {batches.steps}: loss {position.loss / position.rows:.4f}, "
        f"{position.rows / position.seconds:,.0f} rows/s, {left:.0f} s to its end"
    )


def _epoch_line(done: Epoch, position: Position, options: LoopOptions) -> str:
    """Return the line at an epoch's end."""
    validation = "" if done.validation is None else f", validation {done.validation:.4f}"
    left = (options.epochs - done.epoch) * done.seconds
    last = f"{left:.0f} s left" if left else "done"
    if _patience_is_over(position, options):
        last = f"no better for {options.patience} epochs: done, best was epoch {position.best}"
    return (
        f"epoch {done.epoch} of {options.epochs}: loss {done.loss:.4f}{validation}, "
        f"{done.rows_per_s:,.0f} rows/s, {last}"
    )


def _device(options: LoopOptions) -> str:
    """Return cpu or cuda; ranks of a machine share its first GPU. DeviceError where there is none."""
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise DeviceError(
            "train.device is cuda, but this rank sees no GPU; set it to auto or cpu, or give the "
            "executors one (spark.executor.resource.gpu.amount)"
        )
    return "cuda" if has_gpu and options.device != "cpu" else "cpu"


def _to(batch: Batch, device: str) -> Batch:
    if device == "cpu":
        return batch
    tensors = {name: tensor.to(device) for name, tensor in batch.tensors.items()}
    return Batch(tensors, batch.weight.to(device))

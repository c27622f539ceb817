"""The training loop of every network. Each rank runs all of it.

Each rank adds up the weighted losses of its own rows. Gradient, loss and weight are then summed
over all ranks in one vector, and divided by the weight of all rows. So a step does not depend on
how many ranks share its rows, nor on the number of batches in which a rank reads its rows. Two
ranks that read B rows each take the step of one rank that reads 2B rows. The learning rate is that
of the step of all ranks, and needs no scaling by the number of ranks. (Losses against drawn
candidates are the exception: each rank draws candidates for each of its batches, among them the
targets of that batch.)

The loop calls allreduce itself. Horovod's `DistributedOptimizer` is not used: it averages over
ranks without regard to how many rows each has.

Everything random in a batch is drawn from (seed, epoch, batch, rank), also torch's random numbers,
as in `nn.Dropout`. So a training that goes on from a checkpoint ends with the same bits as one that
was never interrupted.
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

_LINE_EVERY_S = 15.0  # seconds between two lines about the progress of an epoch

# (batch, generator to draw everything random from, finished share of the training in [0, 1)) ->
# loss of each row (B,). A loss exchanges nothing between ranks.
Loss = Callable[[Batch, torch.Generator, float], torch.Tensor]


class Batches(Protocol):
    """The batches of one rank that the loop reads, such as `recspark.train.feed.Feed`."""

    steps: int
    n_rows_of_all: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Validation:
    """Rows that are not trained on, and the figure that is measured on them after each epoch.

    `value` returns one number per row, (B,), and draws nothing random. The mean over the rows of
    all ranks decides which epoch was best.
    """

    batches: Batches
    value: Callable[[Batch], torch.Tensor]
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class LoopOptions:
    """The settings of a training: how long, how fast, on which device, with which checkpoints.

    Parameters
    ----------
    epochs : largest number of epochs
    learning_rate : rate of Adam at the first step, for the rows of all ranks together; it falls
        linearly to 0. Adam moves all parameters that `optimisers` does not name
    weight_decay : of Adam: this times the parameter is added to the parameter's gradient
    optimisers : by the name of a parameter, or of a module that contains parameters; "" is the
        network. See `Parameters`
    clip_norm : largest length of the gradient of a step, over all parameters and ranks together. A
        longer gradient is scaled down to this length. None = no limit. Source: Pascanu, Mikolov,
        Bengio 2013, "On the Difficulty of Training Recurrent Neural Networks", algorithm 1
    patience : the training ends after this many epochs in a row without a better validation value;
        0 = never. With validation the weights of the best epoch are returned in any case
    seed : together with epoch, batch and rank it determines dropout and sampling
    accumulate : number of batches of a rank that make one step
    precision : of the network's matrix products; `bfloat16` is torch's autocast. Parameters stay
        float32
    compression : of dense gradients sent between ranks; `float16` halves their size and rounds them
    device : where the network runs. `auto` takes a GPU where the rank sees one, else the CPU
    checkpoints : URI of the folder of checkpoints; "" = no checkpoints, and no resuming
    checkpoint_every_s : seconds between two checkpoints, which are written at the end of a step
    identity : settings and data versions. A training resumes only from a checkpoint with an equal
        one
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
    """The result of a training on one rank.

    The weights are in a checkpoint where there is a folder for checkpoints, else in `weights`. All
    else is small.

    Parameters
    ----------
    curve : figures of every epoch, also of those before a resumption; without validation `best` is
        the last epoch
    checkpoint_uri : checkpoint of the best epoch, on rank 0 and with a folder for checkpoints; else
        ""
    weights : `Parameters.weights` of the best epoch as arrays, on rank 0 and without a folder; else
        None
    """

    curve: Curve
    checkpoint_uri: str
    weights: dict[str, Array] | None


def train_network(
    comm: Comm,
    net: nn.Module,
    loss: Loss,
    batches: Batches,
    options: LoopOptions,
    validation: Validation | None = None,
) -> Trained:
    """Train `net` in place on the rows of all ranks.

    Every rank starts from the weights of rank 0, or from the newest checkpoint with an equal
    `identity`. Afterwards `net` holds the weights of the last epoch, not of the best one;
    `load_weights` puts those into a network.

    A normalisation over the batch (`nn.BatchNorm1d`) is computed on each rank from the rank's own
    batch. The running means of such layers are averaged over ranks at every step.

    Raises DivergedError, on every rank at the same step, when loss or gradient is not finite, and
    also when the validation value is not. Raises FeedError when the rows of an epoch or of the
    validation do not add up, and ModelError when `optimisers` has a name that fits no trained
    parameter.
    """
    device = _device(options)
    net.to(device).train()
    adam = Adam(options.learning_rate, options.weight_decay)
    params = Parameters(net, {"": adam, **options.optimisers})
    position = _start_state(comm, params, options)
    last_batch = batches.steps - 1
    n_steps = options.epochs * -(-batches.steps // options.accumulate)
    generator = torch.Generator(device)
    saved_at = printed_at = time.monotonic()
    best_weights: dict[str, Array] | None = None
    while position.epoch < options.epochs and not _patience_is_over(position, options):
        begun = time.monotonic() - position.seconds
        params.zero()
        for batch_index, batch in enumerate(
            batches.epoch(position.epoch, position.batch), position.batch
        ):
            seed_parts = (options.seed, position.epoch, batch_index, comm.rank)
            generator.manual_seed(seed_of(*seed_parts))
            batch = _to_device(batch, device)
            with (
                # The 1 makes a seed that differs from that of `generator`.
                torch_random(seed_of(*seed_parts, 1), device),
                torch.autocast(device, torch.bfloat16, enabled=options.precision == "bfloat16"),
            ):
                row_loss = loss(batch, generator, position.step / n_steps)  # (B,)
                batch_loss = (row_loss.to(params.sums.dtype) * batch.weight).sum()  # ()
            batch_loss.backward()  # adds to sums[:P] and to the gradients of touched table rows
            params.sums[-2] += batch_loss.detach()
            params.sums[-1] += batch.weight.sum()
            if (batch_index + 1) % options.accumulate and batch_index < last_batch:
                continue  # more batches of this step follow

            average_buffers(comm, net, float(params.sums[-1]))
            gradient, rows, loss_sum, weight = _reduce_over_ranks(comm, params, options)
            if not np.isfinite(loss_sum + _gradient_sum(gradient, rows)):
                problem = f"the loss is {loss_sum}, or its gradient is not finite"
                raise DivergedError(
                    _divergence_message(position.step + 1, n_steps, position, problem, options)
                )
            if options.clip_norm is not None:
                _clip_in_place(gradient, rows, options.clip_norm)
            params.move(position.step, n_steps, gradient, rows)
            params.zero()
            position = replace(
                position,
                batch=batch_index + 1,
                step=position.step + 1,
                loss=position.loss + loss_sum,
                rows=position.rows + weight,
                seconds=time.monotonic() - begun,
            )
            if comm.rank == 0 and batch_index < last_batch:
                if time.monotonic() - printed_at >= _LINE_EVERY_S:
                    comm.tell(_batch_line(position, batches, options))
                    printed_at = time.monotonic()
                is_due = time.monotonic() - saved_at >= options.checkpoint_every_s
                if options.checkpoints and is_due:
                    checkpoint.save(options.checkpoints, position, params.state(), options.identity)
                    saved_at = time.monotonic()

        if round(position.rows) != batches.n_rows_of_all:
            raise FeedError(
                f"epoch {position.epoch + 1} counted {position.rows:.0f} rows over all ranks, "
                f"planned were {batches.n_rows_of_all}"
            )
        value = None if validation is None else _validate(comm, net, validation, device)
        if value is not None and not np.isfinite(value):
            problem = f"its validation value is {value}"
            raise DivergedError(
                _divergence_message(position.step, n_steps, position, problem, options)
            )
        finished = Epoch(
            position.epoch + 1,
            position.loss / position.rows,
            position.rows / position.seconds,
            value,
            position.seconds,
        )
        is_best = validation is None or _is_better(finished, position, validation)
        position = Position(
            epoch=finished.epoch,
            step=position.step,
            curve=(*position.curve, finished),
            best=finished.epoch if is_best else position.best,
        )
        if comm.rank == 0:
            comm.tell(_epoch_line(finished, position, options))
            printed_at = time.monotonic()
            is_over = position.epoch == options.epochs or _patience_is_over(position, options)
            is_due = time.monotonic() - saved_at >= options.checkpoint_every_s
            is_best_by_validation = is_best and validation is not None
            if options.checkpoints and (is_due or is_over or is_best_by_validation):
                checkpoint.save(options.checkpoints, position, params.state(), options.identity)
                saved_at = time.monotonic()
            if not options.checkpoints and is_best and (is_best_by_validation or is_over):
                best_weights = _weight_arrays(params)
    checkpoint_uri = (
        checkpoint.at_epoch(options.checkpoints, position.best) if options.checkpoints else ""
    )
    return Trained(
        Curve(position.curve, position.best), checkpoint_uri if comm.rank == 0 else "", best_weights
    )


def load_weights(net: nn.Module, trained: Trained) -> None:
    """Copy the best epoch's weights, as rank 0 returned them, into a `net` of the same shape."""
    if trained.weights is None:
        weights = checkpoint.load(trained.checkpoint_uri)
    else:
        weights = {name: torch.from_numpy(array) for name, array in trained.weights.items()}
    parameters.load_weights(net, weights)


def load_table(trained: Trained, name: str) -> Array:
    """Return one tensor of the trained weights by its name in `Parameters`.

    Use it for a network that is too large to hold in memory at once.
    """
    if trained.weights is None:
        return checkpoint.load(trained.checkpoint_uri, [name])[name].numpy()
    return trained.weights[name]


def _start_state(comm: Comm, params: Parameters, options: LoopOptions) -> Position:
    """Copy the state of rank 0 to all ranks, and return its position.

    The state is that of a new training, or of a checkpoint. Only rank 0 looks for a checkpoint, so
    that ranks cannot disagree about where to go on.
    """
    position, state = Position(), params.state()
    if comm.rank == 0:
        newest = checkpoint.latest(options.checkpoints, options.identity, state, comm.tell)
        if newest:
            position, uri = newest
            for name, tensor in state.items():  # one at a time: all may not fit in memory
                tensor.copy_(checkpoint.load(uri, [name])[name])
            batch_text = f", batch {position.batch}" if position.batch else ""
            comm.tell(f"resuming after epoch {position.epoch} of {options.epochs}{batch_text}")
    for tensor in state.values():
        tensor.copy_(comm.broadcast(tensor))
    text = torch.from_numpy(np.frombuffer(position.to_json(), np.uint8).copy())
    length = int(comm.broadcast(torch.tensor([len(text)])))
    text = comm.broadcast(text if comm.rank == 0 else text.new_zeros(length))
    return Position.from_json(text.numpy().tobytes())


def _reduce_over_ranks(
    comm: Comm, params: Parameters, options: LoopOptions
) -> tuple[torch.Tensor, dict[str, Rows], float, float]:
    """Return the mean gradient over the rows of all ranks, and their summed losses and weights.

    The result is (gradient of the vector (P,), gradients of table rows by table, sum of the losses,
    sum of the weights).

    Example of a table: rank 0 has gradients for the rows [3, 5], rank 1 for [1, 3]. Joined they are
    [3, 5, 1, 3], and the distinct rows are [1, 3, 5]; the two gradients of row 3 are added up.
    """
    rows = params.rows()
    if options.compression == "float16":
        # A rank's share of the mean is rounded to float16; a sum could exceed its largest number.
        loss_and_weight = comm.allreduce(params.sums[-2:])  # (2,)
        mean_of_rank = params.sums[:-2] / loss_and_weight[1]  # (P,)
        gradient = comm.allreduce(mean_of_rank.half()).to(mean_of_rank.dtype)  # (P,)
    else:
        sums_of_all_ranks = comm.allreduce(params.sums)  # (P + 2,)
        loss_and_weight = sums_of_all_ranks[-2:]  # (2,)
        gradient = sums_of_all_ranks[:-2].div_(sums_of_all_ranks[-1])  # (P,)
    loss_sum, weight = loss_and_weight.tolist()
    mean_rows = {}
    for name, (indices, values) in rows.items():
        if comm.size > 1:
            indices, values = comm.allgather(indices), comm.allgather(values)  # (v,), (v, d)
        indices, index_of_value = torch.unique(indices, return_inverse=True)  # (u,), (v,)
        row_sums = values.new_zeros(len(indices), *values.shape[1:]).index_add_(
            0, index_of_value, values
        )
        # Batch rows at weight 0 only fill up the batch. What only they touched must not move.
        is_moved = row_sums.any(dim=1)  # (u,)
        mean_rows[name] = indices[is_moved], row_sums[is_moved].div_(weight)  # (u,), (u, d)
    return gradient, mean_rows, loss_sum, weight


def _validate(comm: Comm, net: nn.Module, validation: Validation, device: str) -> float:
    """Return the mean value over the validation rows of all ranks; each row counts once."""
    sums = torch.zeros(2, dtype=torch.float64)  # value, weight
    net.eval()
    with torch.no_grad():
        for batch in validation.batches.epoch(0):
            batch = _to_device(batch, device)
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


def _is_better(finished: Epoch, position: Position, validation: Validation) -> bool:
    """Return whether the validation value of the finished epoch is better than the best so far."""
    assert finished.validation is not None
    if position.best == 0:
        return True
    best = position.curve[position.best - 1].validation
    assert best is not None
    is_lower_better = validation.better == "lower"
    return finished.validation < best if is_lower_better else finished.validation > best


def _patience_is_over(position: Position, options: LoopOptions) -> bool:
    return 0 < options.patience <= position.epoch - position.best


def _gradient_sum(gradient: torch.Tensor, rows: dict[str, Rows]) -> float:
    """Return the sum of all gradients, which is not finite if any number in them is not."""
    return float(gradient.sum()) + sum(float(values.sum()) for _, values in rows.values())


def _clip_in_place(gradient: torch.Tensor, rows: dict[str, Rows], max_length: float) -> None:
    """Scale all gradients together down to the length `max_length`, in place, if longer."""
    tensors = [gradient, *(values for _, values in rows.values())]
    length = nn.utils.get_total_norm(tensors)  # ()
    if length > max_length:
        for values in tensors:
            values.mul_(max_length / length)


def _weight_arrays(params: Parameters) -> dict[str, Array]:
    return {name: tensor.cpu().numpy().copy() for name, tensor in params.weights().items()}


def _divergence_message(
    step: int, n_steps: int, position: Position, problem: str, options: LoopOptions
) -> str:
    """Return the message of DivergedError for the step at which the problem was seen, from 1."""
    last_good = checkpoint.newest(options.checkpoints) or "none"
    return (
        f"step {step} of {n_steps} (epoch {position.epoch + 1}): "
        f"{problem}; last good checkpoint: {last_good}. Lower learning_rate, or look for bad "
        "weights in the data"
    )


def _batch_line(position: Position, batches: Batches, options: LoopOptions) -> str:
    """Return the line that reports the progress within an epoch."""
    share = position.batch / batches.steps
    remaining_s = position.seconds / share * (1 - share)
    return (
        f"epoch {position.epoch + 1} of {options.epochs}, "
        f"batch {position.batch} of {batches.steps}: loss {position.loss / position.rows:.4f}, "
        f"{position.rows / position.seconds:,.0f} rows/s, {remaining_s:.0f} s to its end"
    )


def _epoch_line(finished: Epoch, position: Position, options: LoopOptions) -> str:
    """Return the line that reports a finished epoch."""
    validation_text = (
        "" if finished.validation is None else f", validation {finished.validation:.4f}"
    )
    remaining_s = (options.epochs - finished.epoch) * finished.seconds
    ending = f"{remaining_s:.0f} s left" if remaining_s else "done"
    if _patience_is_over(position, options):
        ending = f"no better for {options.patience} epochs: done, best was epoch {position.best}"
    return (
        f"epoch {finished.epoch} of {options.epochs}: loss {finished.loss:.4f}{validation_text}, "
        f"{finished.rows_per_s:,.0f} rows/s, {ending}"
    )


def _device(options: LoopOptions) -> str:
    """Return `cpu` or `cuda`. All ranks of a machine share its first GPU.

    Raises DeviceError where `cuda` is set and the rank sees no GPU.
    """
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise DeviceError(
            "train.device is cuda, but this rank sees no GPU; set it to auto or cpu, or give the "
            "executors one (spark.executor.resource.gpu.amount)"
        )
    return "cuda" if has_gpu and options.device != "cpu" else "cpu"


def _to_device(batch: Batch, device: str) -> Batch:
    if device == "cpu":
        return batch
    tensors = {name: tensor.to(device) for name, tensor in batch.tensors.items()}
    return Batch(tensors, batch.weight.to(device))

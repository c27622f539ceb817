"""Rows of `training_timelines` as examples: what a user did before, the item that came next, when.

An example is a target and what was before it in time. Everything that a network reads of an example
is known at the moment of the target: nothing of the target and of later events is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from recspark.data.blocks import Array, Histories, Ragged, local_index, where
from recspark.data.training_rows import seconds_before
from recspark.models.neural import look_up, one_thread
from recspark.train.comm import Comm
from recspark.train.feed import Batch

COLUMNS = ("items", "ages")
# A share of `age_shares` is that of the examples younger than 2^(n / _BINS_PER_OCTAVE) - 1 seconds.
_BINS_PER_OCTAVE = 32
N_AGE_SHARES = 31 * _BINS_PER_OCTAVE + 1  # ages are at most 2^31 - 1 seconds


@dataclass(frozen=True)
class Timelines:
    """The known items of a batch of B rows, oldest first, and the age of each.

    `items` int64 (B, L): local, padded at the end with -1. `ages` int64 (B, L): seconds before the
    cutoff, 0 in the padding. `lengths` int64 (B,): items of each row before the padding. `types`
    int64 (B, L): codes of event types, 0 in the padding; None where the batch has none.
    """

    items: torch.Tensor
    ages: torch.Tensor
    lengths: torch.Tensor
    types: torch.Tensor | None = None


@dataclass(frozen=True)
class Examples:
    """P examples of a batch: target `ends` int64 (P,) of row `rows` int64 (P,), ascending.

    The items before the position `ends` of the row are what was before the target.
    """

    rows: torch.Tensor
    ends: torch.Tensor


def timelines_of(batch: Batch, vocabulary: torch.Tensor) -> Timelines:
    """Return the rows of a batch; items outside the vocabulary are left out.

    Example: with the vocabulary [3, 5, 8], the row [8, 99, 3, -1] with the ages [9, 7, 4, 0] gives
    the items [2, 0], then padding, and the ages [9, 4].
    """
    local, is_known = look_up(batch.tensors["items"], vocabulary)  # (B, L) each
    order = torch.argsort((~is_known).int(), dim=1, stable=True)  # (B, L): known items first
    lengths = is_known.sum(dim=1)  # (B,)
    width = max(2, int(lengths.max()))

    def known_first(values: torch.Tensor, padding: int) -> torch.Tensor:
        return torch.where(is_known, values.long(), padding).gather(1, order)[:, :width]

    types = batch.tensors.get("types")
    return Timelines(
        known_first(local, -1),
        known_first(batch.tensors["ages"], 0),
        lengths,
        None if types is None else known_first(types, 0),
    )


def drawn_examples(
    is_target: torch.Tensor, n_examples: int, generator: torch.Generator
) -> Examples:
    """Return `n_examples` different targets of each row, drawn evenly; all of a row with fewer.

    `is_target` bool (B, L): the items that can be a target; see `later_items`.
    """
    draws = torch.rand(is_target.shape, generator=generator, device=is_target.device)  # (B, L)
    order = draws.masked_fill(~is_target, 2.0).argsort(dim=1)[:, :n_examples]  # (B, n)
    is_drawn = is_target.gather(1, order)  # (B, n)
    rows, columns = torch.nonzero(is_drawn, as_tuple=True)  # (P,) each
    return Examples(rows, order[rows, columns])


def later_items(timelines: Timelines, weight: torch.Tensor) -> torch.Tensor:
    """Return whether something of the row comes before an item, bool (B, L).

    False for padding and for rows of `weight` 0, (B,).
    """
    is_later = (timelines.items >= 0) & (weight[:, None] > 0)  # (B, L)
    is_later[:, 0] = False
    return is_later


def mean_per_row(losses: torch.Tensor, rows: torch.Tensor, n_rows: int) -> torch.Tensor:
    """Return the mean loss of the examples of each row, (n_rows,); 0 for a row without examples.

    So each user weighs the same, however many examples the user has. `losses` (P,).
    """
    n_examples = torch.bincount(rows, minlength=n_rows).clamp_min(1)  # (n_rows,)
    return losses.new_zeros(n_rows).index_add(0, rows, losses) / n_examples


def target_counts(
    comm: Comm,
    batches: Iterator[Batch],
    vocabulary: torch.Tensor,
    n_examples: int,
    targets: Callable[[Timelines, torch.Tensor], torch.Tensor] = later_items,
) -> torch.Tensor:
    """Return how often each item is expected as a target of an epoch of all ranks, (n_items,).

    Of the possible `targets` of each row, `n_examples` are drawn. float64.
    """
    total = torch.zeros(len(vocabulary), dtype=torch.float64)
    for batch in batches:
        timelines = timelines_of(batch, vocabulary)
        is_target = targets(timelines, batch.weight)  # (B, L)
        n_targets = is_target.sum(dim=1).clamp_min(1)  # (B,)
        chance = (n_examples / n_targets.double()).clamp_max(1)  # (B,)
        rows, columns = torch.nonzero(is_target, as_tuple=True)  # (P,) each
        total.index_add_(0, timelines.items[rows, columns], chance[rows])
    return comm.allreduce(total)


def first_ages(comm: Comm, batches: Iterator[Batch], vocabulary: torch.Tensor) -> torch.Tensor:
    """Return the age of each item's oldest event in the rows of all ranks, int64 (n_items,).

    An item that is in no row has -1. Before its oldest event, an item may not have existed.
    """
    oldest = torch.full((len(vocabulary),), -1)  # (n_items,)
    for batch in batches:
        timelines = timelines_of(batch, vocabulary)
        is_item = (timelines.items >= 0) & (batch.weight[:, None] > 0)  # (B, L)
        items, ages = timelines.items[is_item], timelines.ages[is_item]  # (P,) each
        oldest.scatter_reduce_(0, items, ages, "amax")
    return comm.allgather(oldest[None]).amax(dim=0)


def age_shares(comm: Comm, batches: Iterator[Batch], vocabulary: torch.Tensor) -> torch.Tensor:
    """Return the distribution of the ages of all possible targets, float64 (N_AGE_SHARES,).

    Entry n is the share of the targets of all ranks that are younger than
    2^(n / _BINS_PER_OCTAVE) - 1 seconds: 0 at first, 1 at the end.
    """
    counts = torch.zeros(N_AGE_SHARES, dtype=torch.float64)
    for batch in batches:
        timelines = timelines_of(batch, vocabulary)
        is_target = later_items(timelines, batch.weight)  # (B, L)
        bins = (_octaves(timelines.ages[is_target]) * _BINS_PER_OCTAVE).long()  # (P,)
        counts += torch.bincount(bins.clamp_max(N_AGE_SHARES - 2), minlength=N_AGE_SHARES)
    counts = comm.allreduce(counts)
    below = counts.cumsum(0) - counts  # (N_AGE_SHARES,): targets in earlier bins
    return below / counts.sum().clamp_min(1)


def age_position(ages: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return the share of the targets that are younger than `ages`, in [0, 1], float64; same shape.

    `shares` : see `age_shares`. Between two entries, the share is interpolated. The age 0, which is
    that of a recommendation at the cutoff, has the position 0.
    """
    place = (_octaves(ages) * _BINS_PER_OCTAVE).clamp_max(N_AGE_SHARES - 1)
    below = place.long().clamp_max(N_AGE_SHARES - 2)
    low, high = shares.double()[below], shares.double()[below + 1]
    return low + (place - below) * (high - low)


def log_seconds(seconds: torch.Tensor) -> torch.Tensor:
    """Return log2(1 + seconds) / 31, in [0, 1] for seconds of 32 bits, float64; same shape."""
    return _octaves(seconds) / 31


def _octaves(seconds: torch.Tensor) -> torch.Tensor:
    return torch.log2(1 + seconds.double())


def newest_events(
    history: Histories, items: Array, as_of: int, length: int
) -> tuple[Ragged, Array]:
    """Return the newest `length` known items of each row in time order, and the age of each.

    The items are local indices, int64. The ages are whole seconds before `as_of`, int64. Both are
    what a training row with the same events has. `items` item_idx int32 (n_items,), ascending: the
    vocabulary. `as_of` is in microseconds since 1970 UTC.
    """
    newest = newest_known(history, items, length)
    ages = seconds_before(newest.event_at, as_of).astype(np.int64)
    return Ragged(newest.start, local_index(items, newest.item_idx)), ages


def newest_known(history: Histories, items: Array, length: int) -> Histories:
    """Return the newest `length` events of each row on `items`, item_idx int32 ascending."""
    known = where(history, local_index(items, history.item_idx) >= 0)
    n_after = known.start[1:][known.rows] - np.arange(len(known.item_idx))  # 1 = newest of its row
    return where(known, n_after <= length)


def vectors_in_blocks(
    events: Ragged,
    ages: Array,
    item_vectors: Array,
    shape: tuple[int, int],
    size: int,
    padding_age: int,
    vectors_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> Array:
    """Return the vector of each row of `events`, float32 (n, H).

    Parameters
    ----------
    events, ages : as `newest_events` returns them
    item_vectors : (n_items, E)
    shape : B, the rows that are computed at once, and L, the items that each row is padded to.
        Always these, because the rounding of a sum depends on the shape of the arrays
    size : H
    padding_age : the age of the padding, whose vectors are 0
    vectors_of : computes the vectors of a block, (B, H), from the vectors of its items, float64
        (B, L, E), oldest first, their ages, int64 (B, L), and the number of items of each row,
        int64 (B,)

    One thread, without gradients. The last block is filled up with rows without items.
    """
    n_in_block, length = shape
    vectors = np.zeros((len(events.lengths), size), np.float32)
    with torch.no_grad(), one_thread():
        for begin in range(0, len(events.lengths), n_in_block):
            end = min(begin + n_in_block, len(events.lengths))
            lengths = np.zeros(n_in_block, np.int64)  # (B,)
            lengths[: end - begin] = events.lengths[begin:end]
            row, position = np.nonzero(np.arange(length) < lengths[:, None])
            event = slice(events.start[begin], events.start[end])  # in the order of row, position
            embedded = np.zeros((*shape, item_vectors.shape[1]))  # (B, L, E)
            embedded[row, position] = item_vectors[events.values[event]]
            block_ages = np.full(shape, padding_age)  # (B, L)
            block_ages[row, position] = ages[event]
            block = vectors_of(*map(torch.from_numpy, (embedded, block_ages, lengths)))  # (B, H)
            vectors[begin:end] = block[: end - begin].numpy()
    return vectors

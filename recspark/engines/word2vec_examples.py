"""From sentences to the examples that a word2vec epoch learns from.

Everything random about a sentence is decided by (seed, epoch, its id, the place in it): partitions
and retries change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyspark.sql.types import BinaryType

from recspark import schema
from recspark.data.blocks import Array
from recspark.engines.compiled import compiled
from recspark.engines.word2vec_kernels import key, mix

SENTENCES = schema.columns(sentence_id=schema.LONG, items=schema.ITEM_IDXS)
PACKED = schema.columns(ids=BinaryType(), lengths=BinaryType(), items=BinaryType())
WHOLE = 2**31 - 1  # a window that no sentence exceeds
_PACK_ITEMS = 1 << 20  # items in a packed row
_EXAMPLES_AT_ONCE = 1 << 21  # inputs made at once: about 50 MB of arrays
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_11 = np.uint64(11)
_PIECE = np.int64(0x2545F4914F6CDD1D)  # spreads the ids of a sentence's pieces


@dataclass(frozen=True)
class Sentences:
    """`ids` int64 (n,); sentence s has `items[start[s]:start[s + 1]]`, int32 indices of items."""

    ids: Array
    start: Array
    items: Array


@dataclass(frozen=True)
class Examples:
    """Example e: `targets[e]` int32 from `inputs[start[e]:start[e + 1]]` int32; `keys` uint64 order
    them.
    """

    keys: Array
    targets: Array
    start: Array
    inputs: Array

    def take(self, rows: Array) -> Examples:
        """Return the examples at `rows`, in that order."""
        start, inputs = take_ragged(self.start, self.inputs, rows)
        return Examples(self.keys[rows], self.targets[rows], start, inputs)


def take_ragged(start: Array, values: Array, rows: Array) -> tuple[Array, Array]:
    """Return (start, values) of `rows` of a ragged array, in that order."""
    if len(values) == len(start) - 1 and start[-1] == len(values):
        ones = np.diff(start)
        if len(ones) == 0 or (ones.min() == 1 and ones.max() == 1):
            return np.arange(len(rows) + 1), values[rows]
    lengths = np.diff(start)[rows]
    out = np.concatenate([[0], np.cumsum(lengths)])
    at = np.repeat(start[rows] - out[:-1], lengths) + np.arange(out[-1])
    return out, values[at]


def pack(
    batches: Iterable[pa.RecordBatch], vocabulary: Array, *, as_sets: bool, max_length: int
) -> Iterator[pa.RecordBatch]:
    """Return `PACKED` rows of batches of `SENTENCES`: a million items a row.

    Items become positions in `vocabulary` (ascending); others are left out. A sentence longer than
    `max_length` is cut into pieces, which get ids of their own; one with a single item teaches
    nothing and is left out. `as_sets`: each item once, ascending.
    """
    held: list[Sentences] = []
    for batch in batches:
        held.append(_read(batch, vocabulary, as_sets=as_sets, max_length=max_length))
        if sum(len(part.items) for part in held) >= _PACK_ITEMS:
            yield _packed(held)
            held = []
    if held:
        yield _packed(held)


def unpack(batches: Iterable[pa.RecordBatch]) -> Iterator[Sentences]:
    """Return the sentences of each `PACKED` row."""
    for batch in batches:
        for ids, lengths, items in zip(*(batch.column(c) for c in PACKED.names), strict=True):
            n = np.frombuffer(lengths.as_buffer(), np.int32)
            yield Sentences(
                np.frombuffer(ids.as_buffer(), np.int64).copy(),
                np.concatenate([[0], np.cumsum(n)]).astype(np.int64),
                np.frombuffer(items.as_buffer(), np.int32).copy(),
            )


def count(sentences: Sentences, kept: Array) -> Array:
    """Return int64 (n_items,): uses of each `kept` item in sentences with two of them or more.

    >>> s = Sentences(np.array([7, 8]), np.array([0, 2, 4]), np.array([0, 1, 1, 2]))
    >>> count(s, np.array([True, True, False])).tolist()
    [1, 1, 0]
    """
    inside = kept[sentences.items]
    before = np.concatenate([[0], np.cumsum(inside)])
    useful = np.diff(before[sentences.start]) >= 2
    counted = inside & np.repeat(useful, np.diff(sentences.start))
    return np.bincount(sentences.items[counted], minlength=len(kept))


def examples(
    sentences: Sentences,
    keep: Array,
    *,
    window: int,
    shrink: bool,
    cbow: bool,
    seed: int,
    epoch: int,
) -> Iterator[Examples]:
    """Return the examples of `sentences`, a few million at a time.

    Parameters
    ----------
    keep : float32 (n_items,); chance that a use of the item stays in this epoch (subsampling). The
        window closes over what was left out
    window : places to either side
    shrink : each target's window is drawn uniformly from 1 to `window`, as word2vec does
    cbow : one example a target, its inputs all items of the window; else one a pair

    An item is no example of itself, and no window reaches into another sentence.
    """
    lengths = np.diff(sentences.start)
    bound = lengths * np.minimum(2 * window, lengths - 1)
    ends = np.cumsum(bound)
    begin = 0
    while begin < len(lengths):
        reach = (ends[begin - 1] if begin else 0) + _EXAMPLES_AT_ONCE
        end = max(begin + 1, int(np.searchsorted(ends, reach, side="right")))
        most = int(bound[begin:end].sum())
        found = _examples(
            sentences.ids[begin:end],
            sentences.start[begin : end + 1],
            sentences.items,
            keep,
            window,
            shrink,
            cbow,
            seed,
            epoch,
            most,
        )
        yield Examples(*found)
        begin = end


@compiled
def _examples(
    ids: Array,
    start: Array,
    items: Array,
    keep: Array,
    window: int,
    shrink: bool,
    cbow: bool,
    seed: int,
    epoch: int,
    most: int,
) -> tuple[Array, Array, Array, Array]:
    keys, targets = np.empty(most, np.uint64), np.empty(most, np.int32)
    ends, inputs = np.zeros(most + 1, np.int64), np.empty(most, np.int32)
    n = m = 0
    longest = 0
    for s in range(len(ids)):
        longest = max(longest, start[s + 1] - start[s])
    kept = np.empty(longest, np.int32)
    for s in range(len(ids)):
        state = key(seed, epoch, ids[s], 4)
        length = 0
        for at in range(start[s], start[s + 1]):
            state += _GOLDEN
            if np.float64(mix(state) >> _11) * 2.0**-53 < keep[items[at]]:
                kept[length] = items[at]
                length += 1
        for centre in range(length):
            reach = window
            if shrink:
                state += _GOLDEN
                reach = 1 + int(np.float64(mix(state) >> _11) * 2.0**-53 * window)
            first = n
            for near in range(max(0, centre - reach), min(length, centre + reach + 1)):
                if kept[near] == kept[centre]:
                    continue
                if not cbow or n == first:
                    state += _GOLDEN
                    keys[n] = mix(state)
                    targets[n] = kept[centre]
                    n += 1
                inputs[m] = kept[near]
                m += 1
                ends[n] = m
    return keys[:n].copy(), targets[:n].copy(), ends[: n + 1].copy(), inputs[:m].copy()


def _read(batch: pa.RecordBatch, vocabulary: Array, *, as_sets: bool, max_length: int) -> Sentences:
    column = batch.column("items")
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    values = column.flatten().to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(lengths)), lengths)
    at = np.minimum(np.searchsorted(vocabulary, values), len(vocabulary) - 1)
    known = vocabulary[at] == values
    row, items = row[known], at[known].astype(np.int32)
    if as_sets:
        order = np.lexsort((items, row))
        row, items = row[order], items[order]
        new = np.ones(len(row), bool)
        new[1:] = (row[1:] != row[:-1]) | (items[1:] != items[:-1])
        row, items = row[new], items[new]
    first = np.searchsorted(row, row, side="left")  # where each item's sentence begins
    piece = (np.arange(len(row)) - first) // max_length
    begins = np.flatnonzero(
        np.append(True, (np.diff(row) != 0) | (np.diff(piece) != 0))[: len(row)]
    )
    sizes = np.diff(np.append(begins, len(row)))
    ids = batch.column("sentence_id").to_numpy(zero_copy_only=False)[row[begins]]
    ids = ids.astype(np.int64) ^ (piece[begins] * _PIECE)  # the first piece keeps the id
    useful = sizes > 1
    return Sentences(
        ids[useful],
        np.concatenate([[0], np.cumsum(sizes[useful])]),
        items[np.repeat(useful, sizes)],
    )


def _packed(parts: list[Sentences]) -> pa.RecordBatch:
    ids = np.concatenate([part.ids for part in parts]).astype(np.int64)
    lengths = np.concatenate([np.diff(part.start) for part in parts]).astype(np.int32)
    items = np.concatenate([part.items for part in parts]).astype(np.int32)
    return pa.RecordBatch.from_arrays(
        [pa.array([part.tobytes()], pa.binary()) for part in (ids, lengths, items)],
        names=PACKED.names,
    )

"""Turns sentences into the examples that word2vec learns from in one epoch.

Everything random about a sentence depends on (seed, epoch, sentence id, place in the sentence), so
partitions and retries change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql.types import BinaryType

from recspark import schema
from recspark.data.blocks import Array
from recspark.engines.compiled import compiled
from recspark.engines.word2vec_kernels import key, mix

SENTENCES = schema.columns(sentence_id=schema.LONG, items=schema.ITEM_IDXS)
PACKED = schema.columns(ids=BinaryType(), lengths=BinaryType(), items=BinaryType())
WHOLE = 2**31 - 1  # the whole sentence as a window: no sentence is longer
_PACK_ITEMS = 1 << 20  # number of items that makes a packed row complete
_EXAMPLES_AT_ONCE = 1 << 21  # most inputs in a chunk of examples: about 50 MB of arrays
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # step of the state of SplitMix64, see `word2vec_kernels`
_11 = np.uint64(11)
_PIECE = np.int64(0x2545F4914F6CDD1D)  # multiplier that gives a sentence's pieces distinct ids


@dataclass(frozen=True)
class Sentences:
    """`ids` int64 (n,); sentence s is `items[start[s]:start[s + 1]]`, int32 indices of items."""

    ids: Array
    start: Array
    items: Array


@dataclass(frozen=True)
class Examples:
    """Example e predicts `targets[e]` from `inputs[start[e]:start[e + 1]]`; both are int32.

    `keys` uint64 are random numbers that decide the order of the examples.
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
    """Return (start, values) of the given `rows` of a ragged array, in that order.

    Row r of the ragged array is `values[start[r]:start[r + 1]]`.
    """
    # If every row has one value, the rows are the indices of the values.
    if len(values) == len(start) - 1 and start[-1] == len(values):
        row_lengths = np.diff(start)
        if len(row_lengths) == 0 or (row_lengths.min() == 1 and row_lengths.max() == 1):
            return np.arange(len(rows) + 1), values[rows]
    lengths = np.diff(start)[rows]
    taken_start = np.concatenate([[0], np.cumsum(lengths)])
    value_index = np.repeat(start[rows] - taken_start[:-1], lengths) + np.arange(taken_start[-1])
    return taken_start, values[value_index]


def pack(
    batches: Iterable[pa.RecordBatch], vocabulary: Array, *, as_sets: bool, max_length: int
) -> Iterator[pa.RecordBatch]:
    """Yield `PACKED` rows made of batches of `SENTENCES`: about a million items per row.

    Items become positions in `vocabulary` (ascending); items that are not in it are left out. A
    sentence longer than `max_length` is cut into pieces with ids of their own. A sentence with a
    single item gives no example and is left out. With `as_sets`, each sentence has each item once,
    ascending.
    """
    gathered: list[Sentences] = []
    for batch in batches:
        gathered.append(_read(batch, vocabulary, as_sets=as_sets, max_length=max_length))
        if sum(len(part.items) for part in gathered) >= _PACK_ITEMS:
            yield _packed(gathered)
            gathered = []
    if gathered:
        yield _packed(gathered)


def unpack(ids: Any, lengths: Any, items: Any) -> Sentences:
    """Return the sentences of one `PACKED` row, given as buffers of bytes."""
    n_items = np.frombuffer(lengths, np.int32)
    return Sentences(
        np.frombuffer(ids, np.int64).copy(),  # a copy, because arrays from bytes are read-only
        np.concatenate([[0], np.cumsum(n_items)]).astype(np.int64),
        np.frombuffer(items, np.int32).copy(),
    )


def unpack_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[Sentences]:
    """Yield the sentences of each `PACKED` row."""
    for batch in batches:
        for row in zip(*(batch.column(c) for c in PACKED.names), strict=True):
            yield unpack(*(field.as_buffer() for field in row))


def count(sentences: Sentences, is_kept: Array) -> Array:
    """Return how often each item is used, int64 (n_items,).

    Counts only items where `is_kept`, and only sentences with two or more uses of such items.

    >>> s = Sentences(np.array([7, 8]), np.array([0, 2, 4]), np.array([0, 1, 1, 2]))
    >>> count(s, np.array([True, True, False])).tolist()
    [1, 1, 0]
    """
    is_kept_use = is_kept[sentences.items]
    n_kept_before = np.concatenate([[0], np.cumsum(is_kept_use)])
    has_pair = np.diff(n_kept_before[sentences.start]) >= 2
    is_counted = is_kept_use & np.repeat(has_pair, np.diff(sentences.start))
    return np.bincount(sentences.items[is_counted], minlength=len(is_kept))


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
    """Yield the examples of `sentences`, a few million at a time.

    Parameters
    ----------
    keep : float32 (n_items,); chance that a use of the item stays in this epoch (subsampling).
        Windows are taken over the items that stay
    window : number of places to either side of the target
    shrink : the window of each target is drawn uniformly from 1 to `window`, as word2vec does
    cbow : one example per target, with all items of the window as inputs; else one example per pair
        of target and input

    A window does not reach into another sentence. If an item is used twice within a window, it
    predicts itself, as in word2vec: this draws the item's input and output vector together
    (Diginetica, P@20 by cosine: .276 with such pairs, .263 without). Sentences that are sets have
    each item once, so they have no such pairs.
    """
    lengths = np.diff(sentences.start)
    # Each round takes the next sentences that together have at most _EXAMPLES_AT_ONCE inputs, by an
    # upper bound of their number, but at least one sentence.
    max_inputs = lengths * np.minimum(2 * window, lengths - 1)
    max_inputs_until = np.cumsum(max_inputs)
    begin = 0
    while begin < len(lengths):
        limit = (max_inputs_until[begin - 1] if begin else 0) + _EXAMPLES_AT_ONCE
        end = max(begin + 1, int(np.searchsorted(max_inputs_until, limit, side="right")))
        chunk_max_inputs = int(max_inputs[begin:end].sum())
        arrays = _examples(
            sentences.ids[begin:end],
            sentences.start[begin : end + 1],
            sentences.items,
            keep,
            window,
            shrink,
            cbow,
            seed,
            epoch,
            chunk_max_inputs,
        )
        yield Examples(*arrays)
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
    max_inputs: int,
) -> tuple[Array, Array, Array, Array]:
    # Returns the arrays of `Examples`; `input_end` becomes its `start`. The random numbers of a
    # sentence are a SplitMix64 stream that begins at `key(seed, epoch, id, 4)`.
    keys, targets = np.empty(max_inputs, np.uint64), np.empty(max_inputs, np.int32)
    input_end, inputs = np.zeros(max_inputs + 1, np.int64), np.empty(max_inputs, np.int32)
    n_examples = n_inputs = 0
    longest = 0
    for sentence in range(len(ids)):
        longest = max(longest, start[sentence + 1] - start[sentence])
    kept_items = np.empty(longest, np.int32)
    for sentence in range(len(ids)):
        state = key(seed, epoch, ids[sentence], 4)
        length = 0
        for position in range(start[sentence], start[sentence + 1]):
            state += _GOLDEN
            if np.float64(mix(state) >> _11) * 2.0**-53 < keep[items[position]]:
                kept_items[length] = items[position]
                length += 1
        for centre in range(length):
            window_size: Any = window
            if shrink:
                state += _GOLDEN
                window_size = 1 + int(np.float64(mix(state) >> _11) * 2.0**-53 * window)
            first_example = n_examples
            for context in range(
                max(0, centre - window_size), min(length, centre + window_size + 1)
            ):
                if context == centre:
                    continue
                # Skip-gram: an example per input. CBOW: an example per target, at its first input.
                if not cbow or n_examples == first_example:
                    state += _GOLDEN
                    keys[n_examples] = mix(state)
                    targets[n_examples] = kept_items[centre]
                    n_examples += 1
                inputs[n_inputs] = kept_items[context]
                n_inputs += 1
                input_end[n_examples] = n_inputs
    return (
        keys[:n_examples].copy(),
        targets[:n_examples].copy(),
        input_end[: n_examples + 1].copy(),
        inputs[:n_inputs].copy(),
    )


def _read(batch: pa.RecordBatch, vocabulary: Array, *, as_sets: bool, max_length: int) -> Sentences:
    # Returns the sentences of a batch of `SENTENCES`, as `pack` describes them.
    column = batch.column("items")
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    values = column.flatten().to_numpy(zero_copy_only=False)
    row = np.repeat(np.arange(len(lengths)), lengths)
    vocabulary_index = np.minimum(np.searchsorted(vocabulary, values), len(vocabulary) - 1)
    is_known = vocabulary[vocabulary_index] == values
    row, items = row[is_known], vocabulary_index[is_known].astype(np.int32)
    if as_sets:
        order = np.lexsort((items, row))
        row, items = row[order], items[order]
        is_new = np.ones(len(row), bool)
        is_new[1:] = (row[1:] != row[:-1]) | (items[1:] != items[:-1])
        row, items = row[is_new], items[is_new]
    sentence_start = np.searchsorted(row, row, side="left")  # of each item's sentence
    piece = (np.arange(len(row)) - sentence_start) // max_length
    piece_start = np.flatnonzero(
        np.append(True, (np.diff(row) != 0) | (np.diff(piece) != 0))[: len(row)]
    )
    piece_lengths = np.diff(np.append(piece_start, len(row)))
    ids = batch.column("sentence_id").to_numpy(zero_copy_only=False)[row[piece_start]]
    ids = ids.astype(np.int64) ^ (piece[piece_start] * _PIECE)  # the first piece keeps the id
    has_pair = piece_lengths > 1
    return Sentences(
        ids[has_pair],
        np.concatenate([[0], np.cumsum(piece_lengths[has_pair])]),
        items[np.repeat(has_pair, piece_lengths)],
    )


def _packed(parts: list[Sentences]) -> pa.RecordBatch:
    ids = np.concatenate([part.ids for part in parts]).astype(np.int64)
    lengths = np.concatenate([np.diff(part.start) for part in parts]).astype(np.int32)
    items = np.concatenate([part.items for part in parts]).astype(np.int32)
    return pa.RecordBatch.from_arrays(
        [pa.array([part.tobytes()], pa.binary()) for part in (ids, lengths, items)],
        names=PACKED.names,
    )

"""Turns sentences into the examples that word2vec learns from in one epoch.

Everything random about a sentence depends on (seed, epoch, sentence id, place in the sentence), so
partitions and retries change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql.types import BinaryType

from recspark import schema
from recspark.data.blocks import Array
from recspark.engines.compiled import compiled
from recspark.engines.word2vec_kernels import key, mix

SENTENCES = schema.columns(sentence_id=schema.LONG, items=schema.ITEM_IDXS)
# Sentences of bags: `bags` has the number of the bag of each of `items`; it does not decrease.
BAGGED_SENTENCES = schema.columns(
    sentence_id=schema.LONG, items=schema.ITEM_IDXS, bags=schema.ITEM_IDXS
)
PACKED = schema.columns(
    ids=BinaryType(), lengths=BinaryType(), items=BinaryType(), bags=BinaryType()
)
WHOLE = 2**31 - 1  # the whole sentence as a window: no sentence is longer
_PACK_ITEMS = 1 << 20  # number of items that makes a packed row complete
_EXAMPLES_AT_ONCE = 1 << 21  # most inputs in a chunk of examples: about 50 MB of arrays
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # step of the state of SplitMix64, see `word2vec_kernels`
_11 = np.uint64(11)
_PIECE = np.int64(0x2545F4914F6CDD1D)  # multiplier that gives a sentence's pieces distinct ids


@dataclass(frozen=True)
class Sentences:
    """`ids` int64 (n,); sentence s is `items[start[s]:start[s + 1]]`, int32 indices of items.

    `bags` int32 has the number of the bag of each item; within a sentence it does not decrease.
    With no element, each item is a bag of its own.
    """

    ids: Array
    start: Array
    items: Array
    bags: Array = field(default_factory=lambda: np.zeros(0, np.int32))


@dataclass(frozen=True)
class Metadata:
    """The metadata of each item of the vocabulary, such as its categories.

    Item i has the tokens `tokens[start[i]:start[i + 1]]`, int32 numbers from 0 to `n_tokens` - 1.
    Inputs and targets of examples are members: the items, then the tokens. So token t is member
    n_items + t.

    `weight` : from 0 to 1, how much an example with metadata counts beside one of two items; see
    `examples`.
    """

    start: Array
    tokens: Array
    n_tokens: int
    weight: float


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
    ascending. In batches of `BAGGED_SENTENCES`, each bag has each item once, ascending.
    """
    gathered: list[Sentences] = []
    for batch in batches:
        gathered.append(_read(batch, vocabulary, as_sets=as_sets, max_length=max_length))
        if sum(len(part.items) for part in gathered) >= _PACK_ITEMS:
            yield _packed(gathered)
            gathered = []
    if gathered:
        yield _packed(gathered)


def unpack(ids: Any, lengths: Any, items: Any, bags: Any) -> Sentences:
    """Return the sentences of one `PACKED` row, given as buffers of bytes."""
    n_items = np.frombuffer(lengths, np.int32)
    return Sentences(
        np.frombuffer(ids, np.int64).copy(),  # a copy, because arrays from bytes are read-only
        np.concatenate([[0], np.cumsum(n_items)]).astype(np.int64),
        np.frombuffer(items, np.int32).copy(),
        np.frombuffer(bags, np.int32).copy(),
    )


def unpack_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[Sentences]:
    """Yield the sentences of each `PACKED` row."""
    for batch in batches:
        for row in zip(*(batch.column(c) for c in PACKED.names), strict=True):
            yield unpack(*(field.as_buffer() for field in row))


def count(sentences: Sentences, is_kept: Array, *, within_bag: bool = False) -> Array:
    """Return how often each item is used, int64 (n_items,).

    Counts only items where `is_kept`, and only sentences with two or more uses of such items. If
    the items of a bag do not predict each other (`within_bag` False), these must be in different
    bags.

    >>> s = Sentences(np.array([7, 8]), np.array([0, 2, 4]), np.array([0, 1, 1, 2]))
    >>> count(s, np.array([True, True, False])).tolist()
    [1, 1, 0]
    """
    is_kept_use = is_kept[sentences.items]
    n_kept_before = np.concatenate([[0], np.cumsum(is_kept_use)])
    if len(sentences.bags) and not within_bag:
        # The bags of the first and of the last kept use differ.
        kept_bags = sentences.bags[is_kept_use]
        first, end = n_kept_before[sentences.start[:-1]], n_kept_before[sentences.start[1:]]
        has_pair = end > first
        has_pair[has_pair] = kept_bags[first[has_pair]] != kept_bags[end[has_pair] - 1]
    else:
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
    within_bag: bool = False,
    metadata: Metadata | None = None,
) -> Iterator[Examples]:
    """Yield the examples of `sentences`, a few million at a time.

    Parameters
    ----------
    keep : float32 (n_items,); chance that a use of the item stays in this epoch (subsampling).
        Windows are taken over the items that stay
    window : number of bags to either side of the target's bag whose items are its inputs. Without
        bags, each item is a bag of its own
    shrink : the window of each target is drawn uniformly from 1 to `window`, as word2vec does
    cbow : one example per target, with all items of the window as inputs; else one example per pair
        of target and input
    within_bag : whether the other items of the target's own bag are inputs too
    metadata : for skip-gram only. For each pair of an input item i and a target item j, one token
        m(i) of the input and one token m(j) of the target are drawn. Beside i -> j come the
        examples i -> m(j), m(i) -> j, m(i) -> m(j) and m(i) -> i, each with the chance
        `metadata.weight`. In the mean over epochs, the loss is that of Vasile et al. 2016,
        equation 5, with the mean over the tokens of an item

    A window does not reach into another sentence. If an item is used twice within a window, it
    predicts itself, as in word2vec: this draws the item's input and output vector together
    (Diginetica, P@20 by cosine: .276 with such pairs, .263 without). Sentences that are sets have
    each item once, so they have no such pairs.
    """
    lengths = np.diff(sentences.start)
    # Each round takes the next sentences that together have at most _EXAMPLES_AT_ONCE inputs, by an
    # upper bound of their number, but at least one sentence.
    max_neighbours = lengths - 1
    if len(sentences.bags) == 0:
        max_neighbours = np.minimum(2 * window, max_neighbours)
    max_inputs = lengths * max_neighbours * (1 if metadata is None else 5)
    token_start, tokens, token_weight = np.zeros(0, np.int64), np.zeros(0, np.int32), 0.0
    if metadata is not None:
        token_start, token_weight = metadata.start, metadata.weight
        tokens = (metadata.tokens + len(keep)).astype(np.int32)
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
            sentences.bags,
            keep,
            window,
            shrink,
            cbow,
            within_bag,
            token_start,
            tokens,
            token_weight,
            seed,
            epoch,
            chunk_max_inputs,
        )
        yield Examples(*arrays)
        begin = end


@compiled
def _drawn(start: Array, tokens: Array, item: int, bits: Any) -> Any:
    # Returns a token of `item`, drawn by the random number `bits`; -1 for an item without tokens.
    n_tokens = start[item + 1] - start[item]
    if n_tokens == 0:
        return np.int32(-1)
    return tokens[start[item] + int(np.float64(bits >> _11) * 2.0**-53 * n_tokens)]


@compiled
def _examples(
    ids: Array,
    start: Array,
    items: Array,
    bags: Array,
    keep: Array,
    window: int,
    shrink: bool,
    cbow: bool,
    within_bag: bool,
    token_start: Array,
    tokens: Array,
    token_weight: float,
    seed: int,
    epoch: int,
    max_inputs: int,
) -> tuple[Array, Array, Array, Array]:
    # Returns the arrays of `Examples`; `input_end` becomes its `start`. The random numbers of a
    # sentence are a SplitMix64 stream that begins at `key(seed, epoch, id, 4)`. Those of its
    # examples with metadata are another stream, so that metadata change no other example.
    keys, targets = np.empty(max_inputs, np.uint64), np.empty(max_inputs, np.int32)
    input_end, inputs = np.zeros(max_inputs + 1, np.int64), np.empty(max_inputs, np.int32)
    n_examples = n_inputs = 0
    longest = 0
    for sentence in range(len(ids)):
        longest = max(longest, start[sentence + 1] - start[sentence])
    kept_items = np.empty(longest, np.int32)
    # The bags of the uses that stay, numbered from 0: the bag of each use, and the first use of
    # each bag.
    bag_of_use, first_use = np.empty(longest, np.int64), np.empty(longest + 1, np.int64)
    for sentence in range(len(ids)):
        state = key(seed, epoch, ids[sentence], 4)
        token_state = key(seed, epoch, ids[sentence], 6)
        length = n_bags = 0
        last_bag = -1
        for position in range(start[sentence], start[sentence + 1]):
            state += _GOLDEN
            if np.float64(mix(state) >> _11) * 2.0**-53 < keep[items[position]]:
                bag = bags[position] if len(bags) else position
                if length == 0 or bag != last_bag:
                    first_use[n_bags] = length
                    n_bags += 1
                    last_bag = bag
                bag_of_use[length] = n_bags - 1
                kept_items[length] = items[position]
                length += 1
        first_use[n_bags] = length
        for centre in range(length):
            window_size: Any = window
            if shrink:
                state += _GOLDEN
                window_size = 1 + int(np.float64(mix(state) >> _11) * 2.0**-53 * window)
            first_example = n_examples
            bag = bag_of_use[centre]
            for context in range(
                first_use[max(0, bag - window_size)], first_use[min(n_bags, bag + window_size + 1)]
            ):
                if context == centre or (bag_of_use[context] == bag and not within_bag):
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
                if len(token_start) == 0:
                    continue
                token_state += _GOLDEN
                input_token = _drawn(token_start, tokens, kept_items[context], mix(token_state))
                token_state += _GOLDEN
                target_token = _drawn(token_start, tokens, kept_items[centre], mix(token_state))
                for pair in range(4):
                    example_input, target = input_token, target_token
                    if pair == 0:
                        example_input = kept_items[context]
                    elif pair == 1:
                        target = kept_items[centre]
                    elif pair == 2:
                        target = kept_items[context]
                    token_state += _GOLDEN
                    is_drawn = np.float64(mix(token_state) >> _11) * 2.0**-53 < token_weight
                    if is_drawn and example_input >= 0 and target >= 0:
                        token_state += _GOLDEN
                        keys[n_examples] = mix(token_state)
                        targets[n_examples] = target
                        n_examples += 1
                        inputs[n_inputs] = example_input
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
    has_bags = "bags" in batch.schema.names
    bags = np.zeros(len(row), np.int32)
    if has_bags:
        bags = batch.column("bags").flatten().to_numpy(zero_copy_only=False)[is_known]
    if as_sets or has_bags:  # without bags, the sentence is one set
        order = np.lexsort((items, bags, row))
        row, bags, items = row[order], bags[order], items[order]
        is_new = np.ones(len(row), bool)
        is_new[1:] = (row[1:] != row[:-1]) | (bags[1:] != bags[:-1]) | (items[1:] != items[:-1])
        row, bags, items = row[is_new], bags[is_new], items[is_new]
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
        bags[np.repeat(has_pair, piece_lengths) & has_bags],
    )


def _packed(parts: list[Sentences]) -> pa.RecordBatch:
    ids = np.concatenate([part.ids for part in parts]).astype(np.int64)
    lengths = np.concatenate([np.diff(part.start) for part in parts]).astype(np.int32)
    items = np.concatenate([part.items for part in parts]).astype(np.int32)
    bags = np.concatenate([part.bags for part in parts]).astype(np.int32)
    return pa.RecordBatch.from_arrays(
        [pa.array([part.tobytes()], pa.binary()) for part in (ids, lengths, items, bags)],
        names=PACKED.names,
    )

"""The sentences that word2vec reads, cut from the histories of users."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame

from recspark.data.blocks import Array, parse_histories
from recspark.engines.word2vec_examples import BAGGED_SENTENCES, SENTENCES


def sentences(histories: DataFrame, sentence: str) -> DataFrame:
    """Return the sentences of `histories`: `sentence_id, items`, with items in time order.

    `sentence` : `order` (where an event has none, its session), `session`, or `history`, the user's
    full history.

    The id is computed from user_idx and the number of the sentence among the user's sentences. So
    it does not depend on partitions, and it stays the same when newer events are added. Narrow,
    lazy.
    """
    return histories.select("user_idx", "history").mapInArrow(
        partial(cut_histories, sentence=sentence), SENTENCES
    )


def bagged_sentences(histories: DataFrame, bag: str) -> DataFrame:
    """Return one sentence per user, made of bags in time order: `sentence_id, items, bags`.

    `bag` : `order` (where an event has none, its session) or `session`. A bag takes the place of
    its first event. `bags` has the number of each item's bag, counted from 0 for each user. Narrow,
    lazy.
    """

    def join(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield bags_of_users(batch, bag)

    return histories.select("user_idx", "history").mapInArrow(join, BAGGED_SENTENCES)


def bags_of_users(batch: pa.RecordBatch, bag: str) -> pa.RecordBatch:
    """Return `BAGGED_SENTENCES` of a batch of `user_idx, history`, one row per row.

    Example with bag `session`: a user's items 10, 11, 12, 13 in the sessions s1, s2, s1, s2 give
    the items [10, 12, 11, 13] and the bags [0, 0, 1, 1].
    """
    cut = cut_batch(batch, bag)
    bag_of_item = np.repeat(cut.number, np.diff(cut.start)).astype(np.int32)
    row_of_item = np.repeat(cut.row, np.diff(cut.start))
    start = pa.array(np.searchsorted(row_of_item, np.arange(batch.num_rows + 1)), pa.int32())
    return pa.RecordBatch.from_arrays(
        [
            pa.array(batch.column("user_idx").to_numpy() * _USER, pa.int64()),
            pa.ListArray.from_arrays(start, pa.array(cut.items, pa.int32())),
            pa.ListArray.from_arrays(start, pa.array(bag_of_item, pa.int32())),
        ],
        names=BAGGED_SENTENCES.names,
    )


def cut_histories(batches: Iterable[pa.RecordBatch], sentence: str) -> Iterator[pa.RecordBatch]:
    """Return `SENTENCES` of batches of `user_idx, history`.

    Example with sentence `session`: a user's items 10, 11, 12, 13 in the sessions s1, s2, s1, s2
    give the sentences 0 = [10, 12] and 1 = [11, 13].
    """
    for batch in batches:
        cut = cut_batch(batch, sentence)
        user = batch.column("user_idx").to_numpy()[cut.row]
        yield pa.RecordBatch.from_arrays(
            [
                pa.array(user * _USER + cut.number * _NUMBER, pa.int64()),
                pa.ListArray.from_arrays(
                    pa.array(cut.start, pa.int32()), pa.array(cut.items, pa.int32())
                ),
            ],
            names=SENTENCES.names,
        )


@dataclass(frozen=True)
class Cut:
    """The sentences of some histories, by row, then by their first event.

    Sentence s is `items[start[s]:start[s + 1]]`, item_idx in time order. It belongs to the history
    of `row[s]`, of which it is sentence `number[s]`, counted from 0.
    """

    row: Array
    number: Array
    start: Array
    items: Array


def cut_batch(batch: pa.RecordBatch, sentence: str) -> Cut:
    """Return the sentences of a batch of `user_idx, history`; see `sentences`."""
    history = parse_histories(batch.column("history"))
    rows = history.rows
    group = _groups(batch.column("history").flatten(), sentence)
    # A sentence is all events of one (row, group). The sort brings them together; it is stable,
    # so they stay in time order.
    order = np.lexsort((group, rows))
    is_first = np.ones(len(order), bool)
    is_first[1:] = (np.diff(rows[order]) != 0) | (np.diff(group[order]) != 0)
    sentence_of_sorted = np.cumsum(is_first) - 1  # the sentence of each sorted event
    # Number the sentences by row, then by first appearance: by the index of their first event.
    first_event = order[is_first]
    by_first_event = np.argsort(first_event, kind="stable")
    sentence_rank = np.empty(len(first_event), np.int64)
    sentence_rank[by_first_event] = np.arange(len(first_event))
    sentence_of_event = np.empty(len(order), np.int64)
    sentence_of_event[order] = sentence_rank[sentence_of_sorted]
    row_of_sentence = rows[first_event[by_first_event]]
    # The number of each sentence among its user's sentences, from 0.
    number = np.arange(len(row_of_sentence)) - np.searchsorted(row_of_sentence, row_of_sentence)
    by_sentence = np.argsort(sentence_of_event, kind="stable")
    lengths = np.bincount(sentence_of_event, minlength=len(first_event))
    start = np.concatenate([[0], np.cumsum(lengths)])
    return Cut(row_of_sentence, number, start, history.item_idx[by_sentence])


# Both multipliers are odd. So the ids of one user's sentences differ, and so do the ids of all
# users' first sentences. Random draws hash the ids once more.
_USER, _NUMBER = np.int64(0x1E3779B97F4A7C15), np.int64(0x3F58476D1CE4E5B9)


def _groups(events: pa.StructArray, sentence: str) -> Array:
    """Return a group number for each event: a row's events with equal numbers form a sentence."""
    if sentence == "history":
        return np.zeros(len(events), np.int64)
    group_names = events.field("session_id")
    if sentence == "order":
        group_names = pc.coalesce(events.field("order_id"), group_names)
    codes = group_names.dictionary_encode(null_encoding="encode")
    return codes.indices.to_numpy(zero_copy_only=False).astype(np.int64)

"""Transitions: recommend the items that users acted on soon after the user's newest items."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F
from scipy import sparse

from recspark import schema
from recspark.data.blocks import (
    MICROS_PER_DAY,
    Array,
    Histories,
    QueryBlock,
    local_index,
    micros,
    parse_histories,
    where,
)
from recspark.data.dataset import Dataset
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed, Settings
from recspark.models.scoring import topk
from recspark.models.scoring.contributions import (
    Contributions,
    contributions_of_lists,
    keys_of_lists,
)
from recspark.models.scoring.listed import ListedScores, sums_of_lists
from recspark.models.setting_types import HalfLifeDays

# Weights of transitions are whole multiples ("steps") of 2^-20, so that their sums are exact and do
# not depend on the order in which users arrive.
_STEPS = 2.0**20
_PAIRS = schema.columns(item_idx=schema.INT, follower=schema.INT, steps=schema.LONG)


class TransitionsSettings(Settings):
    """Settings of `Transitions`."""

    unit: Literal["event", "session"] = Field(
        "event",
        description="what follows what: event = an item follows the item of the event before it; "
        "session = the items of a session follow those of the user's session before it (in a shop: "
        "what is bought next time). Guess",
    )
    window: int = Field(
        3,
        ge=1,
        le=100,
        description="number of units (events or sessions) after an item whose items follow it; "
        "those of the d-th unit count 1 / d. Guess",
        json_schema_extra={"tune": {"choices": [1, 2, 3, 5]}},
    )
    half_life_days: HalfLifeDays = Field(
        None, description="days; a transition this old counts half; null = no decay"
    )
    last_n: int = Field(
        5,
        ge=1,
        le=1000,
        description="number of the user's newest items whose followers are recommended; the n-th "
        "newest counts 1 / n. Guess",
        json_schema_extra={"tune": {"choices": [1, 3, 5, 10, 30]}},
    )
    n_followers: int = Field(
        200,
        ge=1,
        le=10_000,
        description="followers kept per item; each takes 8 bytes on the driver and on the workers. "
        "Guess",
    )


class TransitionsModel(ArraysModel):
    """The fitted followers of each item, and how likely each of them is.

    Item j has the followers `followers[start[j]:start[j + 1]]`, local indices, ascending. `start`
    is int64 (n_items + 1,), `followers` int32 (p,). `shares` float32 (p,): the share of the
    follower in the weight of everything that followed the item.
    """

    settings: TransitionsSettings

    def scorer(self) -> topk.ListScorer:
        """See `RetrieverModel`."""
        return TransitionsScorer(self.settings.last_n, self.items, self.shared_arrays())


@dataclass(frozen=True)
class TransitionsScorer:
    """Sums the shares of the followers of the user's newest items, the newest item first."""

    last_n: int
    items: Array
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> ListedScores:
        """See `topk.ListScorer`."""
        # (q,) each, q = the number of newest items of all rows.
        row, item, recency_rank = newest_items(block.history, self.items, self.last_n)
        lists = tuple(
            np.asarray(self.arrays[name].array) for name in ("start", "followers", "shares")
        )
        return sums_of_lists(lists, row, item, 1 / recency_rank, len(block), len(self.items))

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """See `ContributingScorer`. Item j adds its share of followers, divided by its rank."""
        row, own_items, recency_rank = newest_items(block.history, self.items, self.last_n)
        start = np.searchsorted(row, np.arange(len(block) + 1))
        own = start, own_items, 1 / recency_rank
        shares = np.asarray(self.arrays["shares"].array)
        return contributions_of_lists(self._keys, shares, len(self.items), own, rows, items)

    @cached_property
    def _keys(self) -> Array:
        start, followers = (np.asarray(self.arrays[name].array) for name in ("start", "followers"))
        return keys_of_lists(start, followers, len(self.items))


def newest_items(history: Histories, items: Array, n: int) -> tuple[Array, Array, Array]:
    """Return row, local item and rank (1 = newest) of the n newest distinct items of each row.

    The order is by row, then by rank. An item that occurs twice counts at its newest event. Items
    outside the vocabulary `items` are left out, and so are events that weigh 0 or less, or NaN.
    """
    local = local_index(items, history.item_idx)
    is_kept = (history.weight > 0) & (local >= 0)  # False for NaN (no rating)
    # Reverse all events, so that the newest come first, and keep the first event of each item.
    row, local = history.rows[is_kept][::-1], local[is_kept][::-1]
    _, first_index = np.unique(row * len(items) + local, return_index=True)
    first_index = np.sort(first_index)
    row, local = row[first_index], local[first_index]
    recency_rank = np.arange(len(row)) - np.searchsorted(-row, -row) + 1
    is_newest = recency_rank <= n
    order = np.argsort(row[is_newest], kind="stable")  # rows ascending again, ranks in order
    return row[is_newest][order], local[is_newest][order], recency_rank[is_newest][order]


class Transitions(Algorithm[TransitionsSettings]):
    """Score of item i = sum over the user's newest items j of share(i | j) / (rank of j).

    share(i | j) is the share of i in the weight of everything that followed j within `window` units
    (events or sessions). This is a Markov chain of first order, over `window` steps.

    Source: Shani, Heckerman & Brafman 2005, "An MDP-Based Recommender System", section 4 (skipping
    and mixtures over the last items).
    """

    settings_class = TransitionsSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> TransitionsModel:
        """See `Algorithm.fit`. Shuffles the pairs to sum them, and the sums by item.

        The driver holds the followers that are kept.
        """
        settings, items = self.settings, data.vocabulary()
        pairs = transitions(data.histories, micros(data.cutoff), settings)
        summed = pairs.groupBy("item_idx", "follower").agg(F.sum("steps").alias("steps"))
        likeliest = Window.partitionBy("item_idx").orderBy(F.desc("steps"), "follower")
        of_item = Window.partitionBy("item_idx")
        followers = (
            summed.withColumns(
                {
                    "place": F.row_number().over(likeliest),
                    "all": F.sum("steps").over(of_item),
                }
            )
            .where(F.col("place") <= settings.n_followers)
            .toArrow()
            .sort_by([("item_idx", "ascending"), ("follower", "ascending")])
        )
        item, follower, steps, item_steps = (
            followers.column(name).to_numpy() for name in ("item_idx", "follower", "steps", "all")
        )
        counts = np.bincount(local_index(items, item), minlength=len(items))
        arrays = {
            "start": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            "followers": local_index(items, follower).astype(np.int32),
            "shares": (steps / item_steps).astype(np.float32),
        }
        return TransitionsModel(settings, data.cutoff, items, arrays)


def transitions(histories: DataFrame, as_of: int, settings: TransitionsSettings) -> DataFrame:
    """Return `item_idx, follower, steps`: the weight with which `follower` follows the item.

    `steps` counts multiples of 2^-20. It is summed within a batch of users only, so a pair may have
    several rows. An item never follows itself. `as_of` : the time at which an event has age 0, in
    microseconds since 1970 UTC. Lazy and narrow.
    """

    def count(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield followers_of(parse_histories(batch.column("history")), as_of, settings)

    return histories.select("history").mapInArrow(count, _PAIRS)


def followers_of(history: Histories, as_of: int, settings: TransitionsSettings) -> pa.RecordBatch:
    """Return `item_idx, follower, steps` of some histories, with one row per pair.

    See `transitions` for the columns.

    Example with unit `event`, window 2 and no decay: the history 7, 8, 9 gives (7, 8) and (8, 9)
    with 2^20 steps each, and (7, 9) with 2^19.
    """
    history = where(history, history.weight > 0)  # False for NaN (no rating)
    row, item, event_at = history.rows, history.item_idx, history.event_at
    is_first_of_unit = (
        history.session_starts if settings.unit == "session" else np.ones(len(row), bool)
    )
    unit = np.cumsum(is_first_of_unit) - 1  # the unit of each event, counted over all rows
    n_units = int(unit[-1]) + 1 if len(unit) else 0
    vocabulary, local = np.unique(item, return_inverse=True)
    shape = (n_units, len(vocabulary))
    # `items_of_units[u, j]` is 1 if unit u has item j, however often.
    key, first_index = np.unique(unit * max(len(vocabulary), 1) + local, return_index=True)
    items_of_units = sparse.csr_matrix(
        (np.ones(len(key)), (unit[first_index], local[first_index])), shape=shape
    )
    # Of each unit: its row, the time of its first event, and its decayed weight.
    row_of_unit, start_of_unit = row[is_first_of_unit], event_at[is_first_of_unit]
    weight_of_unit = np.ones(n_units)
    if settings.half_life_days is not None:
        weight_of_unit = np.exp2(
            -(as_of - start_of_unit) / MICROS_PER_DAY / settings.half_life_days
        )
    followed = sparse.csr_matrix((len(vocabulary), len(vocabulary)))
    for distance in range(1, min(settings.window, n_units - 1) + 1):
        # Pair each unit with the unit `distance` later, if both are in the same row.
        is_same_row = row_of_unit[:-distance] == row_of_unit[distance:]
        steps = np.rint(_STEPS / distance * weight_of_unit[distance:]) * is_same_row
        weighted_followers = sparse.diags(steps) @ items_of_units[distance:]
        followed = followed + items_of_units[:-distance].T @ weighted_followers
    pairs = followed.tocoo()
    is_pair = (pairs.data > 0) & (pairs.row != pairs.col)
    return pa.RecordBatch.from_arrays(
        [
            pa.array(vocabulary[pairs.row[is_pair]], pa.int32()),
            pa.array(vocabulary[pairs.col[is_pair]], pa.int32()),
            pa.array(pairs.data[is_pair].astype(np.int64), pa.int64()),
        ],
        names=_PAIRS.names,
    )

"""What follows what: the items that users turned to after the ones that this user acted on last."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
    micros,
    parse_histories,
    where,
)
from recspark.data.dataset import Dataset
from recspark.models.base import NOTHING, Algorithm, ArraysModel, FitOptions, Needed, Settings
from recspark.models.scoring import topk
from recspark.models.scoring.listed import ListedScores
from recspark.models.setting_types import HalfLifeDays

# A transition counts whole steps of 2^-20, so that sums are exact in whatever order users arrive.
_STEPS = 2.0**20
_PAIRS = schema.columns(item_idx=schema.INT, follower=schema.INT, steps=schema.LONG)


class TransitionsSettings(Settings):
    """Settings of `Transitions`."""

    unit: Literal["event", "session"] = Field(
        "event",
        description="what follows what: an event the next one, or the items of a session those of the "
        "user's next session (of a shop: what is bought next time). Guess",
    )
    window: int = Field(
        3,
        ge=1,
        le=100,
        description="units after an item whose items follow it; the d-th counts 1 / d. Guess",
        json_schema_extra={"tune": {"choices": [1, 2, 3, 5]}},
    )
    half_life_days: HalfLifeDays = Field(
        None, description="days; a transition this old counts half; null = no decay"
    )
    last_n: int = Field(
        5,
        ge=1,
        le=1000,
        description="the user's newest items that speak; the n-th counts 1 / n. Guess",
        json_schema_extra={"tune": {"choices": [1, 3, 5, 10, 30]}},
    )
    n_followers: int = Field(
        200,
        ge=1,
        le=10_000,
        description="followers kept of each item; driver and workers take 8 bytes each. Guess",
    )


class TransitionsModel(ArraysModel):
    """Followers of each item, and how likely each is.

    `start` int64 (n_items + 1,); `followers` int32 (p,), local; `shares` float32 (p,), of all that
    followed the item.
    """

    settings: TransitionsSettings

    def scorer(self) -> topk.ListScorer:
        """See `RetrieverModel`."""
        return TransitionsScorer(self.settings.last_n, self.items, self.shared_arrays())


@dataclass(frozen=True)
class TransitionsScorer:
    """Adds up what follows the user's newest items, in the order of the items."""

    last_n: int
    items: Array
    arrays: dict[str, topk.Shared]

    def score(self, block: QueryBlock) -> ListedScores:
        """See `topk.ListScorer`."""
        row, item, place = newest_items(block.history, self.items, self.last_n)
        start, followers, shares = (
            np.asarray(self.arrays[name].array) for name in ("start", "followers", "shares")
        )
        lengths = start[item + 1] - start[item]
        entry = np.repeat(start[item] - np.cumsum(lengths) + lengths, lengths)
        entry += np.arange(len(entry))  # the followers of each item, one item after the other
        row = np.repeat(row, lengths)
        value = shares[entry].astype(np.float64) / np.repeat(place, lengths)
        key = row * len(self.items) + followers[entry]
        order = np.argsort(key, kind="stable")  # a row's newest item first
        key, value = key[order], value[order]
        first = np.flatnonzero(np.append(True, key[1:] != key[:-1])) if len(key) else key
        total = np.add.reduceat(value, first) if len(first) else value
        rows, listed = np.divmod(key[first], len(self.items))
        counts = np.bincount(rows, minlength=len(block))
        starts = np.concatenate([[0], np.cumsum(counts)])
        return ListedScores(
            starts, listed.astype(np.int32), total.astype(np.float32), len(self.items)
        )


def newest_items(history: Histories, items: Array, n: int) -> tuple[Array, Array, Array]:
    """Return row, local item and place (1 = newest) of the newest n distinct known items of each row.

    By row, then place; events that weigh nothing or no rating are left out.
    """
    local = topk.local_index(items, history.item_idx)
    kept = (history.weight > 0) & (local >= 0)  # NaN, no rating, is not above 0
    # From each row's newest event back, an item where it comes first.
    row, local = history.rows[kept][::-1], local[kept][::-1]
    _, first = np.unique(row * len(items) + local, return_index=True)
    first = np.sort(first)
    row, local = row[first], local[first]
    place = np.arange(len(row)) - np.searchsorted(-row, -row) + 1
    top = place <= n
    order = np.argsort(row[top], kind="stable")
    return row[top][order], local[top][order], place[top][order]


class Transitions(Algorithm[TransitionsSettings]):
    """Share of all that followed an item within `window` units, summed over the user's newest items.

    A Markov chain of first order, over `window` steps. Source: Shani, Heckerman & Brafman 2005, "An
    MDP-Based Recommender System", section 4 (skipping and mixtures over the last items).
    """

    settings_class = TransitionsSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> TransitionsModel:
        """See `Algorithm.fit`. One shuffle by item of summed pairs; the driver holds the followers."""
        settings, items = self.settings, data.vocabulary()
        pairs = transitions(data.histories, micros(data.cutoff), settings)
        summed = pairs.groupBy("item_idx", "follower").agg(F.sum("steps").alias("steps"))
        likeliest = Window.partitionBy("item_idx").orderBy(F.desc("steps"), "follower")
        of_item = Window.partitionBy("item_idx")
        kept = (
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
        item, follower, steps, whole = (
            kept.column(name).to_numpy() for name in ("item_idx", "follower", "steps", "all")
        )
        counts = np.bincount(topk.local_index(items, item), minlength=len(items))
        arrays = {
            "start": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            "followers": topk.local_index(items, follower).astype(np.int32),
            "shares": (steps / whole).astype(np.float32),
        }
        return TransitionsModel(settings, data.cutoff, items, arrays)


def transitions(histories: DataFrame, as_of: int, settings: TransitionsSettings) -> DataFrame:
    """Return `item_idx, follower, steps`: what follows what, partly summed. Lazy and narrow.

    `as_of` : microseconds since 1970 UTC, age 0. A pair of one item is left out.
    """

    def count(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield followers_of(parse_histories(batch.column("history")), as_of, settings)

    return histories.select("history").mapInArrow(count, _PAIRS)


def followers_of(history: Histories, as_of: int, settings: TransitionsSettings) -> pa.RecordBatch:
    """Return a batch of `item_idx, follower, steps` of some histories; each pair is there once."""
    history = where(history, history.weight > 0)  # NaN, no rating, is not above 0
    row, item, at = history.rows, history.item_idx, history.event_at
    begins = history.session_starts if settings.unit == "session" else np.ones(len(row), bool)
    unit = np.cumsum(begins) - 1  # of each event, over all rows
    n_units = int(unit[-1]) + 1 if len(unit) else 0
    vocabulary, local = np.unique(item, return_inverse=True)
    shape = (n_units, len(vocabulary))
    # An item is in a unit or not, however often.
    key, first = np.unique(unit * max(len(vocabulary), 1) + local, return_index=True)
    before = sparse.csr_matrix((np.ones(len(key)), (unit[first], local[first])), shape=shape)
    row_of, at_of = row[begins], at[begins]
    weight = np.ones(n_units)
    if settings.half_life_days is not None:
        weight = np.exp2(-(as_of - at_of) / MICROS_PER_DAY / settings.half_life_days)
    total = sparse.csr_matrix((len(vocabulary), len(vocabulary)))
    for distance in range(1, min(settings.window, n_units - 1) + 1):
        same = row_of[:-distance] == row_of[distance:]
        steps = np.rint(_STEPS / distance * weight[distance:]) * same
        after = sparse.diags(steps) @ before[distance:]
        total = total + before[:-distance].T @ after
    pairs = total.tocoo()
    counted = (pairs.data > 0) & (pairs.row != pairs.col)
    return pa.RecordBatch.from_arrays(
        [
            pa.array(vocabulary[pairs.row[counted]], pa.int32()),
            pa.array(vocabulary[pairs.col[counted]], pa.int32()),
            pa.array(pairs.data[counted].astype(np.int64), pa.int64()),
        ],
        names=_PAIRS.names,
    )

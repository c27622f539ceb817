"""Rows of the table `user_states`, and when a user will be back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import types as T

from recspark import schema
from recspark.data.blocks import MICROS_PER_DAY, Array
from recspark.models.scoring import topk
from recspark.models.sequences.intensity_scores import user_vectors
from recspark.nets.coevolve import LARGEST_EXPONENT

_BLOCK_ROWS, _TILE_ITEMS = 256, 8192  # users and items whose intensities are computed at once
_FURTHEST_DAYS = 3650.0  # a visit beyond this is no date
# `schema.USER_STATES` without cutoff and model
STATES = T.StructType([f for f in schema.USER_STATES.fields if f.name not in ("cutoff", "model")])


def expected_gap(total: Array, shape: float) -> Array:
    """Return the mean days until a user's next event, seen from just after an event.

    `total` : sum of exp(s) over the items. With `shape` 2 the mean is sqrt(pi / 2) / sqrt(total),
    as in the paper. Below 1, rare silences of months decide the mean, and it is of little use.

    >>> round(float(expected_gap(np.array([4.0]), 2.0)[0]), 4) == round((math.pi / 2) ** 0.5 / 2, 4)
    True
    """
    return np.asarray(math.gamma(1 + 1 / shape) * (shape / total) ** (1 / shape))


def median_gap(total: Array, shape: float, silent_days: Array) -> Array:
    """Return the days from a user's last event to the next one: it is as likely to come earlier as
    later, given that the user has been silent for `silent_days` since.

    The clocks of all items are taken to run from the user's last event.

    >>> round(float(median_gap(np.array([2 * math.log(2)]), 2.0, np.array([0.0]))[0]), 4)
    1.0
    """
    return np.asarray((silent_days**shape + math.log(2) * shape / total) ** (1 / shape))


def total_intensities(users: Array, items: Array, recent: Array, place: Array) -> Array:
    """Return the sum of exp(s) over all items, for each user, float64 (n,).

    `users` float32 (n, d), `items` float32 (m, d); `recent` and `place` as in `IntensityScores`.
    """
    total = np.zeros(len(users))
    for begin in range(0, len(items), _TILE_ITEMS):
        s = users @ items[begin : begin + _TILE_ITEMS].T  # (n, tile)
        total += np.exp(s.clip(-LARGEST_EXPONENT, LARGEST_EXPONENT).astype(np.float64)).sum(axis=1)
    row, column = np.nonzero(recent >= 0)
    s = np.einsum("pd,pd->p", users[row], items[recent[row, column]]).astype(np.float64)
    with_place, without = (
        np.exp(value.clip(-LARGEST_EXPONENT, LARGEST_EXPONENT)) for value in (s + place[column], s)
    )
    np.add.at(total, row, with_place - without)
    return np.maximum(total, math.exp(-LARGEST_EXPONENT))


def state_rows(
    spark: SparkSession,
    shape: float,
    as_of: int,
    vectors: topk.Shared,
    shared: Mapping[str, topk.Shared],
) -> DataFrame:
    """Return `STATES` of all users. Lazy and narrow; nothing of a user is on the driver.

    Cost: the intensity of every item for every user, as the lists take.
    """
    broadcast = spark.sparkContext.broadcast((vectors, dict(shared)))

    def rows_of(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vectors, shared = broadcast.value
        items = np.asarray(vectors.array)
        arrays = {name: np.asarray(array.array) for name, array in shared.items()}
        for batch in batches:
            ids = batch.column("id").to_numpy()
            for begin in range(0, len(ids), _BLOCK_ROWS):
                yield state_batch(arrays, items, shape, as_of, ids[begin : begin + _BLOCK_ROWS])

    return spark.range(len(shared["user_idx"].array)).mapInArrow(rows_of, STATES)


def state_batch(
    arrays: Mapping[str, Array], items: Array, shape: float, as_of: int, rows: Array
) -> pa.RecordBatch:
    """Return `STATES` of the users in `rows`."""
    state = np.asarray(arrays["user_state"][rows])
    users = user_vectors(arrays, state, np.asarray(arrays["user_own.weight"][rows]))
    last_at = arrays["user_at"][rows]
    silent_days = (as_of - last_at) / MICROS_PER_DAY
    total = total_intensities(users, items, arrays["recent_items"][rows], arrays["place"])
    days = median_gap(total, shape, silent_days)
    is_known = days <= _FURTHEST_DAYS
    next_at = last_at + (np.where(is_known, days, 0) * MICROS_PER_DAY).astype(np.int64)
    timestamp = pa.timestamp("us", "UTC")
    start = np.arange(len(rows) + 1, dtype=np.int32) * state.shape[1]
    return pa.RecordBatch.from_arrays(
        [
            pa.array(arrays["user_idx"][rows], pa.int64()),
            pa.ListArray.from_arrays(pa.array(start), pa.array(state.ravel(), pa.float32())),
            pa.array(last_at, timestamp),
            pa.array(next_at, timestamp, mask=~is_known),
        ],
        names=STATES.names,
    )

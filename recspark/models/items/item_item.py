"""What all models share that are one item-item matrix.

Row j of the matrix holds what item j of a history adds to the score of every item.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import BinaryType
from scipy import sparse

from recspark import schema
from recspark.data.blocks import (
    Array,
    QueryBlock,
    micros,
    parse_histories,
)
from recspark.data.dataset import Dataset
from recspark.data.interactions import decayed_weights_of_vocabulary
from recspark.errors import CatalogueTooLargeError, ModelError
from recspark.models.base import RetrieverModel, Settings
from recspark.models.scoring import topk
from recspark.models.scoring.contributions import Contributions, entries_of_pairs
from recspark.models.setting_types import HalfLifeDays, TrendDays
from recspark.models.weights import HistoryWeights
from recspark.session import executor_slots

# Weights are rounded to multiples of 2^-14 before they are multiplied. Products are then multiples
# of 2^-28 and their sums are exact, so the result has the same bits in whatever order users arrive.
_STEPS = 2.0**14
_BAND_BYTES = 8 << 20  # most bytes of one band of rows of X^T X
_BANDS_PER_TASK = 8
# See `trend_factors`. `_EVEN_WEIGHT` was chosen at cutoff 2010-11-10 of the bundled data: NDCG@10
# of novel items changes by less than .002 from 0 to 3 and from 3 to 10 (`ease` and `item_knn` with
# decay, half-lives of 3, 5 and 10 days).
_LONG_HALF_LIVES = 6.0
_EVEN_WEIGHT = 3.0


class ItemItemSettings(Settings):
    """Settings of the weights of a history's items, of the trend, and of the largest catalogue."""

    half_life_days: HalfLifeDays = None
    weighting: Literal["last", "sum", "binary"] = Field(
        "last",
        description="weight of an item in a history: last = its heaviest decayed event, sum = the "
        "sum of its decayed events, binary = 1",
    )
    trend_days: TrendDays = None
    max_items: int = Field(
        20_000,
        ge=1,
        description="largest catalogue, in items; a fit takes 12 max_items^2 bytes on the driver "
        "(4.8 GB at 20,000). Guess: the memory of a nightly driver",
    )


class ItemItemModel(RetrieverModel):
    """A fitted item-item matrix.

    `matrix` float32 (n_items, n_items): item j of a history adds `matrix[j, i]`, times its weight,
    to the score of item i. With the setting `trend_days`, column i has been multiplied by the trend
    of item i (see `multiply_by_trend`), so scores and neighbours follow the trend.
    """

    evidence_only: ClassVar[bool] = False  # see `topk.SparseScores`

    def __init__(
        self, settings: ItemItemSettings, cutoff: datetime, items: Array, matrix: Array
    ) -> None:
        super().__init__(settings, cutoff, items)
        self.matrix = matrix
        self._weights = HistoryWeights(micros(cutoff), settings.half_life_days, settings.weighting)

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        reach = np.abs(self.matrix).max(axis=1).astype(np.float64)
        return ItemItemScorer(
            self._weights, self.items, topk.Shared(self.matrix), reach, self.evidence_only
        )

    def arrays(self) -> dict[str, Array]:
        """See `RetrieverModel`."""
        return {"matrix": self.matrix}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RetrieverModel`."""
        assert isinstance(settings, ItemItemSettings)
        return cls(settings, cutoff, items, arrays["matrix"])


@dataclass(frozen=True)
class ItemItemScorer:
    """Weighs the items of a history as at fit, and adds up their weighted matrix rows."""

    weights: HistoryWeights
    items: Array
    matrix: topk.Shared
    reach: Array  # float64 (n_items,): the largest |value| of each row of `matrix`
    evidence_only: bool

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        start, items, weights = self.weights.local(block.history, self.items)
        return topk.SparseScores(
            start, items, weights, np.asarray(self.matrix.array), self.reach, self.evidence_only
        )

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """See `ContributingScorer`. Item j adds its weight times `matrix[j, i]`."""
        start, own_items, weights = self.weights.local(block.history, self.items)
        start_of_pairs, entries = entries_of_pairs(start, rows)
        listed = np.repeat(items, np.diff(start_of_pairs))
        values = np.asarray(self.matrix.array)[own_items[entries], listed].astype(np.float64)
        values *= weights[entries]
        return Contributions(start_of_pairs, own_items[entries], values, np.zeros(len(rows)))


def vocabulary_within_limit(data: Dataset, settings: ItemItemSettings, name: str) -> Array:
    """Return the vocabulary. Raises CatalogueTooLargeError if it has more than `max_items` items.

    The error comes before the memory of a fit is taken. `name` : the model's name, for the message.
    """
    items = data.vocabulary()
    if len(items) > settings.max_items:
        needed = 12 * len(items) ** 2 / 1e9
        raise CatalogueTooLargeError(
            f"{name}: {len(items):,} items before the cutoff, max_items is {settings.max_items:,}; "
            f"a fit takes {needed:,.1f} GB on the driver. Raise models.{name}.max_items, or use als"
        )
    return items


def gram(histories: DataFrame, items: Array, weights: HistoryWeights) -> Array:
    """Return X^T X, float64 (n_items, n_items).

    X has a row per user and a column per item of the vocabulary `items`. It holds the weights that
    `weights` gives, rounded to multiples of 2^-14. The rounding moves a weight by at most 2^-15
    (3e-5). Everything after it is exact, so users and partitions may come in any order.

    Raises ModelError where sums would leave the exact range: where the squared weights of one item
    add up to 2^25 in one partition, or to 2^34 over all partitions.

    Cost: one job, with one shuffle. There are at most as many tasks as executor slots. Each task
    multiplies its users' rows; X^T X is symmetric, so the task sends on only half of its product,
    in bands of at most 8 MB. The shuffle brings the parts of a band together, and they are added
    up. The driver holds the result only.

    Example: with 5 items and bands of 2 rows, the bands begin at the rows 0, 2 and 4. They hold the
    columns from their first row on: rows 0-1 of all columns, rows 2-3 of the columns 2-4, and row 4
    of column 4. The rest follows by symmetry.
    """
    n_items = len(items)
    height = max(1, _BAND_BYTES // (8 * n_items))
    n_bands = math.ceil(n_items / height)
    spark = histories.sparkSession
    shared = spark.sparkContext.broadcast((items, weights))

    def multiply(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, weigh_history = shared.value
        users = _users(batches, vocabulary, weigh_history)
        users_of_items = users.T.tocsr()  # (n_items, users)
        for band in range(n_bands if users.nnz else 0):
            begin = band * height
            band_part = (users_of_items[begin : begin + height] @ users[:, begin:]).toarray()
            if band_part.max(initial=0) >= 2.0**53:
                raise ModelError(_TOO_HEAVY)
            yield _band_batch(band, band_part.astype(np.int64))  # exact: whole numbers below 2^53

    def add_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        totals: dict[int, Array] = {}
        for batch in batches:
            for band, data in zip(
                batch.column("band").to_pylist(), batch.column("data"), strict=True
            ):
                band_part = np.frombuffer(data.as_buffer(), np.int64)
                totals[band] = totals[band] + band_part if band in totals else band_part
                if totals[band].max() >= 2**62:
                    raise ModelError(_TOO_HEAVY)
        for band, band_part in totals.items():
            yield _band_batch(band, band_part)

    summed_bands = (
        histories.select("history")
        .coalesce(executor_slots(spark))
        .mapInArrow(multiply, _BANDS)
        .repartition(math.ceil(n_bands / _BANDS_PER_TASK), "band")
        .mapInArrow(add_up, _BANDS)
    )
    gram_matrix = np.zeros((n_items, n_items))
    try:
        for row in summed_bands.toLocalIterator(prefetchPartitions=True):
            begin = row["band"] * height
            part = np.frombuffer(row["data"], np.int64).reshape(-1, n_items - begin) / _STEPS**2
            gram_matrix[begin : begin + height, begin:] = part
            gram_matrix[begin:, begin : begin + height] = part.T
    finally:
        shared.destroy()
    return gram_matrix


def keep_nearest(matrix: Array, n: int) -> None:
    """Set to 0 all but the `n` largest values of each column of `matrix`.

    Of equal values, the one in the smaller row is kept first.

    >>> m = np.array([[0, 1, 2], [3, 0, 2], [4, 1, 0]], np.float32)
    >>> keep_nearest(m, 1)
    >>> m
    array([[0., 1., 2.],
           [0., 0., 0.],
           [4., 0., 0.]], dtype=float32)
    """
    for column in matrix.T:
        order = np.argsort(-column, kind="stable")
        column[order[n:]] = 0


def multiply_by_trend(matrix: Array, items: Array, data: Dataset, trend_days: float | None) -> None:
    """Multiply each column of `matrix` by the trend of its item, in place.

    With `trend_days` None the matrix stays as it is, and no job runs. `matrix` is float32 (n_items,
    n_items) over the vocabulary `items`. Every score is then multiplied by the trend of its item.
    Negative scores (of `ease`) are multiplied too, so a rising item with a negative score falls.
    All factors are above 0: no score changes its sign, and a score of 0 stays 0. Within one column
    the order of the values stays, so `keep_nearest` keeps the same entries before and after.

    Cost: see `trend_factors`; no second matrix.
    """
    if trend_days is not None:
        matrix *= trend_factors(data, items, trend_days).astype(np.float32)


def trend_factors(data: Dataset, items: Array, trend_days: float) -> Array:
    """Return the trend of each item of the vocabulary `items`, float64 (n_items,).

    With h = `trend_days` and pop_h(i) = the sum over all users' events on item i of
    weight * 0.5^(age / h):

        trend(i) = (6 pop_h(i) + c) / (pop_6h(i) + c),  c = 3

    An item that sells r per day, evenly and for much longer than 6h, has pop_h = r h / ln 2 and
    pop_6h = 6 r h / ln 2, so its trend is 1. Above 1 the item sells more than it did, below 1 less.
    The number c is the weight, within pop_6h, of imagined events that sell evenly. They draw the
    trend of an item with few events towards 1, and an item without recent events has the trend 1.
    As 0 <= pop_h <= pop_6h, every trend lies above 0 and below 6. Where the log is not longer than
    a few times 6h, an item that sells evenly has a trend above 1; all such items have about the
    same one, so their order in the lists does not change.

    Events that weigh 0 or less, or have no weight, are left out. Sums are exact (see
    `decayed_item_weights`), so users and partitions may come in any order.

    Example: h = 5 days. An item with 10 events now has pop_5 = 10 and pop_30 = 10, so its trend is
    63 / 13 = 4.8. With the same events 30 days ago it has pop_5 = 0.16 and pop_30 = 5, so its trend
    is 3.9 / 8 = 0.49.

    Cost: two jobs, each with a shuffle of item-sized sums; the driver holds a row per item.
    """
    positive_events = F.filter("history", lambda event: event["weight"] > 0)
    histories = data.histories.select(positive_events.alias("history"))

    recent, long = (
        decayed_weights_of_vocabulary(histories, data.cutoff, half_life_days, items)
        for half_life_days in (trend_days, _LONG_HALF_LIVES * trend_days)
    )
    return np.asarray((_LONG_HALF_LIVES * recent + _EVEN_WEIGHT) / (long + _EVEN_WEIGHT))


_BANDS = schema.columns(band=schema.INT, data=BinaryType())
_TOO_HEAVY = (
    "the squared weights of one item's users add up beyond what sums exactly: "
    "lower features.event_weights (only their ratios matter)"
)


def _users(
    batches: Iterable[pa.RecordBatch], items: Array, weights: HistoryWeights
) -> sparse.csr_matrix:
    """Return the weights of a partition's users as multiples of 2^-14, float64 (users, n_items).

    The values are whole numbers: a weight of 1 is 2^14.
    """
    starts, columns, values, n_entries = [np.zeros(1, np.int64)], [], [], 0
    for batch in batches:
        start, column, weight = weights.local(parse_histories(batch.column("history")), items)
        starts.append(start[1:] + n_entries)
        n_entries += int(start[-1])
        columns.append(column)
        values.append(np.rint(weight.astype(np.float64) * _STEPS))
    start = np.concatenate(starts)
    return sparse.csr_matrix(
        (
            np.concatenate(values or [np.zeros(0)]),
            np.concatenate(columns or [np.zeros(0, np.int32)]),
            start,
        ),
        shape=(len(start) - 1, len(items)),
    )


def _band_batch(band: int, part: Array) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array([band], pa.int32()), pa.array([part.tobytes()], pa.binary())], names=_BANDS.names
    )

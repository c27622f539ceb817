"""Models that are one item-item matrix: what each item in a history adds to every other item."""

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
from recspark.errors import CatalogueTooLargeError, ModelError
from recspark.models.base import RetrieverModel, Settings
from recspark.models.scoring import topk
from recspark.models.setting_types import HalfLifeDays
from recspark.models.weights import HistoryWeights
from recspark.session import executor_slots

# Weights are rounded to multiples of 2^-14 before they are multiplied, so that products are whole
# numbers of 2^-28 and their sums are exact: the same bits in whatever order users arrive.
_STEPS = 2.0**14
_BAND_BYTES = 8 << 20
_BANDS_PER_TASK = 8


class ItemItemSettings(Settings):
    """Settings of how a history becomes weights, and of the largest catalogue."""

    half_life_days: HalfLifeDays = None
    weighting: Literal["last", "sum", "binary"] = Field(
        "last",
        description="weight of an item in a history: its heaviest decayed event, their sum, or 1",
    )
    max_items: int = Field(
        20_000,
        ge=1,
        description="largest catalogue; a fit takes 12 bytes an item squared on the driver "
        "(4.8 GB at 20,000). Guess: what a nightly driver has",
    )


class ItemItemModel(RetrieverModel):
    """A fitted item-item matrix.

    `matrix` float32 (n_items, n_items): row j is what item j in a history adds to each item.
    """

    evidence_only: ClassVar[bool] = False

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
    """Weighs the history with the model's own decay and adds up matrix rows."""

    weights: HistoryWeights
    items: Array
    matrix: topk.Shared
    reach: Array
    evidence_only: bool

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        start, items, weights = self.weights.local(block.history, self.items)
        return topk.SparseScores(
            start, items, weights, np.asarray(self.matrix.array), self.reach, self.evidence_only
        )


def check_catalogue(data: Dataset, settings: ItemItemSettings, name: str) -> Array:
    """Return the vocabulary; CatalogueTooLargeError, before memory is taken, above `max_items`."""
    items = data.vocabulary()
    if len(items) > settings.max_items:
        needed = 12 * len(items) ** 2 / 1e9
        raise CatalogueTooLargeError(
            f"{name}: {len(items):,} items before the cutoff, max_items is {settings.max_items:,}; "
            f"a fit takes {needed:,.1f} GB on the driver. Raise models.{name}.max_items, or use als"
        )
    return items


def gram(histories: DataFrame, items: Array, weights: HistoryWeights) -> Array:
    """Return X^T X, float64 (n_items, n_items), of the users' weights X, rounded to 2^-14.

    The rounding moves a weight by at most 2^-15 (3e-5); everything after it is exact, so rows and
    partitions may come in any order. Raises ModelError where sums would leave the exact range:
    weights squared that add up to 2^25 for one item in one partition, or to 2^34 over all.

    Cost: one job. Each of at most as many tasks as there are slots multiplies its users' rows and
    hands on half of its product in bands of 8 MB; one shuffle by band adds them up; the driver
    holds the result only.
    """
    n = len(items)
    height = max(1, _BAND_BYTES // (8 * n))
    n_bands = math.ceil(n / height)
    spark = histories.sparkSession
    shared = spark.sparkContext.broadcast((items, weights))

    def multiply(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        vocabulary, weigh_history = shared.value
        users = _users(batches, vocabulary, weigh_history)
        columns = users.T.tocsr()
        for band in range(n_bands if users.nnz else 0):
            begin = band * height
            part = (columns[begin : begin + height] @ users[:, begin:]).toarray()
            if part.max(initial=0) >= 2.0**53:
                raise ModelError(_TOO_HEAVY)
            yield _band_batch(band, part.astype(np.int64))

    def add_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        total: dict[int, Array] = {}
        for batch in batches:
            for band, data in zip(
                batch.column("band").to_pylist(), batch.column("data"), strict=True
            ):
                part = np.frombuffer(data.as_buffer(), np.int64)
                total[band] = total[band] + part if band in total else part
                if total[band].max() >= 2**62:
                    raise ModelError(_TOO_HEAVY)
        for band, part in total.items():
            yield _band_batch(band, part)

    summed = (
        histories.select("history")
        .coalesce(executor_slots(spark))
        .mapInArrow(multiply, _BANDS)
        .repartition(math.ceil(n_bands / _BANDS_PER_TASK), "band")
        .mapInArrow(add_up, _BANDS)
    )
    out = np.zeros((n, n))
    for row in summed.toLocalIterator(prefetchPartitions=True):
        begin = row["band"] * height
        part = np.frombuffer(row["data"], np.int64).reshape(-1, n - begin) / _STEPS**2
        out[begin : begin + height, begin:] = part
        out[begin:, begin : begin + height] = part.T
    return out


def keep_nearest(matrix: Array, n: int) -> None:
    """Set to 0, in each column of `matrix`, all but the `n` largest values; ties by the first row.

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


_BANDS = schema.columns(band=schema.INT, data=BinaryType())
_TOO_HEAVY = (
    "the squared weights of one item's users add up beyond what sums exactly: "
    "lower features.event_weights (only their ratios matter)"
)


def _users(
    batches: Iterable[pa.RecordBatch], items: Array, weights: HistoryWeights
) -> sparse.csr_matrix:
    """Return the whole-number weights of a partition's users, float64 (users, n_items)."""
    starts, columns, values, offset = [np.zeros(1, np.int64)], [], [], 0
    for batch in batches:
        start, column, weight = weights.local(parse_histories(batch.column("history")), items)
        starts.append(start[1:] + offset)
        offset += int(start[-1])
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

"""Training rows of labels and features: what the networks that rank or classify by fields read.

The rows come from the examples of a ranker, or from any table with a label and features. They are a
copy for the ranks of one training: spread over equal files, in an order that follows from the
values alone, with each number replaced by its position in the distribution of its feature.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.data.blocks import Array
from recspark.data.dataset import Examples, TrainingSet
from recspark.data.feature_encoding import Encoding, flat, make_encoding, parse_encoded
from recspark.data.training_rows import fixed_lists, spread
from recspark.errors import ModelError

TABLE = "training_rows"
_SAMPLE_ROWS = 100_000  # rows from which the distribution of each number is learnt
_SORTED = ("label", "weight", "numbers", "fields")  # what a row says; files are sorted by it
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Quantiles:
    """The distribution of each number, as it was in the training rows.

    `values` float32 (n_numbers, n_quantiles): the quantiles at equal steps of probability from 0 to
    1, ascending in each row. A row of infinities stands for a number that was always missing.

    Source: Covington, Adams, Sargin 2016, "Deep Neural Networks for YouTube Recommendations",
    section 4.1; Cheng et al. 2016, "Wide & Deep Learning", section 4.1.
    """

    values: Array

    @classmethod
    def of(cls, numbers: Array, n_quantiles: int) -> Quantiles:
        """Return the quantiles of each column of `numbers` (n, n_numbers), which may hold NaN."""
        shares = np.linspace(0, 1, n_quantiles)
        values = np.full((numbers.shape[1], n_quantiles), np.inf, np.float32)
        for n, column in enumerate(numbers.T):
            present = column[~np.isnan(column)]
            if len(present):
                quantiles = np.quantile(present, shares, method="inverted_cdf")
                values[n] = np.clip(quantiles, -_LARGEST, _LARGEST)
        return cls(values)

    @cached_property
    def _curves(self) -> list[tuple[Array, Array]]:
        """Return the distinct quantiles of each number, and the position of each of them.

        A value that fills several quantiles (many numbers are 0 in most rows) has the middle of its
        positions.
        """
        curves = []
        for quantiles in self.values:
            distinct, first, counts = np.unique(quantiles, return_index=True, return_counts=True)
            curves.append((distinct, (first + (counts - 1) / 2) / (len(quantiles) - 1)))
        return curves

    def positions(self, numbers: Array) -> Array:
        """Return the share of training rows with a smaller number, float32 as `numbers`, in [0, 1].

        Between two quantiles it is interpolated. NaN stays NaN, and a number that was always
        missing gives NaN. A position depends on no other row.

        >>> quantiles = Quantiles(np.array([[0, 0, 0, 10, 20]], np.float32))
        >>> quantiles.positions(np.array([[0], [10], [15], [99], [np.nan]], np.float32)).T
        array([[0.25 , 0.75 , 0.875, 1.   ,   nan]], dtype=float32)
        """
        positions = np.full(numbers.shape, np.nan, np.float32)
        for n, (values, shares) in enumerate(self._curves):
            if np.isfinite(values[0]):
                positions[:, n] = np.interp(numbers[:, n], values, shares)
        return positions


@dataclass(frozen=True)
class Counted:
    """What one pass over examples tells: numbers of rows, and a checksum of all their values."""

    n_rows: int
    n_positive: int
    checksum: int


def counted(examples: Examples) -> Counted:
    """Count the rows of `examples`, and those with a label above 0. One job."""
    hashed = F.pmod(_hash_of_values(examples), F.lit(1 << 31))
    row = examples.rows.agg(
        F.count(F.lit(1)), F.count_if(F.col("label") > 0), F.coalesce(F.sum(hashed), F.lit(0))
    ).head()
    assert row is not None
    return Counted(*row)


def quantiles_of(examples: Examples, n_rows: int, n_quantiles: int, seed: int) -> Quantiles:
    """Return the distribution of each number of `examples`, which has `n_rows` rows.

    It is that of about 100,000 rows, which a hash of their values and `seed` draws. One job; the
    driver holds the numbers of these rows.
    """
    encoding = examples.encoding
    if not encoding.numbers:
        return Quantiles(np.zeros((0, n_quantiles), np.float32))
    share = min(1.0, _SAMPLE_ROWS / max(n_rows, 1))
    draw = F.pmod(F.xxhash64(_hash_of_values(examples), F.lit(seed)), F.lit(1 << 32))
    is_drawn = draw < F.lit(int(share * (1 << 32)))
    drawn = examples.rows.where(is_drawn).select("numbers", "fields").toArrow()
    numbers = [parse_encoded(batch, encoding)[0] for batch in drawn.to_batches()]
    return Quantiles.of(np.concatenate([encoding.missing(0)[0], *numbers]), n_quantiles)


def write_training_rows(
    examples: Examples, quantiles: Quantiles, folder: str, n_files: int
) -> TrainingSet:
    """Write the training rows of `examples` to the URI `folder`, and return their files.

    The columns are those of `schema.TRAINING_ROWS`; without a column `weight` in `examples` each
    row weighs 1. Where `examples` has a column `user_idx`, the rows of a user come into the same
    file, so that a validation, which holds back whole files, has users of its own. Other rows are
    spread by a hash of all their values and of a number that equal rows are given (one more
    shuffle).

    Rows are sorted in each file by all their values. So neither the files nor their order depend on
    how `examples` is partitioned. A folder that is complete is used as it is. One shuffle, one job.
    """
    if storage.is_complete(folder):
        return _files_of(folder)
    encoding = examples.encoding
    has_users = "user_idx" in examples.rows.columns
    hashed = F.xxhash64("user_idx")
    if not has_users:
        values = _hash_of_values(examples)
        copy = F.row_number().over(Window.partitionBy(values).orderBy(values))
        hashed = F.xxhash64(values, copy)
    rows = _weighted(examples.rows).withColumn("hash", hashed)
    in_order = spread(rows, F.col("hash"), n_files).sortWithinPartitions("hash", *_SORTED)

    def place(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            numbers, fields = parse_encoded(batch, encoding)
            positions = quantiles.positions(numbers)
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column("label"),
                    batch.column("weight"),
                    fixed_lists(positions),
                    fixed_lists(fields),
                ],
                names=schema.TRAINING_ROWS.names,
            )

    storage.remove(folder)
    training_rows = in_order.select(*_SORTED).mapInArrow(place, schema.TRAINING_ROWS)
    training_rows.write.parquet(folder)
    storage.mark_complete(folder)
    return _files_of(folder)


def examples_of_table(
    table: DataFrame,
    label: str = "label",
    *,
    encoding: Encoding | None = None,
    max_values: int = 100_000,
) -> Examples:
    """Return the rows of a table as examples: any table with a label, to learn a classifier from.

    Parameters
    ----------
    table : numeric columns become numbers, texts become fields, and a list of texts becomes a field
        for each of its first three levels. A number that names something (an id) must be cast to a
        string. A column `weight`, where there is one, is what a row weighs
    label : its column; a row with a label above 0 is positive, one without a label is left out
    encoding : that of the table that the classifier was fitted on; None = it is made from `table`
    max_values : largest vocabulary of a field; see `make_encoding`

    Raises ModelError for a column that is neither number nor text. Without `encoding` one job, else
    lazy and narrow.
    """
    if label not in table.columns:
        raise ModelError(f"the table has no column '{label}', but {sorted(table.columns)}")
    kept = [name for name in (label, "weight") if name in table.columns]
    labelled = table.where(schema.quoted(label).isNotNull())
    features = flat(labelled.drop(*kept))
    encoding = encoding or make_encoding(features, max_values)
    # `flat` keeps all columns but lists of texts, which it replaces, so label and weight may pass.
    rows = flat(labelled).withColumns({name: schema.quoted(name).cast("float") for name in kept})
    rows = rows.withColumnRenamed(label, "label")
    keys = ("label", "weight") if "weight" in kept else ("label",)
    return Examples(encoding.encode(rows, keys), encoding)


def _weighted(rows: DataFrame) -> DataFrame:
    weight = F.col("weight") if "weight" in rows.columns else F.lit(1.0)
    return rows.withColumn("weight", weight.cast("float"))


def _hash_of_values(examples: Examples) -> Column:
    """Return a 64-bit hash of what a row says; equal rows have an equal one."""
    rows = examples.rows
    keys = [name for name in ("cutoff", "mode", "user_idx", "item_idx") if name in rows.columns]
    weight = ["weight"] if "weight" in rows.columns else []
    return F.xxhash64(*keys, "label", *weight, "numbers", "fields")


def _files_of(folder: str) -> TrainingSet:
    files = [uri for uri in storage.list_files(folder) if uri.endswith(".parquet")]
    return TrainingSet.of_files(TABLE, 0, files)

"""The data that a model is fitted on: all tables, sliced at one cutoff."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

import fsspec
import numpy as np
import pyarrow.parquet as pq
from pyspark.sql import DataFrame

from recspark.data.blocks import Array
from recspark.data.feature_encoding import Encoding
from recspark.errors import EmptyDataError, ModelError


@dataclass(frozen=True)
class TrainingSet:
    """The files of one version of a training table, which a feed reads.

    Parameters
    ----------
    table, version : the table and the version that the files belong to
    files : (URI, number of rows) of each active file, sorted by URI
    """

    table: str
    version: int
    files: tuple[tuple[str, int], ...]

    @classmethod
    def of_files(cls, table: str, version: int, uris: Iterable[str]) -> Self:
        """Return the training set of the files `uris`, sorted.

        No Spark job: this process reads the footer of each Parquet file for its number of rows.
        """
        files = sorted(uris)
        with ThreadPoolExecutor(max_workers=8) as pool:
            n_rows = list(pool.map(_n_rows_in_file, files))
        return cls(table, version, tuple(zip(files, n_rows, strict=True)))

    @property
    def n_rows(self) -> int:
        """The number of rows in all files."""
        return sum(n_rows for _, n_rows in self.files)


def _n_rows_in_file(uri: str) -> int:
    filesystem, path = fsspec.core.url_to_fs(uri)
    return int(pq.read_metadata(path, filesystem=filesystem).num_rows)


@dataclass(frozen=True)
class Examples:
    """The examples that a ranker learns from.

    Parameters
    ----------
    rows : cutoff, user_idx, item_idx, label float (0 = the user did nothing with the item in the
        horizon after the cutoff), numbers array<float>, fields array<int>. Every horizon ended
        before the cutoff of the `Dataset` that has these examples
    encoding : says what each of `numbers` and `fields` is
    """

    rows: DataFrame
    encoding: Encoding


@dataclass(frozen=True)
class Dataset:
    """Everything before `cutoff` and nothing after it.

    The DataFrames are lazy and read pinned versions of the tables.

    Parameters
    ----------
    cutoff : first instant that is not in the data, UTC
    histories : user_idx bigint, history (`schema.HISTORY`, newest last, never empty), seen
        array<int>
    items : item_idx int, item_id, item_name, category, price, text: the items with an event before
        the cutoff
    user_features, item_features : as in the tables, without the column `cutoff`
    training : table -> the files of its fixed-length training set, for the tables that the model
        asks for (`Algorithm.training_tables`)
    vectors : encoder -> `item_idx, vector array<float>` of the items as they were before the
        cutoff, for the encoders that the model needs; an item may have no vector
    examples : of a ranker; None for other models
    catalogue : `schema.CONTENT` of every item described before the cutoff, also of the items that
        nobody acted on; None = the tables have no descriptions
    """

    cutoff: datetime
    histories: DataFrame
    items: DataFrame
    user_features: DataFrame
    item_features: DataFrame
    training: Mapping[str, TrainingSet] = field(default_factory=dict)
    vectors: Mapping[str, DataFrame] = field(default_factory=dict)
    examples: Examples | None = None
    catalogue: DataFrame | None = None

    def training_set(self, table: str) -> TrainingSet:
        """Return the training set of `table`; raises ModelError where this data has none."""
        if table not in self.training:
            raise ModelError(
                f"no training set '{table}' is here, but {sorted(self.training)}; run build_features "
                "with this model among `models`, and with the settings that it has"
            )
        return self.training[table]

    def vocabulary(self) -> Array:
        """Return the `item_idx` of the eligible items, int32 ascending (n_items,).

        The position of an item in this array is the model's local index. Runs one job; the driver
        needs 4 bytes per item. Raises EmptyDataError where nobody acted before the cutoff.
        """
        item_idx = self.items.select("item_idx").toArrow().column("item_idx")
        items = np.sort(item_idx.to_numpy().astype(np.int32))
        if len(items) == 0:
            raise EmptyDataError(
                f"no item has an event before {self.cutoff:%Y-%m-%d %H:%M} UTC; is the run date right?"
            )
        return items

"""What a model is fitted on: all tables sliced at one cutoff."""

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
from recspark.data.encoded import Encoding
from recspark.errors import EmptyDataError, ModelError


@dataclass(frozen=True)
class TrainingSet:
    """The files of one version of a training table: what a feed reads.

    Parameters
    ----------
    table, version : where the files belong to
    files : (URI, rows) of each active file, sorted by URI
    """

    table: str
    version: int
    files: tuple[tuple[str, int], ...]

    @classmethod
    def of_files(cls, table: str, version: int, uris: Iterable[str]) -> Self:
        """Return the set of these files, sorted. No Spark job; the footer of each is read here."""
        files = sorted(uris)
        with ThreadPoolExecutor(max_workers=8) as pool:
            rows = list(pool.map(_rows_of, files))
        return cls(table, version, tuple(zip(files, rows, strict=True)))

    @property
    def n_rows(self) -> int:
        """Rows over all files."""
        return sum(rows for _, rows in self.files)


def _rows_of(uri: str) -> int:
    system, path = fsspec.core.url_to_fs(uri)
    return int(pq.read_metadata(path, filesystem=system).num_rows)


@dataclass(frozen=True)
class Examples:
    """What a ranker learns from.

    Parameters
    ----------
    rows : cutoff, user_idx, item_idx, label float (0 = the user did nothing with the item in the
        horizon after the cutoff), numbers array<float>, fields array<int>; horizons ended before the
        cutoff of the data that these are part of
    encoding : of `numbers` and `fields`
    """

    rows: DataFrame
    encoding: Encoding


@dataclass(frozen=True)
class Dataset:
    """Everything before `cutoff`, and nothing after it; frames are lazy and from pinned versions.

    Parameters
    ----------
    cutoff : first instant that is not in it, UTC
    histories : user_idx bigint, history (`schema.HISTORY`, newest last, never empty), seen
        array<int>
    items : item_idx int, item_id, item_name, category, price, text: items with an event before
        cutoff
    user_features, item_features : as in the tables, without `cutoff`
    training : table to the files of its fixed-length training set, of the tables that the model asks
        for (`Algorithm.training_tables`)
    vectors : encoder to `item_idx, vector array<float>` of the items as they were before the cutoff, of
        the encoders that the model needs; an item may have none
    examples : of a ranker; None for other models
    """

    cutoff: datetime
    histories: DataFrame
    items: DataFrame
    user_features: DataFrame
    item_features: DataFrame
    training: Mapping[str, TrainingSet] = field(default_factory=dict)
    vectors: Mapping[str, DataFrame] = field(default_factory=dict)
    examples: Examples | None = None

    def training_set(self, table: str) -> TrainingSet:
        """Return the training set of `table`; ModelError where this data has none of it."""
        if table not in self.training:
            raise ModelError(
                f"no training set '{table}' is here, but {sorted(self.training)}; run build_features "
                "with this model among `models`, and with the settings that it has"
            )
        return self.training[table]

    def vocabulary(self) -> Array:
        """Return the eligible items' `item_idx`, int32 ascending (n_items,).

        Position in it is the model's local index. Runs one job; driver memory 4 bytes an item.
        Raises EmptyDataError where nobody acted before the cutoff.
        """
        rows = self.items.select("item_idx").toArrow().column("item_idx")
        items = np.sort(rows.to_numpy().astype(np.int32))
        if len(items) == 0:
            raise EmptyDataError(
                f"no item has an event before {self.cutoff:%Y-%m-%d %H:%M} UTC; is the run date right?"
            )
        return items

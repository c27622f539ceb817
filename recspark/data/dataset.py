"""What a model is fitted on: all tables sliced at one cutoff."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Self

import fsspec
import numpy as np
import pyarrow.parquet as pq
from pyspark.sql import DataFrame

from recspark.data.blocks import Array
from recspark.errors import EmptyDataError


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
class Dataset:
    """Everything before `cutoff`, and nothing after it; frames are lazy and from pinned versions.

    Parameters
    ----------
    cutoff : first instant that is not in it, UTC
    histories : user_idx bigint, history (`schema.HISTORY`, newest last, never empty), seen
        array<int>
    interactions : user_idx, item_idx, weight float, n_events int, last_event_at
    items : item_idx int, item_id, item_name, category, price, text: items with an event before
        cutoff
    user_features, item_features : as in the tables, without `cutoff`
    training : files of the fixed-length training set that the model asks for
        (`Recommender.training_table`); None where it asks for none
    """

    cutoff: datetime
    histories: DataFrame
    interactions: DataFrame
    items: DataFrame
    user_features: DataFrame
    item_features: DataFrame
    training: TrainingSet | None = None

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

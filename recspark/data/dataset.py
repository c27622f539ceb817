"""What a model is fitted on: all tables sliced at one cutoff."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
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

    @property
    def n_rows(self) -> int:
        """Rows over all files."""
        return sum(rows for _, rows in self.files)


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

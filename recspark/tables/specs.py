"""The columns, the key and the slice of every Delta table. `docs/tables.md` says the same for
readers of the tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pyspark.sql.types import StructType

from recspark import schema


@dataclass(frozen=True)
class TableSpec:
    """One table: its columns, the key of a row, and the columns that define the slice of a write.

    Parameters
    ----------
    name : folder name below the root of the tables
    schema : columns in order
    key : columns that together are unique; () = rows are not unique
    unique : another column in which no two rows may have the same value
    partition : partition columns; their values define the slices that `replace_slice` replaces
    cluster : columns by which rows are sorted within a file; default: the key
    row_bytes : estimated bytes of one row on disk, a guess per table; decides the number of files
    published : whether other teams read the table
    measured : columns of measured times and speeds. Two contents that differ only in them count as
        equal
    properties : further Delta table properties
    """

    name: str
    schema: StructType
    key: tuple[str, ...] = ()
    unique: str | None = None
    partition: tuple[str, ...] = ()
    cluster: tuple[str, ...] = ()
    row_bytes: int = 64
    published: bool = False
    measured: tuple[str, ...] = ()
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def order(self) -> tuple[str, ...]:
        """Columns by which the rows of one file are sorted."""
        return self.cluster or self.key


# Without this, Delta accepts an insert-only MERGE although another writer appends at the same time,
# and one user gets two ids.
_SERIALIZABLE = {"delta.isolationLevel": "Serializable"}

SPECS: dict[str, TableSpec] = {
    spec.name: spec
    for spec in [
        TableSpec(
            "events",
            schema.EVENTS,
            key=("event_id",),
            partition=("ingest_date",),
            cluster=("event_date", "user_id", "event_at", "event_id"),
            row_bytes=60,
        ),
        TableSpec(
            "quarantine",
            schema.QUARANTINE,
            partition=("ingest_date",),
            cluster=("input", "reason", "event_date", "row"),
            row_bytes=100,
        ),
        TableSpec(
            "sessions",
            schema.SESSIONS,
            key=("session_id",),
            partition=("started_date",),
            row_bytes=150,
        ),
        TableSpec(
            "user_ids",
            schema.USER_IDS,
            key=("user_id",),
            unique="user_idx",
            cluster=("user_idx",),
            row_bytes=24,
            properties=_SERIALIZABLE,
        ),
        TableSpec(
            "item_ids",
            schema.ITEM_IDS,
            key=("item_id",),
            unique="item_idx",
            cluster=("item_idx",),
            row_bytes=24,
            properties=_SERIALIZABLE,
        ),
        TableSpec(
            "items",
            schema.ITEMS,
            key=("item_id", "valid_from", "ingest_date"),
            partition=("ingest_date",),
            row_bytes=80,
        ),
        TableSpec(
            "histories", schema.HISTORIES, key=("user_idx",), partition=("bucket",), row_bytes=3000
        ),
        TableSpec(
            "user_features",
            schema.USER_FEATURES,
            key=("cutoff", "user_idx"),
            partition=("cutoff",),
            row_bytes=60,
        ),
        TableSpec(
            "item_features",
            schema.ITEM_FEATURES,
            key=("cutoff", "item_idx"),
            partition=("cutoff",),
            row_bytes=80,
        ),
        TableSpec(
            "item_vectors",
            schema.ITEM_VECTORS,
            key=("encoder", "artifact", "item_idx", "content"),
            partition=("encoder",),
            row_bytes=400,
        ),
        TableSpec(
            "examples",
            schema.EXAMPLES,
            key=("cutoff", "model", "mode", "user_idx", "item_idx"),
            partition=("cutoff", "model"),
            row_bytes=300,
        ),
        TableSpec(
            "training_bags",
            schema.TRAINING_BAGS,
            key=("cutoff", "user_idx"),
            partition=("cutoff",),
            row_bytes=1000,
        ),
        TableSpec(
            "training_curves",
            schema.TRAINING_CURVES,
            key=("run_date", "model", "cutoff", "epoch"),
            partition=("run_date", "model"),
            row_bytes=40,
            published=True,
            measured=("rows_per_s", "seconds"),
        ),
        TableSpec(
            "training_sessions",
            schema.TRAINING_SEQUENCES,
            key=("cutoff", "user_idx", "position"),
            partition=("cutoff",),
            row_bytes=60,
        ),
        TableSpec(
            "training_histories",
            schema.TRAINING_SEQUENCES,
            key=("cutoff", "user_idx", "position"),
            partition=("cutoff",),
            row_bytes=150,
        ),
        TableSpec(
            "training_timelines",
            schema.TRAINING_TIMELINES,
            key=("cutoff", "user_idx"),
            partition=("cutoff",),
            row_bytes=1000,
        ),
        TableSpec(
            "training_typed_timelines",
            schema.TRAINING_TYPED_TIMELINES,
            key=("cutoff", "user_idx"),
            partition=("cutoff",),
            row_bytes=1200,
        ),
        TableSpec(
            "training_session_impressions",
            schema.TRAINING_IMPRESSIONS,
            key=("cutoff", "user_idx", "position"),
            partition=("cutoff",),
            row_bytes=200,
        ),
        TableSpec(
            "training_history_impressions",
            schema.TRAINING_IMPRESSIONS,
            key=("cutoff", "user_idx", "position"),
            partition=("cutoff",),
            row_bytes=300,
        ),
        TableSpec(
            "training_events",
            schema.TRAINING_EVENTS,
            key=("cutoff", "user_idx", "position"),
            partition=("cutoff",),
            row_bytes=15,
        ),
        TableSpec(
            "training_item_bags",
            schema.TRAINING_ITEM_BAGS,
            key=("cutoff", "item_idx"),
            partition=("cutoff",),
            row_bytes=1000,
        ),
        TableSpec(
            "training_texts",
            schema.TRAINING_TEXTS,
            key=("cutoff", "item_idx"),
            partition=("cutoff",),
            row_bytes=100,
        ),
        TableSpec(
            "user_states",
            schema.USER_STATES,
            key=("cutoff", "model", "user_idx"),
            partition=("cutoff", "model"),
            row_bytes=150,
        ),
        TableSpec(
            "candidates",
            schema.CANDIDATES,
            key=("run_date", "cutoff", "model", "mode", "user_idx", "rank"),
            partition=("run_date", "model"),
            cluster=("cutoff", "mode", "user_idx", "rank"),
            row_bytes=10,
        ),
        TableSpec(
            "metrics",
            schema.METRICS,
            key=("run_date", "kind", "cutoff", "model", "mode", "segment", "metric", "k"),
            partition=("run_date",),
            row_bytes=60,
            published=True,
        ),
        TableSpec(
            "recommendations",
            schema.RECOMMENDATIONS,
            key=("run_date", "list", "user_id", "rank"),
            partition=("run_date",),
            row_bytes=20,
            published=True,
        ),
        TableSpec(
            "staged_recommendations",
            schema.RECOMMENDATIONS,
            key=("run_date", "list", "user_id", "rank"),
            partition=("run_date",),
            row_bytes=20,
        ),
        TableSpec(
            "default_recommendations",
            schema.DEFAULT_RECOMMENDATIONS,
            key=("run_date", "segment", "rank"),
            partition=("run_date",),
            published=True,
        ),
        TableSpec(
            "item_neighbours",
            schema.ITEM_NEIGHBOURS,
            key=("run_date", "item_id", "rank"),
            partition=("run_date",),
            row_bytes=20,
            published=True,
        ),
        TableSpec(
            "gates",
            schema.GATES,
            key=("run_id", "list", "gate"),
            partition=("run_date",),
            published=True,
        ),
        TableSpec(
            "runs",
            schema.RUNS,
            key=("run_id", "stage", "model"),
            partition=("run_date",),
            published=True,
            # How long the log keeps the names of commits (see `TableCatalog.append`). A night older than
            # this is not run again.
            properties={"delta.setTransactionRetentionDuration": "interval 90 days"},
        ),
        TableSpec(
            "tuning", schema.TUNING, key=("cutoff", "model", "mode", "trial"), partition=("model",)
        ),
    ]
}

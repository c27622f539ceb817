"""What a night deletes: data that only nights of long ago needed, and that can be made again."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial

from pyspark.sql import Column
from pyspark.sql import functions as F

from recspark import storage
from recspark.config import cutoff_of
from recspark.errors import ConcurrentWriteError
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import encoder_days
from recspark.session import together
from recspark.tables.catalog import TableCatalog
from recspark.tables.specs import SPECS

# Tables with a slice for each night that nobody reads once the night is old.
_BY_NIGHT = ("candidates", "staged_recommendations")


def forget(context: RunContext) -> None:
    """Delete what lies more than `keep_nights` before this night.

    Deleted are the candidates and staged lists of those nights, the slices of every table that is
    made anew for each cutoff, artifacts of models, and checkpoints that an abandoned training left.
    Events, sessions, histories, published lists, metrics and runs stay. Where nothing is old
    enough, nothing is committed.
    """
    oldest_night = context.run_date - timedelta(days=context.config.keep_nights)
    oldest_cutoff = cutoff_of(oldest_night) - timedelta(days=context.config.evaluate.horizon_days)
    oldest_cutoff = min(
        oldest_cutoff, *context.cutoffs.all
    )  # tonight's examples may lie further back
    # table -> the condition of its old rows
    old_rows = {table: F.col("run_date") < F.lit(oldest_night) for table in _BY_NIGHT}
    old_rows |= {
        table: F.col("cutoff") < F.lit(oldest_cutoff)
        for table, spec in SPECS.items()
        if spec.partition[:1] == ("cutoff",)
    }
    versions = context.catalog.versions()
    together(
        context.spark,
        *[
            partial(_delete, context.catalog, table, is_old)
            for table, is_old in old_rows.items()
            if table in versions
        ],
    )
    paths = context.config.paths
    # Tonight may use an encoder that was fitted some days before its cutoff.
    longest_use = max((encoder_days(context.config, m) for m in context.config.models), default=1)
    oldest_artifact = oldest_cutoff - timedelta(days=longest_use - 1)
    for folder_of_model in storage.folders(storage.absolute(paths.artifacts)):
        for folder_of_cutoff in storage.folders(folder_of_model):
            if _is_before(folder_of_cutoff, oldest_artifact):
                _remove(folder_of_cutoff)
    for folder_of_night in storage.folders(storage.absolute(paths.checkpoints)):
        if _is_before(folder_of_night, cutoff_of(oldest_night - timedelta(days=1))):
            _remove(folder_of_night)


def _delete(catalog: TableCatalog, table: str, is_old: Column) -> None:
    with suppress(ConcurrentWriteError):  # another night deletes the same rows
        catalog.delete(table, is_old)


def _remove(folder: str) -> None:
    with suppress(FileNotFoundError):
        storage.remove(folder)


def _is_before(folder: str, since: datetime) -> bool:
    """Return whether a folder's name is a day that begins before `since`; other names are not."""
    try:
        day = datetime.fromisoformat(folder.rsplit("/", 1)[1])
    except ValueError:
        return False
    return day.replace(tzinfo=since.tzinfo) < since

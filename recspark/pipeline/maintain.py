"""What a night forgets: what only nights of long ago needed, and would make again."""

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
from recspark.session import together
from recspark.tables.catalog import TableCatalog
from recspark.tables.specs import SPECS

_BY_NIGHT = ("candidates", "staged_recommendations")


def forget(context: RunContext) -> None:
    """Delete what lies more than `keep_nights` before this night.

    Candidates and staged lists of those nights; slices of every table that is made anew for each
    cutoff; artifacts of models; checkpoints that an abandoned training left. Events, sessions,
    histories, published lists, metrics and runs stay. Nothing is committed where nothing is old.
    """
    oldest = context.run_date - timedelta(days=context.config.keep_nights)
    since = cutoff_of(oldest) - timedelta(days=context.config.evaluate.horizon_days)
    since = min(since, *context.cutoffs)  # those of examples are looked at again
    olds = {table: F.col("run_date") < F.lit(oldest) for table in _BY_NIGHT}
    olds |= {
        table: F.col("cutoff") < F.lit(since)
        for table, spec in SPECS.items()
        if spec.partition[:1] == ("cutoff",)
    }
    versions = context.catalog.versions()
    together(
        context.spark,
        *[
            partial(_delete, context.catalog, table, old)
            for table, old in olds.items()
            if table in versions
        ],
    )
    paths = context.config.paths
    for model in storage.folders(storage.absolute(paths.artifacts)):
        for cutoff in storage.folders(model):
            if _is_before(cutoff, since):
                _remove(cutoff)
    for night in storage.folders(storage.absolute(paths.checkpoints)):
        if _is_before(night, cutoff_of(oldest - timedelta(days=1))):
            _remove(night)


def _delete(catalog: TableCatalog, table: str, old: Column) -> None:
    with suppress(ConcurrentWriteError):  # another night forgets the same at this moment
        catalog.delete(table, old)


def _remove(folder: str) -> None:
    with suppress(FileNotFoundError):
        storage.remove(folder)


def _is_before(folder: str, since: datetime) -> bool:
    """Return whether a folder is named by a day that begins before `since`; other names are not."""
    try:
        day = datetime.fromisoformat(folder.rsplit("/", 1)[1])
    except ValueError:
        return False
    return day.replace(tzinfo=since.tzinfo) < since

"""Writing a published table: only the newest run of a night may, however long it stood still."""

from __future__ import annotations

from pyspark.sql import DataFrame

from recspark.errors import SupersededRunError
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import begun_runs, newer_than
from recspark.tables.catalog import TableVersion, retried


def own_publish(context: RunContext) -> int | None:
    """Return when this run last published, as its row in `runs` says; None where it has not.

    Raises SupersededRunError where a newer run of the night has begun, and not failed.
    """
    begun = begun_runs(context.catalog, context.run_date)
    mine = [run for run in begun if run.run_id == context.run_id]
    newer = newer_than(mine[0], begun) if mine else None
    if newer is not None:
        raise SupersededRunError(
            f"night {context.run_date}: run {newer.run_id} has begun since run {context.run_id}, and the "
            "night's lists are to be its own; nothing more of this run is published. Where these are the "
            "right ones, publish them by --force"
        )
    return mine[0].published_at if mine else None


def promote(context: RunContext, table: str, rows: DataFrame, began: int | None) -> TableVersion:
    """Replace the night's slice of a published table, where this run still is the one to do it.

    A process may stand still for hours between its gates and this commit. So the commit is of the
    version that the table had before the look at `runs`: where somebody has written the table since,
    it is refused, and the look is taken again. `began` : what `own_publish` gave before the gates;
    another process of this run that has published meanwhile ends this one. Raises SupersededRunError.
    """

    def write() -> TableVersion:
        seen = context.catalog.version(table)
        if own_publish(context) != began:
            raise SupersededRunError(
                f"night {context.run_date}: another process of run {context.run_id} has published while "
                "this one was at its gates; nothing more is published by this one"
            )
        night = {"run_date": context.run_date}
        return context.catalog.replace_slice(table, rows, night, expected=seen)

    return retried(write)

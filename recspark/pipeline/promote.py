"""Writing a published table: only the newest run of a night may do it."""

from __future__ import annotations

from pyspark.sql import DataFrame

from recspark.errors import SupersededRunError
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import begun_runs, newer_than
from recspark.tables.catalog import TableVersion, retried


def last_published_at(context: RunContext) -> int | None:
    """Return when this run last published, as its row in `runs` says; None where it has not.

    Microseconds since 1970. Raises SupersededRunError where a newer run of the night has begun and
    has not failed.
    """
    runs_of_night = begun_runs(context.catalog, context.run_date)
    runs_with_this_id = [run for run in runs_of_night if run.run_id == context.run_id]
    newer_run = newer_than(runs_with_this_id[0], runs_of_night) if runs_with_this_id else None
    if newer_run is not None:
        raise SupersededRunError(
            f"night {context.run_date}: run {newer_run.run_id} has begun since run "
            f"{context.run_id}, and the night's lists are to be its own; nothing more of this run "
            "is published. Where these are the right ones, publish them by --force"
        )
    return runs_with_this_id[0].published_at if runs_with_this_id else None


def promote(
    context: RunContext, table: str, rows: DataFrame, published_at_before: int | None
) -> TableVersion:
    """Replace the night's slice of a published table, if this run still is the one that may
    publish.

    Between the gates and this commit the process may stand still for hours. So the version of
    the table is read first, then `runs` is checked, and the commit is made from that version:
    where another process has written the table since, Delta refuses the commit, and everything
    is checked again.

    Parameters
    ----------
    table : name of the table
    rows : the new rows of the slice
    published_at_before : what `last_published_at` returned before the gates

    Raises SupersededRunError where a newer run has begun, or where another process of this run
    has published since the gates (`last_published_at` then differs from that value).
    """

    def write() -> TableVersion:
        version_read = context.catalog.version(table)
        if last_published_at(context) != published_at_before:
            raise SupersededRunError(
                f"night {context.run_date}: another process of run {context.run_id} has published while "
                "this one was at its gates; nothing more is published by this one"
            )
        night = {"run_date": context.run_date}
        return context.catalog.replace_slice(table, rows, night, expected=version_read)

    return retried(write)

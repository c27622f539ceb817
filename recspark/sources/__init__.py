"""Sources: they turn raw files of any format into rows of the event schema.

Stage ingest calls `read_landing`. No other part of recspark knows what a source is.
"""

from __future__ import annotations

from datetime import date
from types import ModuleType

from pyspark.sql import SparkSession

from recspark import schema
from recspark.config import Source, digest
from recspark.errors import MissingLandingError
from recspark.sources.files import SourceInput
from recspark.sources.kinds import mapping, movielens, online_retail, session_files
from recspark.sources.landing import Landing, Night

__all__ = ["Landing", "check_inputs", "landing_digest", "read_landing"]

# Source kind -> its module. Each module has
# - inputs(source, run_date): the files that a night reads; needs no Spark,
# - read(spark, source, inputs, night): the events and the catalogue, as `recspark.schema` has them,
# - CATALOGUE_IS_OF_EVENTS: whether the rows of the catalogue are made of those of the events, so
#   that they get their verdict as events.
# A new kind is a module in `kinds`, a line here, and its name in `recspark.config.source.Source.kind`.
KINDS: dict[str, ModuleType] = {
    "mapping": mapping,
    "movielens": movielens,
    "online_retail": online_retail,
    "session_files": session_files,
}


def read_landing(spark: SparkSession, source: Source, run_date: date, *, initial: bool) -> Landing:
    """Return the events and the catalogue that `source` brings on the night `run_date`.

    Parameters
    ----------
    initial : whether this is the first landing of an installation. Catalogue rows without a time
        are then taken as valid from 1970-01-01 on, not from `run_date` on

    An archive is one input that holds all nights. It gives every row up to `run_date` each night,
    and rows after `run_date` are left out of the landing. A source that is no archive delivers one
    landing per night. There, rows after `run_date` stay in the landing and ingest quarantines them.

    Raises MissingLandingError where the landing is not there, and SourceError where the raw columns
    differ from what the source's settings say. Both are raised before anything is written. A row
    that cannot be read carries a `reason`; no row makes the night fail. Cost: the driver hashes the
    local files and reads one header or footer per file. The returned DataFrames are lazy.
    """
    module = KINDS[source.kind]
    inputs = module.inputs(source, run_date)
    night = Night(run_date, initial, source.archive)
    events, items = module.read(spark, source, inputs, night)
    if events is None:
        events = spark.createDataFrame([], schema.RAW_EVENTS)
    makes_event_ids = "event_id" not in {*source.columns, *source.constants}
    return Landing(
        run_date,
        events,
        items,
        items_of_events=module.CATALOGUE_IS_OF_EVENTS,
        digest=_digest(inputs),
        initial=initial,
        unique_ids=makes_event_ids,
    )


def check_inputs(source: Source, run_date: date) -> None:
    """Raise MissingLandingError or SourceError where the input of the night `run_date` is missing.

    Needs no Spark. Cost: lists the files.
    """
    KINDS[source.kind].inputs(source, run_date)


def landing_digest(source: Source, run_date: date) -> str | None:
    """Return the digest of the present files of the landing of `run_date`; None where the landing
    no longer exists.
    """
    try:
        return _digest(KINDS[source.kind].inputs(source, run_date))
    except MissingLandingError:
        return None


def _digest(inputs: list[SourceInput]) -> str:
    return digest([source_input.content() for source_input in inputs])

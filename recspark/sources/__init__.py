"""Raw formats to the event schema. Ingest calls `read_landing`; nothing else knows what a source
is.
"""

from __future__ import annotations

from datetime import date
from types import ModuleType

from pyspark.sql import SparkSession

from recspark import schema
from recspark.config import Source, digest
from recspark.errors import MissingLandingError
from recspark.sources import mapping, movielens, online_retail, session_files
from recspark.sources.files import Place
from recspark.sources.landing import Landing, Night

__all__ = ["Landing", "check_places", "landing_digest", "read_landing"]

# A module of a source has: places(source, run_date), and read(spark, source, places, night).
KINDS: dict[str, ModuleType] = {
    "mapping": mapping,
    "movielens": movielens,
    "online_retail": online_retail,
    "session_files": session_files,
}


def read_landing(spark: SparkSession, source: Source, run_date: date, *, initial: bool) -> Landing:
    """Return what `source` brings on the night `run_date`.

    Parameters
    ----------
    initial : the first landing of an installation: what its catalogue says without a time is taken
        to hold since ever

    An archive gives everything up to `run_date` every night; rows after it are no part of the
    landing. In a landing of its own they are quarantined.

    Raises MissingLandingError, and SourceError where the raw columns are not what the source says;
    both before anything is written. Rows that cannot be read carry a `reason`; none fails the
    night. Cost: the driver hashes local files and reads one header or footer per file; the frames
    are lazy.
    """
    kind = KINDS[source.kind]
    places = kind.places(source, run_date)
    night = Night(run_date, initial, source.archive)
    events, items = kind.read(spark, source, places, night)
    if events is None:
        events = spark.createDataFrame([], schema.RAW_EVENTS)
    made_ids = "event_id" not in {*source.columns, *source.constants}
    return Landing(
        run_date,
        events,
        items,
        items_of_events=kind is online_retail,
        digest=_digest(places),
        initial=initial,
        unique_ids=made_ids,
    )


def check_places(source: Source, run_date: date) -> None:
    """Raise MissingLandingError or SourceError where what the night reads is not there.

    Needs no Spark; lists the files.
    """
    KINDS[source.kind].places(source, run_date)


def landing_digest(source: Source, run_date: date) -> str | None:
    """Return the digest that the landing of `run_date` has now; None where it is no longer
    there.
    """
    try:
        return _digest(KINDS[source.kind].places(source, run_date))
    except MissingLandingError:
        return None


def _digest(places: list[Place]) -> str:
    return digest([place.content() for place in places])

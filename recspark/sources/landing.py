"""The rows that one night brings, in the same form for every source."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark.config import cutoff_of


@dataclass(frozen=True)
class Night:
    """Decides which rows of an input belong to a night.

    Parameters
    ----------
    run_date : the night's date D
    initial : whether this is the first landing of an installation
    archive : whether the input is one archive of all nights, not a landing of one night
    """

    run_date: date
    initial: bool
    archive: bool

    def rows(self, rows: DataFrame, row_at: Column) -> DataFrame:
        """Return the rows of `rows` that belong to this landing, by the column `row_at` (UTC).

        Of a landing that holds one night, all rows are returned. Of an archive, every row up to the
        end of D is returned each night, and every row without a usable time. Ingest recognises the
        rows that earlier nights took by their ids. So rows that came late, rows of a night that was
        left out and rows without a time get a verdict too. Rows after D wait for their night. Cost:
        each night compares the ids of all rows of the archive so far (`events.check_events`). Where
        the archive is too large for that, deliver one landing per night.
        """
        if not self.archive:
            return rows
        return rows.where(F.coalesce(row_at < F.lit(cutoff_of(self.run_date)), F.lit(True)))


@dataclass(frozen=True)
class Landing:
    """The rows of one night, as a source gives them. Both DataFrames are lazy.

    Parameters
    ----------
    run_date : the night
    events : `schema.RAW_EVENTS`; a row that the source refuses has a `reason`
    items : `schema.RAW_ITEMS`: every row of the catalogue, refused ones with a `reason` as in
        `events`; None where the source has no catalogue
    items_of_events : whether the catalogue was built from the rows of `events`. Those rows get
        their verdict as events. The catalogue rows are then unique by (item_id, valid_from) and
        need no verdict
    digest : 16 hex digits over the content of the files
    initial : whether this is the first landing of an installation
    unique_ids : whether the source made `event_id` itself, so that no id occurs twice in this
        landing
    """

    run_date: date
    events: DataFrame
    items: DataFrame | None
    items_of_events: bool
    digest: str
    initial: bool
    unique_ids: bool

"""What one night brings, whatever the source."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark.config import cutoff_of


@dataclass(frozen=True)
class Night:
    """Which rows of an input belong to a night.

    Parameters
    ----------
    run_date : the night's date D
    initial : the first landing of an installation
    archive : the input is one file with everything
    """

    run_date: date
    initial: bool
    archive: bool

    def rows(self, frame: DataFrame, at: Column) -> DataFrame:
        """Return the rows of `frame` in this landing, by their time `at` (UTC).

        A landing of its own is taken whole. An archive gives everything up to D every night, and
        the rows without a usable time too: what earlier nights took is told by its id, so that a
        row which came late, of a night that was left out, or without a time gets a verdict as
        well. Rows after D wait for their night. The price: a night compares the ids of the whole
        archive (`events.check_events`); where it is too large for that, deliver landings.
        """
        if not self.archive:
            return frame
        return frame.where(F.coalesce(at < F.lit(cutoff_of(self.run_date)), F.lit(True)))


@dataclass(frozen=True)
class Landing:
    """The rows of one night, as a source gives them; both frames are lazy.

    Parameters
    ----------
    run_date : the night
    events : `schema.RAW_EVENTS`; a row that the source objects to has its `reason`
    items : `schema.RAW_ITEMS`, every row of the catalogue as `events`; None where the source has
        none
    items_of_events : the catalogue is made of rows of `events`, which get their verdict there: its
        own rows are unique by (item_id, valid_from) and need none
    digest : 16 hex digits over the content of the files
    initial : whether it is the first landing
    unique_ids : the source made `event_id` itself, so none occurs twice in this landing
    """

    run_date: date
    events: DataFrame
    items: DataFrame | None
    items_of_events: bool
    digest: str
    initial: bool
    unique_ids: bool

"""What one night brings, whatever the source."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

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

        An archive gives up to D on the first night, and there the rows without a usable time too,
        so that nothing is lost; later only the rows of D. A landing of its own is taken whole.
        """
        if self.initial or not self.archive:
            return self.catalogue(frame, at)
        start = cutoff_of(self.run_date - timedelta(days=1))
        return frame.where((at >= F.lit(start)) & (at < F.lit(cutoff_of(self.run_date))))

    def catalogue(self, frame: DataFrame, since: Column) -> DataFrame:
        """Return the rows of a catalogue that this landing knows, by the time they hold `since`.

        An archive gives all up to D every night: an item may be acted on long after it is described,
        and `features.changed_items` leaves out what is known.
        """
        if not self.archive:
            return frame
        return frame.where(F.coalesce(since < F.lit(cutoff_of(self.run_date)), F.lit(True)))


@dataclass(frozen=True)
class Landing:
    """The rows of one night, as a source gives them; both frames are lazy.

    Parameters
    ----------
    run_date : the night
    events : `schema.RAW_EVENTS`; a row that the source objects to has its `reason`
    items : `schema.RAW_ITEMS`, unique (item_id, valid_from); None where the source has no catalogue
    digest : 16 hex digits over the content of the files
    initial : whether it is the first landing
    unique_ids : the source made `event_id` itself, so none occurs twice in this landing
    """

    run_date: date
    events: DataFrame
    items: DataFrame | None
    digest: str
    initial: bool
    unique_ids: bool

"""What a stage is given: the session, the tables, the settings, and the versions that it reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.config import Config, cutoff_of
from recspark.pipeline.plan import PUBLISHED, stages_before
from recspark.pipeline.runlog import RunLog
from recspark.tables.catalog import TableCatalog
from recspark.tables.specs import SPECS


@dataclass
class RunContext:
    """Everything a stage needs. It knows no stage.

    Parameters
    ----------
    spark, catalog, config : of this process
    run_date : the night; the last full day of data
    run_id : hash(run_date, config, pins); of a run begun twice its number goes in
    pins : table -> version when the run began
    runlog : the rows of `runs`
    force : run a stage even where its recorded result would do
    stage : the stage that runs; it reads what the stages before it left
    progress : told of each step, for a person to see
    """

    spark: SparkSession
    catalog: TableCatalog
    config: Config
    run_date: date
    run_id: str
    pins: dict[str, int]
    runlog: RunLog
    force: bool = False
    stage: str | None = None
    progress: Callable[[str], None] = field(default=lambda _text: None)

    @property
    def cutoff(self) -> datetime:
        """Of the published lists: the first instant after `run_date`."""
        return cutoff_of(self.run_date)

    @property
    def backtest_cutoff(self) -> datetime:
        """Of the backtest: one horizon before `cutoff`."""
        return self.cutoff - timedelta(days=self.config.evaluate.horizon_days)

    def version(self, table: str) -> int | None:
        """Return the version of `table` that this run reads: as an earlier stage left it, else
        pinned. Of a table that has a slice for each model it is the newest one's (see `read`).
        """
        written = self.runlog.outputs(stages_before(self.stage))
        return written.get(table, self.pins.get(table))

    def read(self, table: str, also: Mapping[str, int] | None = None) -> DataFrame:
        """Return `table` at the version that this run reads.

        Of a table that has a slice for each model, each slice at the version that its own row names:
        at the newest version a slice may be that of another run of the night, which runs beside this
        one. `also` : model -> version of slices that this stage has just written. Where all commits
        in between are this run's, that is one plain read.
        """
        if SPECS[table].partition != ("run_date", "model"):
            return self.catalog.read(table, self.version(table))
        recorded = self.runlog.slices(table, stages_before(self.stage))
        slices = {**{model or PUBLISHED: v for model, v in recorded.items()}, **(also or {})}
        versions = sorted(set(slices.values()))
        if not versions or versions == list(range(versions[0], versions[-1] + 1)):
            return self.catalog.read(table, versions[-1] if versions else self.version(table))
        parts = [
            self.catalog.read(table, version).where(
                self._of_night([model for model, v in slices.items() if v == version])
            )
            for version in versions
        ]
        return functools.reduce(DataFrame.unionByName, parts)

    def _of_night(self, models: list[str]) -> Column:
        return (F.col("run_date") == F.lit(self.run_date)) & F.col("model").isin(models)

    def count(self, table: str) -> int:
        """Return the number of rows of `table` at the version that this run reads."""
        return self.catalog.count(table, self.version(table))

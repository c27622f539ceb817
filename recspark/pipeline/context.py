"""What a stage is given: the session, the tables, the settings, and the versions that it reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.config import Config, cutoff_of, on_grid
from recspark.pipeline.plan import PUBLISHED, models_of, stages_before
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
    stage, model : the task that runs; it reads what the stages before it left
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
    model: str = ""
    progress: Callable[[str], None] = field(default=lambda _text: None)

    @property
    def cutoff(self) -> datetime:
        """Of the published lists: the first instant after `run_date`."""
        return cutoff_of(self.run_date)

    @property
    def backtest_cutoff(self) -> datetime:
        """Of the backtest: the newest of its grid whose horizon has ended by `cutoff`."""
        return on_grid(self.followup_cutoff, self.config.evaluate.every_days)

    @property
    def followup_cutoff(self) -> datetime:
        """Of the list that was published a horizon ago."""
        return self.cutoff - timedelta(days=self.config.evaluate.horizon_days)

    @property
    def example_cutoffs(self) -> tuple[datetime, ...]:
        """The cutoffs of the grid that the night's rankers learn from, ascending; () without rankers.

        Of the published lists and of the backtest: see `examples_before`.
        """
        if not models_of(self.config, "ranker"):
            return ()
        both = (self.backtest_cutoff, self.cutoff)
        return tuple(sorted({c for cutoff in both for c in self.examples_before(cutoff)}))

    def examples_before(self, cutoff: datetime) -> tuple[datetime, ...]:
        """Return the cutoffs that a ranker of `cutoff` learns from: the newest of the grid whose
        horizon has ended by then, ascending.
        """
        settings, horizon = self.config.examples, self.config.evaluate.horizon_days
        newest = on_grid(cutoff - timedelta(days=horizon), settings.every_days)
        step = timedelta(days=settings.every_days)
        return tuple(newest - n * step for n in reversed(range(settings.n_cutoffs)))

    @property
    def cutoffs(self) -> tuple[datetime, ...]:
        """All cutoffs that models of the night are fitted at: of the examples, the backtest, and the
        published lists, which come last.
        """
        return (*sorted({*self.example_cutoffs, self.backtest_cutoff}), self.cutoff)

    @functools.cached_property
    def before(self) -> frozenset[str]:
        """The stages whose results the task reads."""
        return stages_before(self.config, self.stage, self.model)

    def version(self, table: str) -> int | None:
        """Return the version of `table` that this run reads: as an earlier stage left it, else
        pinned. Of a table that has a slice for each model it is the newest one's (see `read`).
        """
        written = self.runlog.outputs(self.before)
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
        recorded = self.runlog.slices(table, self.before)
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

"""What a stage receives: the session, the tables, the settings, and the versions that it reads."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import storage
from recspark.config import Config
from recspark.models.base import FittedModel
from recspark.pipeline.cutoffs import Cutoffs
from recspark.pipeline.plan import stages_before
from recspark.pipeline.runlog import RunLog
from recspark.tables.catalog import TableCatalog
from recspark.tables.specs import SPECS

# Up to this many items, a join sends a table of items (ids and names, about 100 MB) to every executor.
BROADCAST_ITEMS = 1_000_000


@dataclass
class RunContext:
    """Everything that a stage needs. It does not know the stages themselves.

    Parameters
    ----------
    spark, catalog, config : those of this process
    run_date : the night; the last full day of data
    run_id : digest of run_date, config and pins; for a run begun a second time, also of its number
    pins : table -> version when the run began
    runlog : the rows of `runs`
    force : run a stage even where its recorded result could be used
    stage, model : the task that is running; it reads what the stages before it left
    progress : called with a text at each step, for a person to see
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
    # Folder -> the model that the running task has loaded from it. `replace`, by which each task
    # gets its context, begins an empty one.
    loaded: dict[str, FittedModel] = field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def cutoffs(self) -> Cutoffs:
        """The moments as of which the night fits, scores and compares models."""
        return Cutoffs(self.run_date, self.config)

    @functools.cached_property
    def stages_read(self) -> frozenset[str]:
        """The stages whose results the running task reads."""
        return stages_before(self.config, self.stage, self.model)

    def version(self, table: str) -> int | None:
        """Return the version of `table` that this run reads: as an earlier stage left it, else as
        pinned.

        Of a table that has a slice for each model, this is the newest version of all slices (see
        `read`).
        """
        versions_written = self.runlog.outputs(self.stages_read)
        return versions_written.get(table, self.pins.get(table))

    def read(self, table: str, just_written: Mapping[str, int] | None = None) -> DataFrame:
        """Return `table` at the version that this run reads.

        A table that is partitioned by night and model gets special care. Each model's slice is read
        at the version that the row of the model's own task names. Two runs of a night may write in
        turn, so at the newest version a slice may hold the rows of the other run.

        Example: this run wrote the slice of `ease` in version 5, another run wrote its `ease` in
        version 6, and this run wrote `als` in version 7. Then `ease` is read at version 5, and
        `als` at version 7.

        Where all versions from the first to the last are this run's, one plain read of the last
        suffices.

        `just_written` : model -> version, of slices that the running stage has just written.
        """
        if SPECS[table].partition != ("run_date", "model"):
            return self.catalog.read(table, self.version(table))
        recorded_versions = self.runlog.slices(table, self.stages_read)
        version_by_model = {
            **{
                name: version
                for model, version in recorded_versions.items()
                for name in ([model] if model else self.config.publish.backtest_models)
            },
            **(just_written or {}),
        }
        versions = sorted(set(version_by_model.values()))
        if not versions or versions == list(range(versions[0], versions[-1] + 1)):
            return self.catalog.read(table, versions[-1] if versions else self.version(table))
        slices_by_version = [
            self.catalog.read(table, version).where(
                self._is_of_models([model for model, v in version_by_model.items() if v == version])
            )
            for version in versions
        ]
        return functools.reduce(DataFrame.unionByName, slices_by_version)

    def _is_of_models(self, models: list[str]) -> Column:
        return (F.col("run_date") == F.lit(self.run_date)) & F.col("model").isin(models)

    @contextmanager
    def scratch_folder(self, name: str) -> Iterator[str]:
        """Yield the URI of a folder that all workers reach, for files that nobody else reads.

        The folder is removed afterwards; where this process is killed, with the night's checkpoints.

        `name` : the beginning of the folder's name
        """
        root = storage.absolute(self.config.paths.checkpoints)
        folder = storage.join(root, f"{self.run_date}", f"{name}-{uuid.uuid4().hex}")
        try:
            yield folder
        finally:
            storage.remove(folder)

    def item_sized(self, rows: DataFrame) -> DataFrame:
        """Return `rows`, which has at most one row per item, hinted to be broadcast in a join.

        Above `BROADCAST_ITEMS` items there is no hint: a broadcast would fill the driver and every
        executor, and Spark joins by a shuffle. Cost: the items are counted once by each process.
        """
        return F.broadcast(rows) if self.has_few_items else rows

    @property
    def has_few_items(self) -> bool:
        """Whether a table with a row per item is small enough for a broadcast."""
        version = self.version("item_ids")
        return version is None or self.catalog.count("item_ids", version) <= BROADCAST_ITEMS

    def count(self, table: str) -> int:
        """Return the number of rows of `table` at the version that this run reads."""
        return self.catalog.count(table, self.version(table))

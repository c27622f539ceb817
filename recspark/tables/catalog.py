"""Reading tables at a pinned version, and writing one slice of them in one commit."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors.exceptions.captured import CapturedException
from pyspark.sql import Column, DataFrame, SparkSession

from recspark import storage
from recspark.errors import (
    ConcurrentWriteError,
    TableNotFoundError,
    VersionNotFoundError,
)
from recspark.tables import damage
from recspark.tables.rows import Slice, checked, checksum, count_checked, laid_out, slice_condition
from recspark.tables.specs import SPECS, TableSpec

T = TypeVar("T")
_TRIES = 5
# Reader version 1: deltalake, polars, DuckDB and Trino open every table (docs/tables.md).
PROPERTIES = {
    "delta.minReaderVersion": "1",
    "delta.minWriterVersion": "2",
    "delta.enableDeletionVectors": "false",
    "delta.checkpointPolicy": "classic",
    "delta.logRetentionDuration": "interval 90 days",
    "delta.deletedFileRetentionDuration": "interval 35 days",
}


@dataclass(frozen=True)
class TableVersion:
    """What a write left behind: the version that holds it and the rows of its slice.

    `changed` is False when the slice already held exactly these rows, and nothing was committed.
    """

    table: str
    version: int
    rows: int
    changed: bool


class TableCatalog:
    """All tables below one root URI.

    A write is one commit of one slice; a rerun that would change nothing commits nothing, so a
    table's version moves only when its content does.
    """

    def __init__(self, spark: SparkSession, root: str) -> None:
        self.spark = spark
        self.root = storage.absolute(root)
        self.commits: Counter[str] = Counter()  # by this process: table -> how many
        self._counts: dict[tuple[str, int | None], int] = {}  # a version's rows never change

    def path(self, table: str) -> str:
        """Return the location of `table`."""
        return storage.join(self.root, _spec(table).name)

    def version(self, table: str) -> int | None:
        """Return the latest version of `table`, None where it does not exist. No Spark job."""
        log = self._delta_log(table)
        version = int(log.update(False, _none(self.spark), _none(self.spark)).version())
        return None if version < 0 else version

    def versions(self) -> dict[str, int]:
        """Return the latest version of every table that exists."""
        found = {name: self.version(name) for name in SPECS}
        return {name: version for name, version in found.items() if version is not None}

    def read(self, table: str, version: int | None) -> DataFrame:
        """Return `table` at `version`, columns as its spec declares; version None = an empty table.

        Raises TableNotFoundError, VersionNotFoundError. Lazy.
        """
        spec = _spec(table)
        if version is None:
            return self.spark.createDataFrame([], spec.schema)
        latest = self.version(table)
        if latest is None:
            raise TableNotFoundError(
                f"table '{table}' does not exist below {self.root}; run the stage that writes it first"
            )
        if version > latest:
            raise VersionNotFoundError(
                f"table '{table}' has no version {version}, the latest is {latest}; "
                "was it restored or recreated? start a new run with --repin"
            )
        try:
            frame = (
                self.spark.read.format("delta")
                .option("versionAsOf", version)
                .load(self.path(table))
            )
        except CapturedException as error:
            raise VersionNotFoundError(
                f"table '{table}' cannot be read at version {version} (latest {latest}): "
                f"{str(error).splitlines()[0]}; start a new run with --repin"
            ) from None
        return frame.select(*spec.schema.names)

    def count(self, table: str, version: int | None) -> int:
        """Return the number of rows of `table` at `version`; counted once by each process."""
        if (table, version) not in self._counts:
            self._counts[table, version] = self.read(table, version).count()
        return self._counts[table, version]

    def create(self, table: str) -> bool:
        """Create `table`, empty, where it does not exist; return whether it did not."""
        spec = _spec(table)
        if self.version(table) is not None:
            return False
        from delta.tables import DeltaTable

        builder = (
            DeltaTable.createIfNotExists(self.spark)
            .location(self.path(table))
            .addColumns(spec.schema)
        )
        for key, value in {**PROPERTIES, **spec.properties}.items():
            builder = builder.property(key, value)
        if spec.partition:
            builder = builder.partitionedBy(*spec.partition)
        builder.execute()
        return True

    def replace_slice(
        self,
        table: str,
        frame: DataFrame,
        where: Slice,
        *,
        note: Mapping[str, Any] | None = None,
        n_files: int | None = None,
        compare: bool = True,
    ) -> TableVersion:
        """Replace the rows of `table` that `where` names by the rows of `frame`, in one commit.

        Parameters
        ----------
        table : name of a spec
        frame : rows with the table's columns in any order; all must lie in the slice
        where : partition column -> the literal, or the list of literals, of the slice
        note : stored with the commit, read back by `note`; without rows to write or to remove there
            is no commit
        compare : look whether the slice holds these rows already; False where it cannot
        n_files : `frame` already lies in this many partitions, and each becomes a file (training
            sets)

        An empty frame clears the slice. Raises SchemaError, KeyViolationError (before anything is
        written) and ConcurrentWriteError. Cost: `frame` is computed once and kept (memory, then
        disk) while its keys are checked; where the slice already has rows, those are read for
        comparison.
        """
        spec = _spec(table)
        rows = checked(spec, frame).persist(StorageLevel.MEMORY_AND_DISK)
        try:
            n_rows = count_checked(spec, rows, where)
            token = uuid.uuid4().hex
            metadata = json.dumps({"token": token, **(note or {})}, sort_keys=True)
            before = self.version(table)
            if before is None:
                if first := self._first(spec, rows, n_rows, n_files, metadata):
                    return first
                before = self.version(table)
            assert before is not None
            condition = slice_condition(where)
            if compare and self._same_content(spec, rows, before, condition, n_rows, note):
                return TableVersion(table, before, n_rows, changed=False)
            writer = (
                laid_out(spec, rows, n_rows, n_files)
                .write.format("delta")
                .mode("overwrite")
                .option("replaceWhere", condition)
                .option("userMetadata", metadata)
            )
            _commit(table, lambda: writer.save(self.path(table)))
            self.commits[table] += 1
            return TableVersion(table, self._committed(table, token, before), n_rows, changed=True)
        finally:
            rows.unpersist()

    def _first(
        self,
        spec: TableSpec,
        rows: DataFrame,
        n_rows: int,
        n_files: int | None = None,
        metadata: str | None = None,
    ) -> TableVersion | None:
        """Create a table with its first rows, or empty without any; None where another was
        quicker.
        """
        if n_rows == 0:
            return TableVersion(spec.name, 0, 0, changed=False) if self.create(spec.name) else None
        if not self._begin(spec, laid_out(spec, rows, n_rows, n_files), metadata):
            return None
        self.commits[spec.name] += 1
        return TableVersion(spec.name, 0, n_rows, changed=True)

    def _begin(self, spec: TableSpec, rows: DataFrame, metadata: str | None = None) -> bool:
        """Create a table with its first rows, in one commit; False where another was quicker."""
        writer = (
            rows.write.format("delta")
            .mode("error")
            .partitionBy(*spec.partition)
            .options(**{**PROPERTIES, **spec.properties})
        )
        if metadata is not None:
            writer = writer.option("userMetadata", metadata)
        try:
            _commit(spec.name, lambda: writer.save(self.path(spec.name)))
        except (ConcurrentWriteError, CapturedException):
            if self.version(spec.name) is None:
                raise
            return False
        return True

    def append(self, table: str, frame: DataFrame) -> None:
        """Add rows in one commit that conflicts with nobody; the caller knows that their keys are
        new.
        """
        spec = _spec(table)
        rows = checked(spec, frame).coalesce(1)
        if self.version(table) is None and self._begin(spec, rows):
            return
        rows.write.format("delta").mode("append").save(self.path(table))

    def delete(self, table: str, condition: Column) -> None:
        """Delete the rows of whole slices; nothing is committed where there are none."""
        from delta.tables import DeltaTable

        if not self.read(table, self.version(table)).where(condition).isEmpty():
            DeltaTable.forPath(self.spark, self.path(table)).delete(condition)

    def upsert(self, table: str, frame: DataFrame, where: Slice) -> None:
        """Replace the rows of `frame` by key within a slice, or add them: a commit of their own.

        Raises ConcurrentWriteError where another writer changed the slice meanwhile.
        """
        from delta.tables import DeltaTable

        spec = _spec(table)
        self.create(table)
        keys = " AND ".join(f"t.{column} = s.{column}" for column in spec.key)
        slice_ = " AND ".join(
            slice_condition({f"t.{column}": value}) for column, value in where.items()
        )
        merge = (
            DeltaTable.forPath(self.spark, self.path(table))
            .alias("t")
            .merge(checked(spec, frame).alias("s"), f"{slice_} AND {keys}")
            .whenMatchedUpdateAll()
            .whenNotMatchedInsertAll()
        )
        _commit(table, merge.execute)

    def compact(self, table: str, where: Slice) -> None:
        """Make one file of the small files of a slice; its rows stay the same."""
        from delta.tables import DeltaTable

        builder = DeltaTable.forPath(self.spark, self.path(table)).optimize()
        builder.where(slice_condition(where)).executeCompaction()

    def insert_new(self, table: str, frame: DataFrame, expected: int | None) -> TableVersion:
        """Insert the rows of `frame` whose key is not in `table`; existing rows never change.

        `expected` is the version that `frame` was computed from, None where there was no table: any
        commit since raises ConcurrentWriteError, so that the caller reads again. `rows` = rows
        inserted.
        """
        spec = _spec(table)
        rows = checked(spec, frame).persist(StorageLevel.MEMORY_AND_DISK)
        try:
            n_rows = count_checked(spec, rows, {})
            before = self.version(table)
            if before is None and expected is None:
                if first := self._first(spec, rows, n_rows):
                    return first
                before = self.version(table)
            if before is None or before != expected:
                raise ConcurrentWriteError(
                    f"table '{table}' is at version {before}, these rows were computed from {expected}"
                )
            if n_rows == 0:
                return TableVersion(table, before, 0, changed=False)
            from delta.tables import DeltaTable

            target = DeltaTable.forPath(self.spark, self.path(table)).alias("t")
            match = " AND ".join(f"t.{column} = s.{column}" for column in spec.key)
            merge = target.merge(
                laid_out(spec, rows, n_rows).alias("s"), match
            ).whenNotMatchedInsertAll()
            _commit(table, merge.execute)
            self.commits[table] += 1
            after = self.version(table)
            assert after is not None
            if after == before:
                return TableVersion(table, after, 0, changed=False)
            metrics = self.commit(table, after)["operationMetrics"]
            return TableVersion(table, after, int(metrics["numTargetRowsInserted"]), changed=True)
        finally:
            rows.unpersist()

    def commit(self, table: str, version: int) -> dict[str, Any]:
        """Return the commitInfo of one version, read from its log file; {} where the log was
        cleaned.
        """
        uri = storage.join(self.path(table), "_delta_log", f"{version:020d}.json")
        if not storage.exists(uri):
            return {}
        for line in storage.read_bytes(uri).decode().splitlines():
            action = json.loads(line)
            if "commitInfo" in action:
                info: dict[str, Any] = action["commitInfo"]
                return info
        return {}

    def size(self, table: str) -> dict[str, int]:
        """Return files and bytes of the latest version, from the Delta log."""
        from delta.tables import DeltaTable

        row = DeltaTable.forPath(self.spark, self.path(table)).detail().collect()[0]
        return {"files": int(row["numFiles"]), "bytes": int(row["sizeInBytes"])}

    def note(self, table: str, version: int | None) -> dict[str, Any]:
        """Return the note of the newest commit at or before `version` that has one; {} without any.

        Cost: one small file a commit, from the newest back; no Spark job.
        """
        for back in range(version if version is not None else -1, -1, -1):
            found = self.commit(table, back)
            if not found:
                return {}
            if found.get("userMetadata"):
                note: dict[str, Any] = json.loads(found["userMetadata"])
                return note
        return {}

    def _same_content(
        self,
        spec: TableSpec,
        rows: DataFrame,
        before: int,
        condition: str,
        n_rows: int,
        note: Mapping[str, Any] | None,
    ) -> bool:
        try:
            old = checksum(self.read(spec.name, before).where(condition).drop(*spec.measured))
        except Exception as error:
            if damage.named(error, self.root) is None:
                raise
            return False  # the slice is replaced, and with it the file that cannot be read
        if old[0] != n_rows:  # the usual night: the slice is new, and nothing was read
            return False
        if n_rows == 0:  # Delta would commit nothing, not even the note
            return True
        if old != checksum(rows.drop(*spec.measured)):
            return False
        return not note or {**self.note(spec.name, before), **note} == self.note(spec.name, before)

    def _committed(self, table: str, token: str, before: int) -> int:
        """Return the version of the commit that carries `token`, made after version `before`."""
        latest = self.version(table)
        for version in range(before + 1, (latest if latest is not None else before) + 1):
            if token in self.commit(table, version).get("userMetadata", ""):
                return version
        raise ConcurrentWriteError(f"table '{table}': this commit is not in the log after {before}")

    def _delta_log(self, table: str) -> Any:
        jvm: Any = self.spark.sparkContext._jvm
        log = getattr(jvm, "org.apache.spark.sql.delta.DeltaLog")  # in one question, not in six
        return log.forTable(self.spark._jsparkSession, self.path(table))


def retried(write: Callable[[], T]) -> T:
    """Return what `write` gives; call it again where another writer was quicker, `_TRIES` times."""
    for _ in range(_TRIES - 1):
        with suppress(ConcurrentWriteError):
            return write()
    return write()


def _spec(table: str) -> TableSpec:
    if table not in SPECS:
        from recspark.errors import suggest

        raise TableNotFoundError(f"no table is called '{table}'.{suggest(table, SPECS)}")
    return SPECS[table]


def _none(spark: SparkSession) -> Any:
    jvm: Any = spark.sparkContext._jvm
    return getattr(jvm, "scala.Option").empty()


def _commit(table: str, write: Any) -> None:
    try:
        write()
    except (Py4JJavaError, CapturedException) as error:
        text = str(error)
        if "Concurrent" in text or "ProtocolChanged" in text or "MetadataChanged" in text:
            raise ConcurrentWriteError(
                f"table '{table}': another writer committed to the same slice; "
                "nothing of this write is visible, run the stage again"
            ) from error
        raise

"""Read tables at a pinned version, and write one slice of a table in one commit."""

from __future__ import annotations

import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from urllib.parse import unquote

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors.exceptions.captured import CapturedException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import storage
from recspark.errors import (
    ConcurrentWriteError,
    DamagedFileError,
    SchemaError,
    TableNotFoundError,
    VersionNotFoundError,
)
from recspark.tables import commits, damage
from recspark.tables.added_columns import added_columns
from recspark.tables.layout import laid_out
from recspark.tables.row_checks import (
    Slice,
    check_dictionary,
    checked,
    checksum,
    count_checked,
    slice_condition,
)
from recspark.tables.specs import SPECS, TableSpec

T = TypeVar("T")
log = logging.getLogger("recspark")
_MAX_TRIES = 5
ANY_VERSION = -1  # for `expected`: the rows to write fit any version of the table
# At reader version 1 deltalake, polars, DuckDB and Trino can open every table (docs/tables.md).
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
    """The result of a write: the version that holds the rows, and the number of rows of the slice.

    `changed` is False if the slice already held exactly these rows, so that nothing was committed.
    """

    table: str
    version: int
    rows: int
    changed: bool


class TableCatalog:
    """All tables below one root URI.

    A write replaces one slice of a table in one commit. A rerun that would change nothing commits
    nothing, so the version of a table moves only when its content changes.
    """

    def __init__(self, spark: SparkSession, root: str) -> None:
        self.spark = spark
        self.root = storage.absolute(root)
        self.commits: Counter[str] = Counter()  # table -> commits made by this process
        self._row_counts: dict[tuple[str, int | None], int] = {}  # a version never changes
        self._checked_versions: set[tuple[str, int]] = set()  # (table, version)

    def path(self, table: str) -> str:
        """Return the location of `table`."""
        return storage.join(self.root, _spec(table).name)

    def version(self, table: str) -> int | None:
        """Return the latest version of `table`, or None if the table does not exist. No Spark job.

        Raises DamagedFileError if the newest file of the table's log is cut short or empty: Delta
        would ignore that file and silently read the table without it.
        """
        try:
            snapshot = commits.newest(self.spark, self.path(table))
            version = int(snapshot.version())
        except Py4JJavaError as error:
            raise damage.damaged_log_error(table, error) from error
        if version < 0:
            return None
        if (table, version) not in self._checked_versions:
            deltas = snapshot.logSegment().deltas().iterator()
            while deltas.hasNext():
                log_file = deltas.next()
                if log_file.getLen() == 0:
                    raise damage.damaged_log_error(table, log_file.getPath().getName())
            self.commit(table, version)
            self._checked_versions.add((table, version))
        return version

    def versions(self) -> dict[str, int]:
        """Return the latest version of every table that exists, by table name."""
        latest = {name: self.version(name) for name in SPECS}
        return {name: version for name, version in latest.items() if version is not None}

    def read(self, table: str, version: int | None) -> DataFrame:
        """Return `table` at `version`, with the columns that its spec declares. Lazy.

        A column that was added to the table since (`recspark.tables.added_columns`) has its value
        for earlier rows there.

        Pass version None if `version()` returned None, that is, if there was no table: the result
        has no rows. Raises ConcurrentWriteError if the table has been created since. Raises
        TableNotFoundError, VersionNotFoundError, and SchemaError if an earlier version of recspark
        wrote the table with other columns.
        """
        spec = _spec(table)
        latest = self.version(table)
        if version is None:
            if latest is not None:
                raise ConcurrentWriteError(
                    f"table '{table}' is at version {latest}, and is read as if it were not there: it was "
                    "made since; run this stage again, or start a new run with --repin"
                )
            return self._empty(spec)
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
            rows = (
                self.spark.read.format("delta")
                .option("versionAsOf", version)
                .load(self.path(table))
            )
        except CapturedException as error:
            raise VersionNotFoundError(
                f"table '{table}' cannot be read at version {version} (latest {latest}): "
                f"{str(error).splitlines()[0]}; start a new run with --repin"
            ) from None
        rows = _with_added_columns(spec, rows)
        if missing := [name for name in spec.schema.names if name not in rows.columns]:
            raise SchemaError(
                f"table '{table}' has no column {', '.join(missing)}: an earlier version of recspark wrote "
                f"it. Delete the folder {self.path(table)} and run the nights again that wrote it "
                "(CHANGELOG.md says what changed); no other table is touched"
            )
        return rows.select(*spec.schema.names)

    def _empty(self, spec: TableSpec) -> DataFrame:
        return self.spark.createDataFrame([], spec.schema)

    def count(self, table: str, version: int | None) -> int:
        """Return the number of rows of `table` at `version`. Each process counts a version only
        once.
        """
        if (table, version) not in self._row_counts:
            self._row_counts[table, version] = self.read(table, version).count()
        return self._row_counts[table, version]

    def create(self, table: str) -> bool:
        """Create `table` without rows if it does not exist. Returns True if this call created
        it.
        """
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
        try:
            _commit(table, builder.execute)
        except (ConcurrentWriteError, CapturedException, Py4JJavaError):
            if self.version(table) is None:
                raise
            return False  # another writer created it first
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
        expected: int | None = ANY_VERSION,
        any_commit_conflicts: bool = True,
        is_persisted: bool = False,
    ) -> TableVersion:
        """Replace the rows of `table` in the slice `where` by the rows of `frame`, in one commit.

        Parameters
        ----------
        table : name of a spec
        frame : rows with the table's columns in any order; all rows must lie in the slice
        where : the slice: partition column -> its value, or the list of its values
        note : a dict that is stored with the commit; the method `note` reads it back. If there are
            no rows to write or to remove, there is no commit
        compare : check whether the slice already holds these rows, and commit nothing then. Pass
            False if it cannot hold them
        n_files : `frame` already has this many partitions, and each becomes one file (used for
            training sets)
        expected : the version that `frame` was computed from, or None if there was no table. A
            commit of another writer since then raises ConcurrentWriteError, so that the caller
            reads again. Leave it out if the rows do not depend on the table; the rows of the last
            writer then stay
        any_commit_conflicts : with `expected`: a commit of any slice since then raises, not only a
            commit of this slice
        is_persisted : the caller has persisted `frame`, so it is not persisted here once more

        An empty frame clears the slice. Raises SchemaError, KeyViolationError (before anything is
        written) and ConcurrentWriteError. Cost: `frame` is computed once and persisted (memory,
        then disk) while its keys are checked. If the slice already has rows, those are read for
        comparison.
        """
        spec = _spec(table)
        rows = checked(spec, frame)
        if not is_persisted:
            rows.persist(StorageLevel.MEMORY_AND_DISK)
        try:
            n_rows = count_checked(spec, rows, where)
            replace = partial(
                self._replace, spec, rows, where, n_rows, note, n_files, compare, expected
            )
            if expected == ANY_VERSION:
                return retried(lambda: replace(any_commit_conflicts=False))
            return replace(any_commit_conflicts=any_commit_conflicts)
        finally:
            if not is_persisted:
                rows.unpersist()

    def _replace(
        self,
        spec: TableSpec,
        rows: DataFrame,
        where: Slice,
        n_rows: int,
        note: Mapping[str, Any] | None,
        n_files: int | None,
        compare: bool,
        expected: int | None,
        *,
        any_commit_conflicts: bool,
    ) -> TableVersion:
        """Write the checked `rows` of the slice `where`, as `replace_slice` describes.

        The transaction begins at the version `expected`, or at the latest version for ANY_VERSION.
        Example: `expected` is 4 and the table is at version 5. With `any_commit_conflicts` this
        raises at once; without it, the transaction begins at 4, and Delta raises only if version 5
        changed the same slice.
        """
        latest = self.version(spec.name)
        if latest is None and expected in (None, ANY_VERSION):
            if created := self._create_with_rows(spec, rows, n_rows, n_files, note):
                return created
            latest = self.version(spec.name)
        read_version = latest if expected == ANY_VERSION else expected
        if (
            latest is None
            or read_version is None
            or (any_commit_conflicts and read_version != latest)
            or read_version > latest
        ):
            raise _outdated_error(spec.name, latest, expected)
        condition = slice_condition(where)
        may_hold_rows_already = compare and read_version == latest
        if may_hold_rows_already and self._already_holds(
            spec, rows, read_version, condition, n_rows, note
        ):
            return TableVersion(spec.name, read_version, n_rows, changed=False)
        laid_out_rows = laid_out(spec, rows, n_rows, n_files)
        version = self._write(
            spec,
            laid_out_rows,
            read_version,
            note,
            condition=condition,
            any_commit_conflicts=any_commit_conflicts,
        )
        assert version is not None
        return TableVersion(spec.name, version, n_rows, changed=True)

    def _write(
        self,
        spec: TableSpec,
        rows: DataFrame,
        read_version: int | None,
        note: Mapping[str, Any] | None = None,
        *,
        condition: str | None = None,
        any_commit_conflicts: bool = False,
        commit_name: str | None = None,
    ) -> int | None:
        """Commit `rows` and return the new version; None if the table has a commit `commit_name`.

        The metadata of the commit holds a random token. If the commit seems to fail and its token
        is in the log nevertheless (a store answered too late, or a hook failed after the commit),
        the commit has succeeded: its version is returned, with a warning.
        """
        token = uuid.uuid4().hex
        metadata = json.dumps({"token": token, **(note or {})}, sort_keys=True)
        properties = {**PROPERTIES, **spec.properties} if read_version is None else {}
        try:
            version: int | None = _commit(
                spec.name,
                lambda: commits.write(
                    self.spark,
                    self.path(spec.name),
                    rows,
                    read_version=read_version,
                    condition=condition,
                    any_commit_conflicts=any_commit_conflicts,
                    commit_name=commit_name,
                    metadata=metadata,
                    partition=spec.partition if read_version is None else (),
                    addable_columns=[column.name for column in added_columns(spec.name)],
                    properties=properties,
                ),
            )
        except Exception as error:
            version = self._version_with_token(
                spec.name, token, -1 if read_version is None else read_version
            )
            if version is None:
                raise
            log.warning(
                "table '%s': version %d is committed, though an error followed: %s",
                spec.name,
                version,
                str(error).splitlines()[0],
            )
        if version is not None:
            self.commits[spec.name] += 1
        return version

    def _create_with_rows(
        self,
        spec: TableSpec,
        rows: DataFrame,
        n_rows: int,
        n_files: int | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> TableVersion | None:
        """Create a table with its first rows, which may be none. Returns None if another writer
        created it first.
        """
        if n_rows == 0:
            return TableVersion(spec.name, 0, 0, changed=False) if self.create(spec.name) else None
        if not self._commit_first_rows(spec, laid_out(spec, rows, n_rows, n_files), note):
            return None
        return TableVersion(spec.name, 0, n_rows, changed=True)

    def _commit_first_rows(
        self,
        spec: TableSpec,
        rows: DataFrame,
        note: Mapping[str, Any] | None = None,
        commit_name: str | None = None,
    ) -> bool:
        """Create a table with its first rows in one commit. Returns False if another writer created
        it first.
        """
        try:
            self._write(spec, rows, None, note, commit_name=commit_name)
        except (ConcurrentWriteError, CapturedException, Py4JJavaError):
            if self.version(spec.name) is None:
                raise
            return False
        return True

    def append(self, table: str, frame: DataFrame, commit_name: str | None = None) -> bool:
        """Add rows in one commit that conflicts with no other writer. The caller knows that the
        keys of the rows are new.

        `commit_name` makes the commit unique: if the table already has a commit of that name, even
        one that another process made a moment ago, nothing is added and False is returned.
        Otherwise returns True.
        """
        spec = _spec(table)
        rows = checked(spec, frame).coalesce(1)
        if self.version(table) is None and self._commit_first_rows(
            spec, rows, commit_name=commit_name
        ):
            return True
        # A second try, from the newest version, if another writer commits during the first one.
        with suppress(ConcurrentWriteError):
            return self._write(spec, rows, self.version(table), commit_name=commit_name) is not None
        return self._write(spec, rows, self.version(table), commit_name=commit_name) is not None

    def delete(self, table: str, condition: Column) -> None:
        """Delete the rows that meet `condition`, which names slices as a whole. If there are none,
        nothing is committed.

        Raises ConcurrentWriteError if another writer changes the same rows at this moment.
        """
        from delta.tables import DeltaTable

        if not self.read(table, self.version(table)).where(condition).isEmpty():
            delta_table = DeltaTable.forPath(self.spark, self.path(table))
            _commit(table, lambda: delta_table.delete(condition))

    def upsert(self, table: str, frame: DataFrame, where: Slice) -> None:
        """Replace the rows of a slice that have the keys of `frame`, and add the other rows of
        `frame`. This is one commit.

        Raises ConcurrentWriteError if another writer changed the slice meanwhile.
        """
        from delta.tables import DeltaTable

        spec = _spec(table)
        self.create(table)
        keys = " AND ".join(f"t.{column} = s.{column}" for column in spec.key)
        slice_ = " AND ".join(
            slice_condition({f"t.{column}": value}) for column, value in where.items()
        )
        # `t` is the table, `s` the source of the merge.
        merge = (
            DeltaTable.forPath(self.spark, self.path(table))
            .alias("t")
            .merge(checked(spec, frame).alias("s"), f"{slice_} AND {keys}")
            .whenMatchedUpdateAll()
            .whenNotMatchedInsertAll()
        )
        _commit(table, merge.execute)

    def compact(self, table: str, where: Slice) -> None:
        """Merge the small files of a slice into one file; the rows stay the same.

        If another writer changes the slice at this moment, the files stay as they are.
        """
        from delta.tables import DeltaTable

        builder = DeltaTable.forPath(self.spark, self.path(table)).optimize()
        with suppress(ConcurrentWriteError):
            _commit(table, builder.where(slice_condition(where)).executeCompaction)

    def insert_new(self, table: str, frame: DataFrame, expected: int | None) -> TableVersion:
        """Insert the rows of `frame` whose key is not in `table`; existing rows never change.

        `expected` is the version that `frame` was computed from, or None if there was no table. Any
        commit since then raises ConcurrentWriteError, so that the caller reads again. The `rows` of
        the result counts the inserted rows.
        """
        spec = _spec(table)
        keys = list(spec.key)
        latest = self.version(table)
        if latest != expected:
            raise _outdated_error(table, latest, expected)
        existing_rows = self._empty(spec) if expected is None else self.read(table, expected)
        rows = (
            checked(spec, frame)
            .join(existing_rows.select(*keys), on=keys, how="left_anti")
            .select(*spec.schema.names)
            .persist(StorageLevel.MEMORY_AND_DISK)
        )
        try:
            n_rows = count_checked(spec, rows, {})
            if spec.unique is not None:
                n_existing = 0 if expected is None else self.count(table, expected)
                check_dictionary(spec, existing_rows, rows, n_existing + n_rows)
            if expected is None:
                if created := self._create_with_rows(spec, rows, n_rows):
                    return created
                raise _outdated_error(table, self.version(table), expected)
            if n_rows == 0:
                return TableVersion(table, expected, 0, changed=False)
            version = self._write(
                spec, laid_out(spec, rows, n_rows), expected, any_commit_conflicts=True
            )
            assert version is not None
            return TableVersion(table, version, n_rows, changed=True)
        finally:
            rows.unpersist()

    def commit(self, table: str, version: int) -> dict[str, Any]:
        """Return the commitInfo of one version, read from its log file; {} if that file was cleaned
        up.

        Raises DamagedFileError if the log file is cut short: a line is not JSON, there is no
        commitInfo, or the file lists fewer rows or removed files than the writer counted.
        """
        name = f"{version:020d}.json"
        uri = storage.join(self.path(table), "_delta_log", name)
        if not storage.exists(uri):
            return {}
        try:
            actions = [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]
            (commit_info,) = [action["commitInfo"] for action in actions if "commitInfo" in action]
            write_metrics = (
                commit_info.get("operationMetrics", {})
                if commit_info["operation"] == "WRITE"
                else {}
            )
            # The writer's file count includes files without rows, which are not added to the log.
            # So the numbers of rows are compared, not the numbers of files.
            stats_of_added = [action["add"].get("stats") for action in actions if "add" in action]
            n_rows = sum(json.loads(stats or "{}").get("numRecords", 0) for stats in stats_of_added)
            n_removed_files = sum("remove" in action for action in actions)
            is_complete = int(
                write_metrics.get("numRemovedFiles", n_removed_files)
            ) == n_removed_files and (
                not all(stats_of_added) or int(write_metrics.get("numOutputRows", n_rows)) <= n_rows
            )
        except (ValueError, TypeError, KeyError):
            is_complete = False
        if not is_complete:
            raise damage.damaged_log_error(table, name)
        return dict(commit_info)

    def lineage(self, table: str, version: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (version, commitInfo) of the commits that `version` consists of, newest first.

        A RESTORE is followed by the commits of the version that it brought back, without those that
        it undid. Example: version 5 restores version 2, so the lineage of 6 is 6, 5, 2, 1, 0. It
        ends where the log was cleaned up, and at a RESTORE to a point in time, because the log does
        not say which version that was. Cost: one small file per version that is consumed.
        """
        ancestor = -1 if version is None else version
        while ancestor >= 0:
            commit_info = self.commit(table, ancestor)
            if not commit_info:
                return
            yield ancestor, commit_info
            if commit_info.get("operation") == "RESTORE":
                restored = commit_info.get("operationParameters", {}).get("version")
                if restored is None:
                    return
                ancestor = int(restored)
            else:
                ancestor -= 1

    def identity(self, table: str, version: int | None) -> list[Any]:
        """Return [version, id of its commit]; [None, None] if `version` is None.

        If a table was recreated, the same version number has another commit id.
        """
        if version is None:
            return [None, None]
        return [version, self.commit(table, version).get("txnId")]

    def extends(self, table: str, version: int | None, identity: list[Any]) -> bool:
        """Return whether `version` was made from the version of `identity` by further commits,
        without undoing it.

        If the log between the two was cleaned up, the answer is True unless the oldest commit that
        is left is a RESTORE. An `identity` without a version is extended by everything.
        """
        if identity[0] is None:
            return True
        operation = None
        for ancestor, commit_info in self.lineage(table, version):
            if ancestor <= identity[0]:
                return [ancestor, commit_info.get("txnId")] == identity
            operation = commit_info.get("operation")
        return operation is not None and operation != "RESTORE"

    def lost(
        self, table: str, version: int, where: Slice, *, must_have_rows: bool = False
    ) -> str | None:
        """Return a sentence that says what a slice of `table` at `version` has lost; None if
        nothing.

        Checks that the version can be read, and that each file that its log lists for the slice
        exists with the listed number of bytes. Pass `must_have_rows` if rows were written to the
        slice: a slice without files then counts as lost. Cost: one job over the log and one look at
        each file; no data is read.
        """
        latest = self.version(table)
        if latest is None:
            return f"table '{table}' is gone"
        if version > latest:
            return f"table '{table}' has no version {version}, the latest is {latest}"
        self.commit(table, version)
        try:
            files = commits.files_of(self.spark, self.path(table), version)
        except (Py4JJavaError, CapturedException):
            return f"table '{table}' cannot be read at version {version} (vacuumed?)"
        slice_values = {
            column: value if isinstance(value, (list, tuple)) else [value]
            for column, value in where.items()
        }
        slice_files = [
            (path, n_bytes)
            for path, n_bytes, values in files
            if all(
                commits.has_partition_value(values, column, slice_values[column])
                for column in slice_values
            )
        ]
        if must_have_rows and not slice_files:
            return f"table '{table}' has no rows of {slice_condition(where)} at version {version}"
        for path, n_bytes in slice_files:
            uri = storage.join(self.path(table), unquote(path))
            size = storage.size(uri)
            if size != n_bytes:
                state = "is not there" if size is None else f"has {size:,} bytes"
                return f"table '{table}': its file {path} of {n_bytes:,} bytes {state}"
        return None

    def size(self, table: str) -> dict[str, int]:
        """Return the number of files and bytes of the latest version, from the Delta log."""
        from delta.tables import DeltaTable

        row = DeltaTable.forPath(self.spark, self.path(table)).detail().collect()[0]
        return {"files": int(row["numFiles"]), "bytes": int(row["sizeInBytes"])}

    def note(self, table: str, version: int | None) -> dict[str, Any]:
        """Return the newest note in the lineage of `version`; {} if there is none.

        The commits of `lineage` are searched, so a RESTORE brings back the note of the version that
        it restores. Cost: one small file per commit, from the newest back to the note; no Spark
        job.
        """
        for _, commit_info in self.lineage(table, version):
            if commit_info.get("userMetadata") and commit_info.get("operation") != "RESTORE":
                try:
                    note = json.loads(commit_info["userMetadata"])
                except ValueError:  # metadata that another program wrote
                    return {}
                return note if isinstance(note, dict) else {}
        return {}

    def _already_holds(
        self,
        spec: TableSpec,
        rows: DataFrame,
        version: int,
        condition: str,
        n_rows: int,
        note: Mapping[str, Any] | None,
    ) -> bool:
        # True if the slice has these rows and note, so that a write would change nothing.
        try:
            stored = checksum(self.read(spec.name, version).where(condition).drop(*spec.measured))
        except Exception as error:
            if damage.unreadable_file_error(error, self.root) is None:
                raise
            # A file of the slice cannot be read. It goes away when the slice is replaced.
            return False
        if stored[0] != n_rows:  # usually the slice is new, so that the checksum read no file
            return False
        if n_rows == 0:  # both are empty: Delta would commit nothing, not even the note
            return True
        if stored != checksum(rows.drop(*spec.measured)):
            return False
        return not note or {**self.note(spec.name, version), **note} == self.note(
            spec.name, version
        )

    def _version_with_token(self, table: str, token: str, read_version: int) -> int | None:
        """Return the version after `read_version` whose commit holds `token`; None if there is
        none.
        """
        try:
            latest = self.version(table)
            for version in range(read_version + 1, (-1 if latest is None else latest) + 1):
                if token in self.commit(table, version).get("userMetadata", ""):
                    return version
        except DamagedFileError:
            return None  # the caller then raises the error of the write itself
        return None


def retried(write: Callable[[], T]) -> T:
    """Return the result of `write`. While ConcurrentWriteError is raised, because another writer
    was faster, `write` is called again, up to `_MAX_TRIES` times in all.
    """
    for _ in range(_MAX_TRIES - 1):
        with suppress(ConcurrentWriteError):
            return write()
    return write()


def _with_added_columns(spec: TableSpec, rows: DataFrame) -> DataFrame:
    """Return `rows` of a table with the columns that were added to it since they were written."""
    values = {}
    for column in added_columns(spec.name):
        value = F.lit(column.value).cast(spec.schema[column.name].dataType)
        if column.name not in rows.columns:
            values[column.name] = value
        elif column.value is not None:
            values[column.name] = F.coalesce(column.name, value)
    return rows.withColumns(values) if values else rows


def _spec(table: str) -> TableSpec:
    if table not in SPECS:
        from recspark.errors import suggest

        raise TableNotFoundError(f"no table is called '{table}'.{suggest(table, SPECS)}")
    return SPECS[table]


def _outdated_error(table: str, latest: int | None, expected: int | None) -> ConcurrentWriteError:
    return ConcurrentWriteError(
        f"table '{table}' is at version {latest}, these rows were computed from {expected}; nothing of "
        "this write is visible, run the stage again"
    )


def _commit(table: str, write: Callable[[], T]) -> T:
    # Calls `write`, and turns Delta's conflict exceptions into ConcurrentWriteError.
    try:
        return write()
    except (Py4JJavaError, CapturedException) as error:
        message = str(error)
        if "Concurrent" in message or "ProtocolChanged" in message or "MetadataChanged" in message:
            raise ConcurrentWriteError(
                f"table '{table}': another writer committed to the same slice; "
                "nothing of this write is visible, run the stage again"
            ) from error
        raise

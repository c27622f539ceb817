"""Reading tables at a pinned version, and writing one slice of them in one commit."""

from __future__ import annotations

import json
import logging
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import unquote

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors.exceptions.captured import CapturedException
from pyspark.sql import Column, DataFrame, SparkSession

from recspark import storage
from recspark.errors import (
    ConcurrentWriteError,
    DamagedFileError,
    TableNotFoundError,
    VersionNotFoundError,
)
from recspark.tables import commits, damage
from recspark.tables.rows import (
    Slice,
    check_dictionary,
    checked,
    checksum,
    count_checked,
    laid_out,
    slice_condition,
)
from recspark.tables.specs import SPECS, TableSpec

T = TypeVar("T")
log = logging.getLogger("recspark")
_TRIES = 5
ANY = -1  # whatever version a table has
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
        self._sound: set[tuple[str, int]] = set()  # versions whose log has been looked at

    def path(self, table: str) -> str:
        """Return the location of `table`."""
        return storage.join(self.root, _spec(table).name)

    def version(self, table: str) -> int | None:
        """Return the latest version of `table`, None where it does not exist. No Spark job.

        Raises DamagedFileError where the newest file of its log is cut short or empty: Delta would
        read the table without it, and never say so.
        """
        try:
            snapshot = commits.newest(self.spark, self.path(table))
            version = int(snapshot.version())
        except Py4JJavaError as error:
            raise damage.of_log(table, error) from error
        if version < 0:
            return None
        if (table, version) not in self._sound:
            deltas = snapshot.logSegment().deltas().iterator()
            while deltas.hasNext():
                file = deltas.next()
                if file.getLen() == 0:
                    raise damage.of_log(table, file.getPath().getName())
            self.commit(table, version)
            self._sound.add((table, version))
        return version

    def versions(self) -> dict[str, int]:
        """Return the latest version of every table that exists."""
        found = {name: self.version(name) for name in SPECS}
        return {name: version for name, version in found.items() if version is not None}

    def read(self, table: str, version: int | None) -> DataFrame:
        """Return `table` at `version`, columns as its spec declares. Lazy.

        Version None is what `version` gives where there is no table: no rows then, and
        ConcurrentWriteError where there is one by now. Raises TableNotFoundError, VersionNotFoundError.
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

    def _empty(self, spec: TableSpec) -> DataFrame:
        return self.spark.createDataFrame([], spec.schema)

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
        try:
            _commit(table, builder.execute)
        except (ConcurrentWriteError, CapturedException, Py4JJavaError):
            if self.version(table) is None:
                raise
            return False  # another was quicker
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
        expected: int | None = ANY,
        whole: bool = True,
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
        expected : the version that `frame` was computed from, None where there was no table: what
            another has committed since raises ConcurrentWriteError, so that the caller reads again.
            Rows that do not depend on the table leave it out; the last writer's then stay
        whole : with `expected`, any commit since counts, not only one of this slice

        An empty frame clears the slice. Raises SchemaError, KeyViolationError (before anything is
        written) and ConcurrentWriteError. Cost: `frame` is computed once and kept (memory, then
        disk) while its keys are checked; where the slice already has rows, those are read for
        comparison.
        """
        spec = _spec(table)
        rows = checked(spec, frame).persist(StorageLevel.MEMORY_AND_DISK)
        try:
            n_rows = count_checked(spec, rows, where)
            if expected == ANY:
                return retried(
                    lambda: self._replace(
                        spec, rows, where, n_rows, note, n_files, compare, ANY, whole=False
                    )
                )
            return self._replace(
                spec, rows, where, n_rows, note, n_files, compare, expected, whole=whole
            )
        finally:
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
        whole: bool,
    ) -> TableVersion:
        """Write the checked `rows` of a slice, from the newest version or the one `expected`."""
        before = self.version(spec.name)
        if before is None and expected in (None, ANY):
            if first := self._first(spec, rows, n_rows, n_files, note):
                return first
            before = self.version(spec.name)
        begin = before if expected == ANY else expected
        if before is None or begin is None or (whole and begin != before) or begin > before:
            raise _moved(spec.name, before, expected)
        condition = slice_condition(where)
        same = compare and begin == before
        if same and self._same_content(spec, rows, begin, condition, n_rows, note):
            return TableVersion(spec.name, begin, n_rows, changed=False)
        laid = laid_out(spec, rows, n_rows, n_files)
        version = self._write(spec, laid, begin, note, condition=condition, whole=whole)
        assert version is not None
        return TableVersion(spec.name, version, n_rows, changed=True)

    def _write(
        self,
        spec: TableSpec,
        rows: DataFrame,
        begin: int | None,
        note: Mapping[str, Any] | None = None,
        *,
        condition: str | None = None,
        whole: bool = False,
        once: str | None = None,
    ) -> int | None:
        """Commit `rows` and return the version that holds them; None where `once` has been.

        The commit carries a token. Where it seems to have failed, and the token is in the log
        nevertheless (a store that answers too late, a hook that fails after the commit), it has not.
        """
        token = uuid.uuid4().hex
        metadata = json.dumps({"token": token, **(note or {})}, sort_keys=True)
        properties = {**PROPERTIES, **spec.properties} if begin is None else {}
        try:
            version: int | None = _commit(
                spec.name,
                lambda: commits.write(
                    self.spark,
                    self.path(spec.name),
                    rows,
                    begin=begin,
                    condition=condition,
                    whole=whole,
                    once=once,
                    metadata=metadata,
                    partition=spec.partition if begin is None else (),
                    properties=properties,
                ),
            )
        except Exception as error:
            version = self._carrying(spec.name, token, -1 if begin is None else begin)
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

    def _first(
        self,
        spec: TableSpec,
        rows: DataFrame,
        n_rows: int,
        n_files: int | None = None,
        note: Mapping[str, Any] | None = None,
    ) -> TableVersion | None:
        """Create a table with its first rows, or empty without any; None where another was
        quicker.
        """
        if n_rows == 0:
            return TableVersion(spec.name, 0, 0, changed=False) if self.create(spec.name) else None
        if not self._begin(spec, laid_out(spec, rows, n_rows, n_files), note):
            return None
        return TableVersion(spec.name, 0, n_rows, changed=True)

    def _begin(
        self,
        spec: TableSpec,
        rows: DataFrame,
        note: Mapping[str, Any] | None = None,
        once: str | None = None,
    ) -> bool:
        """Create a table with its first rows, in one commit; False where another was quicker."""
        try:
            self._write(spec, rows, None, note, once=once)
        except (ConcurrentWriteError, CapturedException, Py4JJavaError):
            if self.version(spec.name) is None:
                raise
            return False
        return True

    def append(self, table: str, frame: DataFrame, once: str | None = None) -> bool:
        """Add rows in one commit that conflicts with nobody; the caller knows that their keys are
        new.

        `once` names the commit: False is returned, and nothing added, where one of that name is in
        the table already, though it was another process's a moment ago.
        """
        spec = _spec(table)
        rows = checked(spec, frame).coalesce(1)
        if self.version(table) is None and self._begin(spec, rows, once=once):
            return True
        with suppress(ConcurrentWriteError):
            return self._write(spec, rows, self.version(table), once=once) is not None
        return self._write(spec, rows, self.version(table), once=once) is not None

    def delete(self, table: str, condition: Column) -> None:
        """Delete the rows of whole slices; nothing is committed where there are none.

        Raises ConcurrentWriteError where another changes them at this moment.
        """
        from delta.tables import DeltaTable

        if not self.read(table, self.version(table)).where(condition).isEmpty():
            deltas = DeltaTable.forPath(self.spark, self.path(table))
            _commit(table, lambda: deltas.delete(condition))

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
        """Make one file of the small files of a slice; its rows stay the same.

        Where another changes the slice at this moment, its files stay as they are.
        """
        from delta.tables import DeltaTable

        builder = DeltaTable.forPath(self.spark, self.path(table)).optimize()
        with suppress(ConcurrentWriteError):
            _commit(table, builder.where(slice_condition(where)).executeCompaction)

    def insert_new(self, table: str, frame: DataFrame, expected: int | None) -> TableVersion:
        """Insert the rows of `frame` whose key is not in `table`; existing rows never change.

        `expected` is the version that `frame` was computed from, None where there was no table: any
        commit since raises ConcurrentWriteError, so that the caller reads again. `rows` = rows
        inserted.
        """
        spec = _spec(table)
        keys = list(spec.key)
        before = self.version(table)
        if before != expected:
            raise _moved(table, before, expected)
        known = self._empty(spec) if expected is None else self.read(table, expected)
        rows = (
            checked(spec, frame)
            .join(known.select(*keys), on=keys, how="left_anti")
            .select(*spec.schema.names)
            .persist(StorageLevel.MEMORY_AND_DISK)
        )
        try:
            n_rows = count_checked(spec, rows, {})
            if spec.unique is not None:
                n_known = 0 if expected is None else self.count(table, expected)
                check_dictionary(spec, known, rows, n_known + n_rows)
            if expected is None:
                if first := self._first(spec, rows, n_rows):
                    return first
                raise _moved(table, self.version(table), expected)
            if n_rows == 0:
                return TableVersion(table, expected, 0, changed=False)
            version = self._write(spec, laid_out(spec, rows, n_rows), expected, whole=True)
            assert version is not None
            return TableVersion(table, version, n_rows, changed=True)
        finally:
            rows.unpersist()

    def commit(self, table: str, version: int) -> dict[str, Any]:
        """Return the commitInfo of one version, read from its log file; {} where the log was
        cleaned.

        Raises DamagedFileError where that file is cut short: a line that is no JSON, no commitInfo, or
        fewer rows or removed files than the writer counted.
        """
        name = f"{version:020d}.json"
        uri = storage.join(self.path(table), "_delta_log", name)
        if not storage.exists(uri):
            return {}
        try:
            actions = [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]
            (found,) = [action["commitInfo"] for action in actions if "commitInfo" in action]
            # Not files: Delta counts those without rows too, and leaves them out.
            stats = [json.loads(a["add"].get("stats") or "{}") for a in actions if "add" in a]
            n_rows = sum(int(of_file.get("numRecords", 0)) for of_file in stats)
            n_removed = sum("remove" in action for action in actions)
            told = found.get("operationMetrics", {}) if found["operation"] == "WRITE" else {}
            whole = n_removed >= int(told.get("numRemovedFiles", 0)) and (
                n_rows >= int(told.get("numOutputRows", 0))
                or not all("numRecords" in of_file for of_file in stats)
            )
        except (ValueError, TypeError, KeyError):
            whole = False
        if not whole:
            raise damage.of_log(table, name)
        return dict(found)

    def lineage(self, table: str, version: int | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (version, commitInfo) of the commits whose content `version` has, newest first.

        After a RESTORE come the commits of the version that it brought back, not those that it took
        back. Ends where the log was cleaned, and at a RESTORE to a time: which version that was, the
        log does not say. Cost: one small file for each that is asked for.
        """
        back = -1 if version is None else version
        while back >= 0:
            found = self.commit(table, back)
            if not found:
                return
            yield back, found
            if found.get("operation") == "RESTORE":
                restored = found.get("operationParameters", {}).get("version")
                if restored is None:
                    return
                back = int(restored)
            else:
                back -= 1

    def identity(self, table: str, version: int | None) -> list[Any]:
        """Return [version, id of its commit]: another table of that version has another id."""
        if version is None:
            return [None, None]
        return [version, self.commit(table, version).get("txnId")]

    def extends(self, table: str, version: int | None, identity: list[Any]) -> bool:
        """Return whether `version` came about from the one of `identity`, with nothing taken back.

        Where the log was cleaned in between, nothing speaks against it.
        """
        if identity[0] is None:
            return True
        operation = None
        for back, found in self.lineage(table, version):
            if back <= identity[0]:
                return [back, found.get("txnId")] == identity
            operation = found.get("operation")
        return operation is not None and operation != "RESTORE"

    def lost(self, table: str, version: int, where: Slice, *, some: bool = False) -> str | None:
        """Return what is not there of a slice of `table` as of `version`; None where all of it is.

        The version, and the files that its log lists for the slice, with the bytes that it lists;
        `some` = there must be one, since rows were written.
        Cost: one job over the log, one look at each file; no data is read.
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
        wanted = {
            column: value if isinstance(value, (list, tuple)) else [value]
            for column, value in where.items()
        }
        mine = [
            (path, n_bytes)
            for path, n_bytes, values in files
            if all(commits.is_of(values, column, wanted[column]) for column in wanted)
        ]
        if some and not mine:
            return f"table '{table}' has no rows of {slice_condition(where)} at version {version}"
        for path, n_bytes in mine:
            uri = storage.join(self.path(table), unquote(path))
            size = storage.size(uri)
            if size != n_bytes:
                has = "is not there" if size is None else f"has {size:,} bytes"
                return f"table '{table}': its file {path} of {n_bytes:,} bytes {has}"
        return None

    def size(self, table: str) -> dict[str, int]:
        """Return files and bytes of the latest version, from the Delta log."""
        from delta.tables import DeltaTable

        row = DeltaTable.forPath(self.spark, self.path(table)).detail().collect()[0]
        return {"files": int(row["numFiles"]), "bytes": int(row["sizeInBytes"])}

    def note(self, table: str, version: int | None) -> dict[str, Any]:
        """Return the note of the newest commit that `version` comes from and that has one; {}
        without any.

        A RESTORE brings back the note of what it restores.

        Cost: one small file a commit, from the newest back; no Spark job.
        """
        for _, found in self.lineage(table, version):
            if found.get("userMetadata") and found.get("operation") != "RESTORE":
                try:
                    note = json.loads(found["userMetadata"])
                except ValueError:  # somebody else's words
                    return {}
                return note if isinstance(note, dict) else {}
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

    def _carrying(self, table: str, token: str, before: int) -> int | None:
        """Return the version after `before` whose commit carries `token`; None where none does."""
        try:
            latest = self.version(table)
            for version in range(before + 1, (-1 if latest is None else latest) + 1):
                if token in self.commit(table, version).get("userMetadata", ""):
                    return version
        except DamagedFileError:
            return None  # what went wrong first is said
        return None


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


def _moved(table: str, now: int | None, expected: int | None) -> ConcurrentWriteError:
    return ConcurrentWriteError(
        f"table '{table}' is at version {now}, these rows were computed from {expected}; nothing of "
        "this write is visible, run the stage again"
    )


def _commit(table: str, write: Callable[[], T]) -> T:
    try:
        return write()
    except (Py4JJavaError, CapturedException) as error:
        text = str(error)
        if "Concurrent" in text or "ProtocolChanged" in text or "MetadataChanged" in text:
            raise ConcurrentWriteError(
                f"table '{table}': another writer committed to the same slice; "
                "nothing of this write is visible, run the stage again"
            ) from error
        raise

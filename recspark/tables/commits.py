"""One commit of a Delta table, in a transaction that begins at the version that the caller has
read.

Delta's own writer and its MERGE begin their transaction at the newest version. What another writer
committed between the caller's read and the write is then overlooked. Here the transaction begins at
the version that the rows were computed from, so Delta itself refuses the commit if it conflicts
with a later one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

_DELTA = "org.apache.spark.sql.delta"


def delta_log(spark: SparkSession, path: str) -> Any:
    """Return Delta's own Java object (DeltaLog) for the log of the table at `path`.

    The session becomes the active session of this JVM thread, as it would be for a query: Delta
    reads its settings from there, among them the time zone, which decides what instant a time
    literal means.
    """
    _java(spark, "org.apache.spark.sql.classic.SparkSession").setActiveSession(spark._jsparkSession)
    return _java(spark, f"{_DELTA}.DeltaLog").forTable(spark._jsparkSession, path)


def newest(spark: SparkSession, path: str) -> Any:
    """Return the newest snapshot (a Java object) of the table at `path`. Its version is -1 if there
    is no table.
    """
    return delta_log(spark, path).update(False, _none(spark), _none(spark))


def files_of(spark: SparkSession, path: str, version: int) -> list[tuple[str, int, dict[str, str]]]:
    """Return (path below the table, bytes, partition values) of each file of one version.

    Cost: one job over the log; no data is read.
    """
    snapshot = delta_log(spark, path).getSnapshotAt(version, _none(spark), _none(spark))
    files = DataFrame(snapshot.allFiles().toDF(), spark)
    columns = (F.col("path"), F.col("size"), F.to_json("partitionValues").alias("values"))
    return [
        (r["path"], r["size"], json.loads(r["values"])) for r in files.select(*columns).collect()
    ]


def has_partition_value(
    values: Mapping[str, str], column: str, accepted_values: Iterable[object]
) -> bool:
    """Return whether a file's value of the partition `column` is among `accepted_values`.

    `values` : the partition values of the file, by column, as the log writes them

    >>> has_partition_value({"model": "ease"}, "model", ["als", "ease"])
    True
    """
    partition_value = values.get(column)
    for value in accepted_values:
        if isinstance(value, datetime) and partition_value is not None:
            moment = datetime.fromisoformat(partition_value)
            if (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) == value:
                return True
        elif partition_value == str(value):
            return True
    return False


def write(
    spark: SparkSession,
    path: str,
    rows: DataFrame,
    *,
    read_version: int | None,
    condition: str | None = None,
    any_commit_conflicts: bool = False,
    commit_name: str | None = None,
    metadata: str | None = None,
    partition: Iterable[str] = (),
    properties: Mapping[str, str] | None = None,
    addable_columns: Collection[str] = (),
) -> int | None:
    """Write `rows` in one commit and return its version.

    Parameters
    ----------
    read_version : version that the caller has read; None creates the table, as version 0
    condition : SQL condition of the slice that `rows` replace; None appends the rows
    any_commit_conflicts : any commit after `read_version` is a conflict, not only one of the same
        slice
    commit_name : a name that can be committed only once. If the table already has a commit of that
        name, nothing is written and None is returned. Two commits of one name at the same time are
        a conflict
    metadata : text that is stored with the commit
    partition, properties : partition columns and table properties of a table that is created
    addable_columns : columns that this commit adds to the table where it lacks them; earlier rows
        then have null there. Any other column that the table lacks is an error of Delta

    A conflict raises a Java exception named `Concurrent…` or `…Changed…`; `TableCatalog` turns it
    into ConcurrentWriteError. Cost: the same as Delta's own writer.
    """
    table_log = delta_log(spark, path)
    if read_version is None:
        snapshot = newest(spark, path)
    else:
        snapshot = table_log.getSnapshotAt(read_version, _none(spark), _none(spark))
    transaction = table_log.startTransaction(_none(spark), _some(spark, snapshot))
    if commit_name is not None and transaction.txnVersion(commit_name) >= 0:
        return None
    if any_commit_conflicts:
        transaction.readWholeTable()
    save_mode = (
        "ErrorIfExists" if read_version is None else "Append" if condition is None else "Overwrite"
    )
    java_save_mode = getattr(_java(spark, "org.apache.spark.sql.SaveMode"), save_mode)
    options = {} if condition is None else {"replaceWhere": condition}
    if read_version is not None and addable_columns:
        new_columns = {*rows.columns} - {*snapshot.schema().fieldNames()}
        if new_columns and new_columns.issubset(addable_columns):
            options["mergeSchema"] = "true"
    python_utils = _java(spark, "org.apache.spark.api.python.PythonUtils")
    session = spark._jsparkSession
    partition_columns = python_utils.toSeq(list(partition))
    writer = _java(spark, f"{_DELTA}.commands.WriteIntoDelta")(
        table_log,
        java_save_mode,
        _java(spark, f"{_DELTA}.DeltaOptions")(
            python_utils.toScalaMap(options), session.sessionState().conf()
        ),
        partition_columns,
        python_utils.toScalaMap(dict(properties or {})),
        rows._jdf,
        _none(spark),
        _none(spark),
    )
    actions = writer.write(transaction, session, _none(spark), False)
    if commit_name is not None:  # stored in the log, where `txnVersion` above finds it
        set_transaction = _java(spark, f"{_DELTA}.actions.SetTransaction")(
            commit_name, 0, _some(spark, int(time.time() * 1000))
        )
        actions = actions.appended(set_transaction)
    operation = _java(spark, f"{_DELTA}.DeltaOperations$Write")(
        java_save_mode,
        _some(spark, partition_columns) if read_version is None else _none(spark),
        _none(spark) if condition is None else _some(spark, condition),
        _none(spark) if metadata is None else _some(spark, metadata),
    )
    return int(transaction.commit(actions, operation))


def _java(spark: SparkSession, name: str) -> Any:
    # One call of the JVM for the full name, instead of one for each part of `org.apache.spark...`.
    return getattr(spark.sparkContext._jvm, name)


def _none(spark: SparkSession) -> Any:
    return _java(spark, "scala.Option").empty()


def _some(spark: SparkSession, value: object) -> Any:
    return _java(spark, "scala.Some")(value)

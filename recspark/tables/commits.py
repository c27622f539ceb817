"""One commit of a Delta table that begins at the version its caller has read.

Delta's writer and its MERGE begin at the newest version, so what was committed between the caller's
look and the write is taken for known. Here the transaction begins at the version that the rows were
computed from, and Delta itself refuses the commit where that no longer stands.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

_DELTA = "org.apache.spark.sql.delta"


def delta_log(spark: SparkSession, path: str) -> Any:
    """Return Delta's own object for the log of the table at `path`.

    The session becomes the active one of this thread of the JVM, as it is for a query: Delta reads
    its settings there, and a literal time means another instant in another zone.
    """
    _java(spark, "org.apache.spark.sql.classic.SparkSession").setActiveSession(spark._jsparkSession)
    return _java(spark, f"{_DELTA}.DeltaLog").forTable(spark._jsparkSession, path)


def newest(spark: SparkSession, path: str) -> Any:
    """Return the newest snapshot of the table at `path`, of version -1 where there is none."""
    return delta_log(spark, path).update(False, _none(spark), _none(spark))


def files_of(spark: SparkSession, path: str, version: int) -> list[tuple[str, int, dict[str, str]]]:
    """Return name below the table, bytes and partition values of each file of one version.

    Cost: one job over the log; no data is read.
    """
    snapshot = delta_log(spark, path).getSnapshotAt(version, _none(spark), _none(spark))
    files = DataFrame(snapshot.allFiles().toDF(), spark)
    columns = (F.col("path"), F.col("size"), F.to_json("partitionValues").alias("values"))
    return [
        (r["path"], r["size"], json.loads(r["values"])) for r in files.select(*columns).collect()
    ]


def is_of(values: Mapping[str, str], column: str, wanted: Iterable[object]) -> bool:
    """Return whether a file's partition value is one of those `wanted`.

    >>> is_of({"model": "ease"}, "model", ["als", "ease"])
    True
    """
    text = values.get(column)
    for value in wanted:
        if isinstance(value, datetime) and text is not None:
            instant = datetime.fromisoformat(text)
            if (instant if instant.tzinfo else instant.replace(tzinfo=UTC)) == value:
                return True
        elif text == str(value):
            return True
    return False


def write(
    spark: SparkSession,
    path: str,
    rows: DataFrame,
    *,
    begin: int | None,
    condition: str | None = None,
    whole: bool = False,
    once: str | None = None,
    metadata: str | None = None,
    partition: Iterable[str] = (),
    properties: Mapping[str, str] | None = None,
) -> int | None:
    """Write `rows` in one commit and return its version.

    Parameters
    ----------
    begin : version that the caller has read; None makes the table, in its version 0
    condition : the slice that `rows` replace; None adds them
    whole : any commit since `begin` is a conflict, not only one of the same slice
    once : a name that is committed once: None is returned where it has been, and two commits of it
        at once are a conflict
    metadata : stored with the commit
    partition, properties : of a table that is made

    A conflict is a Java exception named `Concurrent…` or `…Changed…`; `TableCatalog` names it. Cost:
    as Delta's own writer.
    """
    log = delta_log(spark, path)
    if begin is None:
        snapshot = newest(spark, path)
    else:
        snapshot = log.getSnapshotAt(begin, _none(spark), _none(spark))
    transaction = log.startTransaction(_none(spark), _some(spark, snapshot))
    if once is not None and transaction.txnVersion(once) >= 0:
        return None
    if whole:
        transaction.readWholeTable()
    kind = "ErrorIfExists" if begin is None else "Append" if condition is None else "Overwrite"
    mode = getattr(_java(spark, "org.apache.spark.sql.SaveMode"), kind)
    options = {} if condition is None else {"replaceWhere": condition}
    python = _java(spark, "org.apache.spark.api.python.PythonUtils")
    session = spark._jsparkSession
    columns = python.toSeq(list(partition))
    writer = _java(spark, f"{_DELTA}.commands.WriteIntoDelta")(
        log,
        mode,
        _java(spark, f"{_DELTA}.DeltaOptions")(
            python.toScalaMap(options), session.sessionState().conf()
        ),
        columns,
        python.toScalaMap(dict(properties or {})),
        rows._jdf,
        _none(spark),
        _none(spark),
    )
    actions = writer.write(transaction, session, _none(spark), False)
    if once is not None:
        told = _java(spark, f"{_DELTA}.actions.SetTransaction")(
            once, 0, _some(spark, int(time.time() * 1000))
        )
        actions = actions.appended(told)
    operation = _java(spark, f"{_DELTA}.DeltaOperations$Write")(
        mode,
        _some(spark, columns) if begin is None else _none(spark),
        _none(spark) if condition is None else _some(spark, condition),
        _none(spark) if metadata is None else _some(spark, metadata),
    )
    return int(transaction.commit(actions, operation))


def _java(spark: SparkSession, name: str) -> Any:
    return getattr(spark.sparkContext._jvm, name)  # in one question, not in six


def _none(spark: SparkSession) -> Any:
    return _java(spark, "scala.Option").empty()


def _some(spark: SparkSession, value: object) -> Any:
    return _java(spark, "scala.Some")(value)

"""Session files (the Diginetica form): one session a line, item ids in click order, no times, no
users.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from functools import reduce
from itertools import accumulate

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Source
from recspark.errors import SourceError
from recspark.sources.files import Place, find_place, head
from recspark.sources.landing import Night
from recspark.sources.raw import named_errors, read_files
from recspark.sources.typed import BAD_ENCODING, attributes_of, first_reason, shaped

EMPTY_SESSION = "empty session"
CUT_ANEW = "was cut into partitions anew while it was read: run the stage again"


def places(source: Source, run_date: date) -> list[Place]:
    """Return where the files lie, in reading order; raises MissingLandingError, SourceError."""
    if source.options:
        raise SourceError(
            f"source '{source.name}': source.options {sorted(source.options)}: kind 'session_files' "
            "takes none; leave them out"
        )
    place = find_place(source, source.path, run_date, only=source.files or None)
    lacking = sorted(set(source.files) - {name for name, _, _ in place.entries})
    if lacking:
        raise SourceError(
            f"source '{source.name}': source.files names {lacking}, which are not in {place.root}"
        )
    return [place]


def read(
    spark: SparkSession, source: Source, places: list[Place], night: Night
) -> tuple[DataFrame | None, None]:
    """Return the clicks of `night` as events, no catalogue; None where the files are empty.

    `session_key` is the file's name below the landing and the line's number, after the date of the
    night where each has a landing of its own: lines of two files, or of two nights, never share
    one. `event_id` adds the position in the line. Times are made up and say so (attribute `time` =
    `made up`): they keep the order of files, lines and clicks (`source.made_up`). Raises SourceError
    for a file that cannot be read. Cost: no shuffle; one job that counts lines for each file but the
    last, and for the last too where Spark splits it.
    """
    place = places[0]
    files = place.files
    if not files:
        return None, None
    made_up = source.made_up
    start = datetime.combine(made_up.start or night.run_date, time(), UTC)
    parts, n_before = [], 0
    for i, uri in enumerate(files):
        head(uri)
        with named_errors(place, "text"):
            lines, n_lines = _numbered_lines(spark, place, uri, count=i < len(files) - 1)
        name = place.name_of(uri) if night.archive else f"{night.run_date}/{place.name_of(uri)}"
        key = F.concat(F.lit(f"{name}:"), F.col("line").cast("string"))
        session = F.col("line") + F.lit(n_before - 1)
        parts.append(lines.select("value", key.alias("session_key"), session.alias("session")))
        n_before += n_lines
    items = F.split(F.trim("value"), r"\s+")
    clicks = reduce(DataFrame.union, parts).select(
        "value", "session_key", "session", F.posexplode(items).alias("position", "item_id")
    )
    micros = (
        F.lit(round(start.timestamp() * 1e6))
        + (F.col("session") * F.lit(made_up.session_seconds * 1e6)).cast("bigint")
        + (F.col("position") * F.lit(made_up.event_seconds * 1e6)).cast("bigint")
    )
    event_at = F.timestamp_micros(micros)
    item_id = F.col("item_id")
    events = shaped(
        night.rows(clicks, event_at),
        schema.RAW_EVENTS,
        {
            "event_id": F.concat_ws(":", "session_key", F.col("position").cast("string")),
            "session_key": F.col("session_key"),
            "item_id": F.nullif(item_id, F.lit("")),
            "event_type": F.lit("click"),
            "event_at": event_at,
            "attributes": attributes_of({"time": F.lit("made up")}),
            "reason": first_reason(
                [
                    (item_id == "", EMPTY_SESSION),
                    (item_id.contains("\ufffd"), BAD_ENCODING.format("item")),
                ]
            ),
            "row": F.to_json(
                F.struct("session_key", "position", "item_id", F.col("value").alias("line"))
            ),
        },
    )
    return events, None


def _numbered_lines(
    spark: SparkSession, place: Place, uri: str, *, count: bool
) -> tuple[DataFrame, int]:
    """Return `value`, `line` (1-based) of one file, and its number of lines (0 where not counted).

    Spark cuts a file into partitions in its order, and `monotonically_increasing_id` is partition
    number × 2^33 + row in the partition. So a file of one partition (any .gz) is numbered as it is
    read; else the lines of the partitions before are added, counted by one job. Spark cuts anew where
    executors came in between: reading then ends in an error, as some partition must have more lines
    than were counted.
    """
    lines = read_files(spark.read.schema("value string"), place, "text", [uri])
    number = F.monotonically_increasing_id()
    n_partitions = lines.rdd.getNumPartitions()
    if n_partitions == 1 and not count:
        counts = [1 << 33]
    else:
        counted = lines.groupBy(F.spark_partition_id().alias("partition")).count().collect()
        sizes = {row["partition"]: row["count"] for row in counted}
        counts = [sizes.get(partition, 0) for partition in range(n_partitions)]
    *first, total = accumulate(counts, initial=0)
    partition = F.shiftright(number, 33).cast("int")
    row = number.bitwiseAND(F.lit((1 << 33) - 1))
    line = F.when(
        row < F.get(F.lit(counts), partition), F.get(F.lit(first), partition) + row + 1
    ).otherwise(F.raise_error(F.lit(f"{uri} {CUT_ANEW}")))
    return lines.select("value", line.cast("bigint").alias("line")), total if count else 0

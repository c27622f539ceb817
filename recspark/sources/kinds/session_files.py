"""Source kind `session_files`: text files in the form of Diginetica. Each line is one session: the
ids of the clicked items in click order, with blanks between. There are no times and no users.
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
from recspark.sources.files import SourceInput, find_input, head
from recspark.sources.landing import Night
from recspark.sources.raw import named_errors, read_files
from recspark.sources.typed import BAD_ENCODING, attributes_of, first_reason, shaped

EMPTY_SESSION = "empty session"
CUT_ANEW = "was cut into partitions anew while it was read: run the stage again"

CATALOGUE_IS_OF_EVENTS = False


def inputs(source: Source, run_date: date) -> list[SourceInput]:
    """Return the one input, with its files in reading order.

    Raises MissingLandingError where nothing is at the path, and SourceError where `source.files`
    names a file that does not exist, or where `source.options` is set.
    """
    if source.options:
        raise SourceError(
            f"source '{source.name}': source.options {sorted(source.options)}: kind 'session_files' "
            "takes none; leave them out"
        )
    source_input = find_input(source, source.path, run_date, only=source.files or None)
    missing = sorted(set(source.files) - {name for name, _, _ in source_input.entries})
    if missing:
        raise SourceError(
            f"source '{source.name}': source.files names {missing}, which are not in {source_input.root}"
        )
    return [source_input]


def read(
    spark: SparkSession, source: Source, inputs: list[SourceInput], night: Night
) -> tuple[DataFrame | None, None]:
    """Return the clicks of `night` as events, and None as there is no catalogue. The events are
    None too where the files are empty.

    `session_key` is the file's name below the landing and the line's number (`a.txt:7`). Where each
    night has a landing, the date of the night comes first (`2024-03-30/a.txt:7`). So lines of two
    files, or of two nights, never share a key. `event_id` adds the position in the line, from 0 on
    (`a.txt:7:0`). The times are made up from `source.made_up`, in the order of files, lines and
    clicks, and attribute `time` of every event says `made up`. Raises SourceError for a file that
    cannot be read. Cost: no shuffle. One job counts the lines of each file but the last, and of the
    last one too where Spark splits that file.
    """
    source_input = inputs[0]
    files = source_input.files
    if not files:
        return None, None
    made_up = source.made_up
    start = datetime.combine(made_up.start or night.run_date, time(), UTC)
    lines_of_files, n_lines_before = [], 0
    for file_index, uri in enumerate(files):
        head(uri)
        with named_errors(source_input, "text"):
            lines, n_lines = _numbered_lines(
                spark, source_input, uri, count=file_index < len(files) - 1
            )
        name = (
            source_input.name_of(uri)
            if night.archive
            else f"{night.run_date}/{source_input.name_of(uri)}"
        )
        session_key = F.concat(F.lit(f"{name}:"), F.col("line").cast("string"))
        session_index = F.col("line") + F.lit(n_lines_before - 1)
        lines_of_files.append(
            lines.select("value", session_key.alias("session_key"), session_index.alias("session"))
        )
        n_lines_before += n_lines
    items = F.split(F.trim("value"), r"\s+")
    clicks = reduce(DataFrame.union, lines_of_files).select(
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
    spark: SparkSession, source_input: SourceInput, uri: str, *, count: bool
) -> tuple[DataFrame, int]:
    """Return the lines of one file as (value, line), where `line` counts from 1, and the number of
    lines (0 unless `count`).

    Spark splits a file into partitions in the order of the file, and `monotonically_increasing_id`
    is partition number × 2^33 + row in the partition. So a file with one partition (any .gz) is
    numbered while it is read. Otherwise one job counts the lines of each partition, and a line's
    number is its row in the partition + 1 + the lines of all partitions before. For example, for
    partitions of 3 and 2 lines, the rows 0 and 1 of the second partition are the lines 4 and 5.

    Spark splits the file in another way if executors were added between counting and reading. Some
    partition then has more lines than were counted, so reading ends in the error `CUT_ANEW`.
    """
    lines = read_files(spark.read.schema("value string"), source_input, "text", [uri])
    increasing_id = F.monotonically_increasing_id()
    n_partitions = lines.rdd.getNumPartitions()
    if n_partitions == 1 and not count:
        counts = [1 << 33]
    else:
        count_rows = lines.groupBy(F.spark_partition_id().alias("partition")).count().collect()
        count_by_partition = {row["partition"]: row["count"] for row in count_rows}
        counts = [count_by_partition.get(partition, 0) for partition in range(n_partitions)]
    *n_lines_before, n_lines = accumulate(counts, initial=0)
    partition = F.shiftright(increasing_id, 33).cast("int")
    row = increasing_id.bitwiseAND(F.lit((1 << 33) - 1))
    line = F.when(
        row < F.get(F.lit(counts), partition), F.get(F.lit(n_lines_before), partition) + row + 1
    ).otherwise(F.raise_error(F.lit(f"{uri} {CUT_ANEW}")))
    return lines.select("value", line.cast("bigint").alias("line")), n_lines if count else 0

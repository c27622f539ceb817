"""A table written to files, for those without a Delta reader. One writer for rows that come from
Spark's tasks and for rows read without Spark.

CSV is that of RFC 4180: a header in each file, lines that end in CR LF, text in double quotes with
quotes doubled, nothing for null (`""` is empty text). JSON lines hold every column, null ones too.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator
from datetime import date, datetime
from itertools import chain
from typing import IO, TYPE_CHECKING, Any, Literal

from recspark import storage
from recspark.errors import ConfigError
from recspark.tables.reader import in_columns

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame

Format = Literal["parquet", "csv", "json"]
MARKER = "_recspark_export"  # begun by recspark: what may be replaced
DONE = "_SUCCESS"  # written last, as Spark does
# What a spreadsheet takes for the beginning of a formula, wide forms too, after blanks or not.
_RUNS = r"^([\s\p{Z}\x0b\x1c-\x1f\x85]*[=+\-@＝＋－＠]|[\t\r\n])"


class Export:
    """One export into one folder.

    Parameters
    ----------
    folder : URI; may hold an older export, which is replaced
    form : parquet, csv or json
    neutral : put an apostrophe before text that a spreadsheet would run (csv)
    """

    def __init__(self, folder: str, form: Format, *, neutral: bool = False) -> None:
        self.folder = storage.absolute(folder)
        self.form = form
        self.neutral = neutral
        self.id = uuid.uuid4().hex[:12]

    def check_target(self) -> list[str]:
        """Return the files of an older export in the folder; ConfigError where it holds others."""
        if not storage.exists(self.folder):
            return []
        files = storage.list_files(self.folder)
        begun = self._begun()
        ours = re.compile(rf"part-{begun}-\w+\.\w+|{MARKER}|{DONE}") if begun else None
        for file in files:
            name = file.removeprefix(self.folder).lstrip("/")
            if ours is None or not ours.fullmatch(name):
                raise ConfigError(
                    f"{self.folder} holds files that no export of recspark wrote, such as "
                    f"'{name or file}'; name another folder"
                )
        return sorted(files, key=lambda file: not file.endswith(DONE))

    def _begun(self) -> str | None:
        """Return the id of the export that the folder's marker names; None without a marker."""
        marker = storage.join(self.folder, MARKER)
        if not storage.exists(marker):
            return None
        try:
            found = re.fullmatch(r"[0-9a-f]{12}", storage.read_json(marker)["id"])
        except (ValueError, KeyError, TypeError):
            return None  # a file of that name that recspark did not write
        return found[0] if found else None

    def begin(self, about: dict[str, Any]) -> None:
        """Remove an older export, and mark the folder as one that recspark writes."""
        for file in self.check_target():
            storage.remove(file)
        marker = {"id": self.id, "format": self.form, **about}
        storage.write_json(storage.join(self.folder, MARKER), marker)

    def write(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], name: str) -> int:
        """Write one file of the rows of `batches`; return how many. One batch is in memory."""
        import pyarrow as pa

        file = f"part-{self.id}-{name}.{self.form}"
        n_rows = 0
        with storage.open_write(storage.join(self.folder, file)) as stream:
            if self.form == "parquet":
                import pyarrow.parquet as pq

                with pq.ParquetWriter(stream, schema, coerce_timestamps="us") as writer:
                    for batch in batches:
                        writer.write_table(pa.Table.from_batches([batch], schema))
                        n_rows += batch.num_rows
                return n_rows
            if self.form == "csv":
                stream.write((",".join(_quoted(n) for n in schema.names) + "\r\n").encode())
            for batch in batches:
                self._write_lines(stream, batch)
                n_rows += batch.num_rows
        return n_rows

    def write_spark(self, rows: DataFrame) -> int:
        """Write the rows of a frame, a file a task that has any; return how many. One job."""
        schema = _arrow_schema(rows)
        written = rows.mapInArrow(self._task(schema), "file string, n_rows long").collect()
        kept = {row["file"] for row in written}
        for file in storage.list_files(self.folder):
            name = file.rsplit("/", 1)[1]
            if name.startswith("part-") and name.split("-")[2].split(".")[0] not in kept:
                storage.remove(file)  # of an attempt that failed
        if not kept:
            self.write(schema, [], "00000")
        return sum(row["n_rows"] for row in written)

    def end(self) -> None:
        """Say that all files are there."""
        storage.write_bytes(storage.join(self.folder, DONE), b"")

    def _task(self, schema: pa.Schema) -> Any:
        def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            import pyarrow as pa
            from pyspark import TaskContext

            task = TaskContext.get()
            first = next((batch for batch in batches if batch.num_rows), None)
            if task is None or first is None:
                return
            name = f"{task.partitionId():05d}a{task.attemptNumber()}"
            every = (in_columns(batch, schema) for batch in chain([first], batches))
            n_rows = self.write(schema, every, name)
            yield pa.RecordBatch.from_pydict({"file": [name], "n_rows": [n_rows]})

        return write

    def _write_lines(self, stream: IO[bytes], batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        if self.form == "csv":
            stream.write(csv_lines(batch, neutral=self.neutral))
        else:
            stream.write("".join(_json_line(row) for row in batch.to_pylist()).encode())


def csv_lines(batch: pa.RecordBatch, *, neutral: bool = False) -> bytes:
    """Return the rows as lines of CSV, each ended by CR LF."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = []
    for column in batch.columns:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            text = pc.replace_substring(column, '"', '""')
            if neutral:
                text = pc.if_else(
                    pc.match_substring_regex(column, _RUNS),
                    pc.binary_join_element_wise("'", text, ""),
                    text,
                )
            text = pc.binary_join_element_wise('"', text, '"', "")
        elif pa.types.is_timestamp(column.type):
            text = pc.strftime(column, format="%Y-%m-%dT%H:%M:%SZ")
        else:
            text = column.cast(pa.string())
        columns.append(text.fill_null(""))
    lines = pc.binary_join_element_wise(*columns, ",")
    return ("\r\n".join(lines.to_pylist()) + "\r\n").encode()


def nested(schema: pa.Schema) -> list[str]:
    """Return the columns that CSV cannot hold."""
    import pyarrow as pa

    return [field.name for field in schema if pa.types.is_nested(field.type)]


def arrow_schema(rows: DataFrame) -> pa.Schema:
    """Return the columns of a frame as Arrow's."""
    return _arrow_schema(rows)


def _arrow_schema(rows: DataFrame) -> pa.Schema:
    import pyarrow as pa
    from pyspark.sql.pandas.types import to_arrow_schema

    schema = to_arrow_schema(rows.schema)
    return pa.schema([_with_utc(field) for field in schema])


def _with_utc(field: pa.Field) -> pa.Field:
    import pyarrow as pa

    return (
        field.with_type(pa.timestamp("us", "UTC")) if pa.types.is_timestamp(field.type) else field
    )


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(_json_value(row), ensure_ascii=False, allow_nan=False) + "\n"


def _json_value(value: Any) -> Any:
    """Return a value as JSON has it: times in ISO with Z, a map (Arrow: pairs) as an object, a number
    that JSON lacks as text.
    """
    if isinstance(value, dict):
        return {name: _json_value(part) for name, part in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(part, tuple) for part in value):
            return {name: _json_value(part) for name, part in value}
        return [_json_value(part) for part in value]
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat() + "Z"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    return value

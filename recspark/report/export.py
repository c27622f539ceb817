"""Write a table to files, for those without a Delta reader. The same code writes rows from the
tasks of Spark and rows that were read without Spark.

CSV follows RFC 4180: each file has a header, lines end in CR LF, text is in double quotes with
quotes doubled, and null is an empty field (`""` is empty text). JSON lines hold every column, also
if it is null.
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
MARKER = "_recspark_export"  # the folder holds an export of recspark, which may be replaced
DONE = "_SUCCESS"  # written last, as Spark does it
# The start of a text that a spreadsheet takes for a formula: = + - @, also in wide form and after
# blanks, or a tab or line break.
_FORMULA_START = r"^([\s\p{Z}\x0b\x1c-\x1f\x85]*[=+\-@＝＋－＠]|[\t\r\n])"


class Export:
    """One export into one folder.

    Parameters
    ----------
    folder : URI; may hold an older export, which is replaced
    file_format : parquet, csv or json
    neutral : put an apostrophe before text that a spreadsheet would run as a formula (csv)
    """

    def __init__(self, folder: str, file_format: Format, *, neutral: bool = False) -> None:
        self.folder = storage.absolute(folder)
        self.file_format = file_format
        self.neutral = neutral
        self.id = uuid.uuid4().hex[:12]

    def check_target(self) -> list[str]:
        """Return the files of an older export in the folder, `_SUCCESS` first, so that it is
        removed first.

        Raises ConfigError if the folder holds other files.
        """
        if not storage.exists(self.folder):
            return []
        files = storage.list_files(self.folder)
        export_id = self._marked_export_id()
        export_file_name = (
            re.compile(rf"part-{export_id}-\w+\.\w+|{MARKER}|{DONE}") if export_id else None
        )
        for file in files:
            name = file.removeprefix(self.folder).lstrip("/")
            if export_file_name is None or not export_file_name.fullmatch(name):
                raise ConfigError(
                    f"{self.folder} holds files that no export of recspark wrote, such as "
                    f"'{name or file}'; name another folder"
                )
        return sorted(files, key=lambda file: not file.endswith(DONE))

    def _marked_export_id(self) -> str | None:
        """Return the export id in the folder's marker file; None without a valid marker."""
        marker = storage.join(self.folder, MARKER)
        if not storage.exists(marker):
            return None
        try:
            match = re.fullmatch(r"[0-9a-f]{12}", storage.read_json(marker)["id"])
        except (ValueError, KeyError, TypeError):
            return None  # a file of that name that recspark did not write
        return match[0] if match else None

    def begin(self, about: dict[str, Any]) -> None:
        """Remove an older export, and write the marker file with `about`, so that the folder counts
        as an export of recspark.
        """
        for file in self.check_target():
            storage.remove(file)
        marker = {"id": self.id, "format": self.file_format, **about}
        storage.write_json(storage.join(self.folder, MARKER), marker)

    def write(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], name: str) -> int:
        """Write the rows of `batches` to one file and return their number. One batch is in memory
        at a time.
        """
        import pyarrow as pa

        file = f"part-{self.id}-{name}.{self.file_format}"
        n_rows = 0
        with storage.open_write(storage.join(self.folder, file)) as stream:
            if self.file_format == "parquet":
                import pyarrow.parquet as pq

                with pq.ParquetWriter(stream, schema, coerce_timestamps="us") as writer:
                    for batch in batches:
                        writer.write_table(pa.Table.from_batches([batch], schema))
                        n_rows += batch.num_rows
                return n_rows
            if self.file_format == "csv":
                stream.write((",".join(_quoted(n) for n in schema.names) + "\r\n").encode())
            for batch in batches:
                self._write_lines(stream, batch)
                n_rows += batch.num_rows
        return n_rows

    def write_spark(self, rows: DataFrame) -> int:
        """Write the rows of a Spark frame and return their number. One job; each task that has rows
        writes one file.
        """
        schema = _arrow_schema(rows)
        task_results = rows.mapInArrow(
            self._partition_writer(schema), "file string, n_rows long"
        ).collect()
        written_names = {row["file"] for row in task_results}
        for file in storage.list_files(self.folder):
            name = file.rsplit("/", 1)[1]
            if name.startswith("part-") and name.split("-")[2].split(".")[0] not in written_names:
                storage.remove(file)  # a task attempt that failed left it
        if not written_names:  # no rows: write one file with the columns
            self.write(schema, [], "00000")
        return sum(row["n_rows"] for row in task_results)

    def end(self) -> None:
        """Mark the export as complete."""
        storage.write_bytes(storage.join(self.folder, DONE), b"")

    def _partition_writer(self, schema: pa.Schema) -> Any:
        # For `mapInArrow`: writes the rows of a task to a file, yields its name and number of rows.
        def write_partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            import pyarrow as pa
            from pyspark import TaskContext

            task = TaskContext.get()
            first_batch = next((batch for batch in batches if batch.num_rows), None)
            if task is None or first_batch is None:
                return
            name = f"{task.partitionId():05d}a{task.attemptNumber()}"
            all_batches = (in_columns(batch, schema) for batch in chain([first_batch], batches))
            n_rows = self.write(schema, all_batches, name)
            yield pa.RecordBatch.from_pydict({"file": [name], "n_rows": [n_rows]})

        return write_partition

    def _write_lines(self, stream: IO[bytes], batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        if self.file_format == "csv":
            stream.write(csv_lines(batch, neutral=self.neutral))
        else:
            stream.write("".join(_json_line(row) for row in batch.to_pylist()).encode())


def csv_lines(batch: pa.RecordBatch, *, neutral: bool = False) -> bytes:
    """Return the rows of `batch` as CSV lines, each ended by CR LF. A list, a map or a struct is
    written as JSON.

    `neutral` : put an apostrophe before text that a spreadsheet would run as a formula
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = []
    for column in batch.columns:
        if pa.types.is_nested(column.type):
            values = column.to_pylist()
            column = pa.array([None if v is None else _json(v) for v in values], pa.string())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            text = pc.replace_substring(column, '"', '""')
            if neutral:
                text = pc.if_else(
                    pc.match_substring_regex(column, _FORMULA_START),
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


def arrow_schema(rows: DataFrame) -> pa.Schema:
    """Return the columns of a Spark frame as an Arrow schema."""
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
    return _json(row) + "\n"


def _json(value: Any) -> str:
    return json.dumps(_json_value(value), ensure_ascii=False, allow_nan=False)


def _json_value(value: Any) -> Any:
    """Return a value as JSON has it: a time in ISO form with Z, a map (in Arrow a list of pairs) as
    an object, and NaN or an infinity, which JSON lacks, as text.
    """
    if isinstance(value, dict):
        return {name: _json_value(element) for name, element in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(element, tuple) for element in value):
            return {name: _json_value(element) for name, element in value}
        return [_json_value(element) for element in value]
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat() + "Z"
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}[str(value)]
    return value

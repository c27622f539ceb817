"""Read tables without Spark, with the `deltalake` package. It finds the files of a version in the
table's log and reads only the files and rows that can meet a condition.

For a person's questions, such as one user's list or one item's neighbours. The nights read through
`recspark.tables.catalog`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import unquote

from recspark import storage
from recspark.errors import DamagedFileError, TableNotFoundError, suggest
from recspark.masking import mask
from recspark.tables.added_columns import AddedColumn, added_columns, with_added_names

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

# (column, operator, value). A row must meet all conditions of a list.
Condition = tuple[str, Literal["=", "<", "in"], Any]


def is_readable_without_spark(root: str) -> bool:
    """Return whether the tables below `root` can be read without Spark: they must be local.

    A path with a `%` cannot, because deltalake 1.6 takes a `%` in a folder's name for an escape.
    """
    return storage.is_local(root) and "%" not in storage.absolute(root)


class Reader(Protocol):
    """What the commands need from the tables below one root. The answers are the same with and
    without Spark. Times are in UTC, without a zone.
    """

    def nights(self, table: str) -> list[date]:
        """Return the `run_date`s of `table`, oldest first; [] if there is no such table."""

    def rows(
        self, table: str, where: Sequence[Condition], columns: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the rows that meet all conditions, in no particular order. Empty `columns` means
        all columns.

        Raises TableNotFoundError.
        """

    def sizes(self) -> list[dict[str, Any]]:
        """Return table, version, rows, files, bytes and path of every table, sorted by name."""


class TableReader:
    """Reads the newest versions of the tables below one local root."""

    def __init__(self, root: str) -> None:
        self.root = storage.absolute(root)
        self._open_tables: dict[str, DeltaTable] = {}  # all answers use the version opened first

    def tables(self) -> list[str]:
        """Return the names of the tables that exist, sorted."""
        folders = [folder.rsplit("/", 1)[1] for folder in storage.folders(self.root)]
        return sorted(name for name in folders if self._has_log(name))

    def version(self, table: str) -> int:
        """Return the version of `table` that this reader reads."""
        return int(self._opened(table).version())

    def nights(self, table: str) -> list[date]:
        """Return the `run_date`s of `table`, oldest first. If `run_date` is a partition column,
        only the log is read.
        """
        if not self._has_log(table):
            return []
        if "run_date" in self._partition_columns(table):
            return sorted({file["partition.run_date"] for file in self._files(table)})
        return sorted({row["run_date"] for row in self.rows(table, [], ["run_date"])})

    def rows(
        self, table: str, where: Sequence[Condition], columns: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the rows that meet all conditions, in no particular order. Empty `columns` means
        all columns.

        Cost: a file is not opened if its partition values or statistics rule the conditions out.
        """
        from deltalake import QueryBuilder

        selected_columns = ", ".join(map(_quoted_name, columns)) or "*"
        sql_condition = " AND ".join(f"{_quoted_name(c)} {op} {_literal(v)}" for c, op, v in where)
        delta_table = self._opened(table)
        query = f"SELECT {selected_columns} FROM {_rows_in_sql(table, delta_table)}" + (
            f" WHERE {sql_condition}" if sql_condition else ""
        )
        map_columns = [
            field.name for field in delta_table.schema().fields if field.type.type == "map"
        ]
        try:
            batches = QueryBuilder().register("t", delta_table).execute(query)
            rows = [row for batch in batches for row in batch.to_struct_array().to_pylist()]
        except Exception as error:  # deltalake raises a plain Exception for unreadable files
            raise _damaged_table_error(table, error) from None
        return [
            {name: _as_spark_value(value, name in map_columns) for name, value in row.items()}
            for row in rows
        ]

    def sizes(self) -> list[dict[str, Any]]:
        """Return table, version, rows, files, bytes and path of every table, sorted by name."""
        sizes = []
        for name in self.tables():
            files = self._files(name)
            sizes.append(
                {
                    "table": name,
                    "version": self._opened(name).version(),
                    "rows": sum(self._n_rows(name, file) for file in files),
                    "files": len(files),
                    "bytes": sum(file["size_bytes"] for file in files),
                    "path": mask(storage.join(self.root, name)),
                }
            )
        return sizes

    def batches(self, table: str, night: date | None = None) -> tuple[pa.Schema, _RecordBatches]:
        """Return the columns of `table` and an iterator over its rows in Arrow batches: all rows,
        or those of one `night`.

        Cost: one batch of one file is in memory at a time.
        """
        import pyarrow.parquet as pq

        delta_table = self._opened(table)
        partition_columns = self._partition_columns(table)
        files = sorted(self._files(table), key=lambda file: file["path"])
        if night is not None:
            # If run_date is no partition column, all files are kept here and filtered by row below.
            files = [file for file in files if file.get("partition.run_date", night) == night]
        schema = _arrow_schema(table, delta_table)

        def read_files() -> Iterator[pa.RecordBatch]:
            for file in files:
                partition_values = {
                    column: file[f"partition.{column}"] for column in partition_columns
                }
                try:
                    parquet_file = pq.ParquetFile(self._file_path(table, file["path"]))
                    for batch in parquet_file.iter_batches():
                        rows = in_columns(
                            _with_added_columns(batch, schema, table), schema, partition_values
                        )
                        yield rows if night is None else _rows_of_night(rows, night)
                except (OSError, ValueError) as error:  # all errors of pyarrow are one of these
                    raise _damaged_table_error(table, error, file["path"]) from None

        return schema, read_files()

    def _has_log(self, table: str) -> bool:
        return storage.exists(storage.join(self.root, table, "_delta_log"))

    def _partition_columns(self, table: str) -> list[str]:
        return list(self._opened(table).metadata().partition_columns)

    def _file_path(self, table: str, file: str) -> str:
        return storage.join(self.root, table, unquote(file))

    def _n_rows(self, table: str, file: dict[str, Any]) -> int:
        """Return the number of rows of a file: from the log's statistics, else from the file
        itself.
        """
        if file.get("num_records") is not None:
            return int(file["num_records"])
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(self._file_path(table, file["path"])).num_rows)
        except (OSError, ValueError) as error:
            raise _damaged_table_error(table, error, file["path"]) from None

    def _files(self, table: str) -> list[dict[str, Any]]:
        # One dict per data file: path, size_bytes, num_records, partition.<column>, statistics.
        actions = self._opened(table).get_add_actions(flatten=True)
        return list(actions.to_struct_array().to_pylist())

    def _opened(self, table: str) -> DeltaTable:
        # Opened once, so that all answers are of the same version.
        if table not in self._open_tables:
            self._open_tables[table] = self._open_newest(table)
        return self._open_tables[table]

    def _open_newest(self, table: str) -> DeltaTable:
        from deltalake import DeltaTable

        if not self._has_log(table):
            existing_tables = self.tables()
            hint = (
                suggest(table, existing_tables)
                if existing_tables
                else " Nothing is there yet: run a night first."
            )
            raise TableNotFoundError(f"table '{table}' does not exist below {self.root}.{hint}")
        try:
            return DeltaTable(Path(self.root) / table)
        except Exception as error:  # deltalake raises many types, depending on the damage
            raise _damaged_table_error(table, error) from None


_RecordBatches = Iterator["pa.RecordBatch"]


def _quoted_name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _literal(value: object) -> str:
    r"""Return `value` as an SQL literal; a collection becomes a list in parentheses.

    >>> _literal("O'Neill"), _literal(date(2010, 12, 9)), _literal(["a", "b"]), _literal(7)
    ("'O''Neill'", "DATE '2010-12-09'", "('a', 'b')", '7')
    """
    if isinstance(value, datetime):
        return f"TIMESTAMP '{value.astimezone(UTC).isoformat()}'"
    if isinstance(value, date):
        return f"DATE '{value.isoformat()}'"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Collection) and not isinstance(value, str):
        return "(" + ", ".join(map(_literal, value)) + ")"
    return "'" + str(value).replace("'", "''") + "'"


def _as_spark_value(value: Any, is_map: bool) -> Any:
    """Return a value as a row of Spark has it: a map as a dict sorted by key, a time in UTC without
    a zone, anything else unchanged.
    """
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None)
    return dict(sorted(value)) if is_map and value is not None else value


def _rows_in_sql(table: str, delta_table: DeltaTable) -> str:
    """Return what stands behind FROM: the rows `t`, with the columns that were added to the table."""
    added = {column.name: column.value for column in added_columns(table)}
    if not added:
        return "t"
    names = [field.name for field in delta_table.schema().fields]
    columns = []
    for name in with_added_names(names, table):
        quoted_name, value = _quoted_name(name), added.get(name)
        if name not in names:
            quoted_name = f"{'NULL' if value is None else _literal(value)} AS {quoted_name}"
        elif value is not None:
            quoted_name = f"COALESCE({quoted_name}, {_literal(value)}) AS {quoted_name}"
        columns.append(quoted_name)
    return f"(SELECT {', '.join(columns)} FROM t)"


def _with_added_columns(batch: pa.RecordBatch, schema: pa.Schema, table: str) -> pa.RecordBatch:
    """Return rows of a file of `table` with the columns that were added to the table.

    `schema` : has the types of these columns
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    arrays = dict(zip(batch.schema.names, batch.columns))
    for column in added_columns(table):
        array = arrays.get(column.name)
        if array is None:
            array = pa.nulls(batch.num_rows, schema.field(column.name).type)
        arrays[column.name] = array if column.value is None else pc.fill_null(array, column.value)
    return pa.RecordBatch.from_arrays([*arrays.values()], names=[*arrays])


def _arrow_schema(table: str, delta_table: DeltaTable) -> pa.Schema:
    import pyarrow as pa

    fields = {column.name: _delta_field(column) for column in added_columns(table)}
    fields |= {field.name: field for field in delta_table.schema().fields}
    return pa.schema([_arrow_field(fields[name]) for name in with_added_names(fields, table)])


def _delta_field(column: AddedColumn) -> Any:
    from deltalake import Field

    named_type = {"name": column.name, "type": column.type, "nullable": True, "metadata": {}}
    return Field.from_json(json.dumps(named_type))


def _arrow_field(field: Any) -> pa.Field:
    import pyarrow as pa

    return pa.field(field.name, _arrow_type(field.type))


def _arrow_type(delta_type: Any) -> pa.DataType:
    """Return the Arrow type of a Delta type."""
    import pyarrow as pa

    if delta_type.type == "array":
        return pa.list_(_arrow_type(delta_type.element_type))
    if delta_type.type == "map":
        return pa.map_(_arrow_type(delta_type.key_type), _arrow_type(delta_type.value_type))
    if delta_type.type == "struct":
        return pa.struct([_arrow_field(field) for field in delta_type.fields])
    return {
        "string": pa.string(),
        "integer": pa.int32(),
        "long": pa.int64(),
        "float": pa.float32(),
        "double": pa.float64(),
        "boolean": pa.bool_(),
        "date": pa.date32(),
        "timestamp": pa.timestamp("us", "UTC"),
    }[delta_type.type]


def in_columns(
    batch: pa.RecordBatch,
    schema: pa.Schema,
    partition_values: Mapping[str, Any] = MappingProxyType({}),
) -> pa.RecordBatch:
    """Return `batch` with the columns and types of `schema`.

    `partition_values` : values of the partition columns, which are not stored in the data files
    """
    import pyarrow as pa

    arrays = []
    for field in schema:
        if field.name in partition_values:
            arrays.append(pa.array([partition_values[field.name]] * batch.num_rows, field.type))
        else:
            arrays.append(batch.column(field.name).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _rows_of_night(batch: pa.RecordBatch, night: date) -> pa.RecordBatch:
    import pyarrow.compute as pc

    return batch.filter(pc.equal(batch.column("run_date"), night))


def _damaged_table_error(table: str, error: Exception, file: str = "") -> DamagedFileError:
    message = (str(error).splitlines() or [type(error).__name__])[0][:300]
    damaged_part = f"its file {file}" if file else "its log, or a file that the log lists,"
    return DamagedFileError(
        f"table '{table}': {damaged_part} cannot be read ({message}). Put the file back from a backup, or run the "
        "stage that writes the table again (docs/runbook.md)"
    )

"""Reading tables without Spark: by the `deltalake` package, which finds the files of a version in its
log and reads of them what a condition leaves.

For a person's questions: one user's list, one item's neighbours. The nights read through
`recspark.tables.catalog`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import unquote

from recspark import storage
from recspark.errors import DamagedFileError, TableNotFoundError, suggest
from recspark.masking import mask

if TYPE_CHECKING:
    import pyarrow as pa
    from deltalake import DeltaTable

# (column, "=" | "<" | "in", value): all must hold.
Condition = tuple[str, Literal["=", "<", "in"], Any]


def opens(root: str) -> bool:
    """Return whether the tables below `root` can be read without Spark: those of this machine.

    deltalake 1.6 takes a `%` in a folder's name for an escape.
    """
    return storage.is_local(root) and "%" not in storage.absolute(root)


class Reader(Protocol):
    """What the commands ask of the tables below one root; with and without Spark the answers are
    the same. Times come without a zone, in UTC.
    """

    def nights(self, table: str) -> list[date]:
        """Return the `run_date`s of `table`, oldest first; [] where there is no such table."""

    def rows(
        self, table: str, where: Sequence[Condition], columns: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the rows that meet all conditions, in no order; () = all columns.

        Raises TableNotFoundError.
        """

    def sizes(self) -> list[dict[str, Any]]:
        """Return table, version, rows, files, bytes and path of every table, by name."""


class TableReader:
    """The newest versions of the tables below one local root."""

    def __init__(self, root: str) -> None:
        self.root = storage.absolute(root)
        self._open: dict[str, DeltaTable] = {}  # one version of a table for all questions

    def tables(self) -> list[str]:
        """Return the names of the tables that exist, sorted."""
        folders = [folder.rsplit("/", 1)[1] for folder in storage.folders(self.root)]
        return sorted(name for name in folders if self._has_log(name))

    def version(self, table: str) -> int:
        """Return the version of `table` that this reader reads."""
        return int(self._table(table).version())

    def nights(self, table: str) -> list[date]:
        """Return the `run_date`s of `table`: from its log alone, where it is kept by night."""
        if not self._has_log(table):
            return []
        if "run_date" in self._partition(table):
            return sorted({file["partition.run_date"] for file in self._files(table)})
        return sorted({row["run_date"] for row in self.rows(table, [], ["run_date"])})

    def rows(
        self, table: str, where: Sequence[Condition], columns: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        """Return the rows that meet all conditions, in no order; () = all columns.

        Cost: files whose partition or statistics exclude the conditions are not opened.
        """
        from deltalake import QueryBuilder

        selected = ", ".join(map(_name, columns)) or "*"
        conditions = " AND ".join(f"{_name(c)} {op} {_literal(v)}" for c, op, v in where)
        query = f"SELECT {selected} FROM t" + (f" WHERE {conditions}" if conditions else "")
        opened = self._table(table)
        maps = [field.name for field in opened.schema().fields if field.type.type == "map"]
        try:
            batches = QueryBuilder().register("t", opened).execute(query)
            found = [row for batch in batches for row in batch.to_struct_array().to_pylist()]
        except Exception as error:  # deltalake raises plain ones for files
            raise _damaged(table, error) from None
        return [{name: _plain(value, name in maps) for name, value in row.items()} for row in found]

    def sizes(self) -> list[dict[str, Any]]:
        """Return table, version, rows, files, bytes and path of every table, by name."""
        out = []
        for name in self.tables():
            files = self._files(name)
            out.append(
                {
                    "table": name,
                    "version": self._table(name).version(),
                    "rows": sum(self._n_rows(name, file) for file in files),
                    "files": len(files),
                    "bytes": sum(file["size_bytes"] for file in files),
                    "path": mask(storage.join(self.root, name)),
                }
            )
        return out

    def batches(self, table: str, night: date | None = None) -> tuple[pa.Schema, _Batches]:
        """Return the columns of `table`, and its rows as Arrow batches: of one `night`, or all.

        Cost: one batch of a file at a time is in memory.
        """
        import pyarrow.parquet as pq

        opened = self._table(table)
        keys = self._partition(table)
        files = sorted(self._files(table), key=lambda file: file["path"])
        if night is not None:
            files = [file for file in files if file.get("partition.run_date", night) == night]
        schema = _arrow_schema(opened)

        def read() -> Iterator[pa.RecordBatch]:
            for file in files:
                values = {key: file[f"partition.{key}"] for key in keys}
                try:
                    content = pq.ParquetFile(self._path(table, file["path"]))
                    for batch in content.iter_batches():
                        rows = in_columns(batch, schema, values)
                        yield rows if night is None else _of_night(rows, night)
                except (OSError, ValueError) as error:  # pyarrow's own are both
                    raise _damaged(table, error, file["path"]) from None

        return schema, read()

    def _has_log(self, table: str) -> bool:
        return storage.exists(storage.join(self.root, table, "_delta_log"))

    def _partition(self, table: str) -> list[str]:
        return list(self._table(table).metadata().partition_columns)

    def _path(self, table: str, file: str) -> str:
        return storage.join(self.root, table, unquote(file))

    def _n_rows(self, table: str, file: dict[str, Any]) -> int:
        """Return the rows of a file: of the log's statistics, else of the file itself."""
        if file.get("num_records") is not None:
            return int(file["num_records"])
        import pyarrow.parquet as pq

        try:
            return int(pq.read_metadata(self._path(table, file["path"])).num_rows)
        except (OSError, ValueError) as error:
            raise _damaged(table, error, file["path"]) from None

    def _files(self, table: str) -> list[dict[str, Any]]:
        actions = self._table(table).get_add_actions(flatten=True)
        return list(actions.to_struct_array().to_pylist())

    def _table(self, table: str) -> DeltaTable:
        if table not in self._open:
            self._open[table] = self._newest(table)
        return self._open[table]

    def _newest(self, table: str) -> DeltaTable:
        from deltalake import DeltaTable

        if not self._has_log(table):
            there = self.tables()
            hint = suggest(table, there) if there else " Nothing is there yet: run a night first."
            raise TableNotFoundError(f"table '{table}' does not exist below {self.root}.{hint}")
        try:
            return DeltaTable(Path(self.root) / table)
        except Exception as error:  # deltalake has one for each way a log can be torn
            raise _damaged(table, error) from None


_Batches = Iterator["pa.RecordBatch"]


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _literal(value: object) -> str:
    r"""Return `value` in SQL.

    >>> _literal("O'Neill"), _literal(date(2010, 12, 9)), _literal(["a", "b"])
    ("'O''Neill'", "DATE '2010-12-09'", "('a', 'b')")
    """
    if isinstance(value, datetime):
        return f"TIMESTAMP '{value.astimezone(UTC).isoformat()}'"
    if isinstance(value, date):
        return f"DATE '{value.isoformat()}'"
    if isinstance(value, Collection) and not isinstance(value, str):
        return "(" + ", ".join(map(_literal, value)) + ")"
    return "'" + str(value).replace("'", "''") + "'"


def _plain(value: Any, is_map: bool) -> Any:
    """Return a value as Spark's rows hold it: a map as dict, in the order
    of its keys, a time without its zone, which is UTC.
    """
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None)
    return dict(sorted(value)) if is_map and value is not None else value


def _arrow_schema(table: DeltaTable) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([_arrow_field(field) for field in table.schema().fields])


def _arrow_field(field: Any) -> pa.Field:
    import pyarrow as pa

    return pa.field(field.name, _arrow_type(field.type))


def _arrow_type(kind: Any) -> pa.DataType:
    """Return a Delta type as Arrow's."""
    import pyarrow as pa

    if kind.type == "array":
        return pa.list_(_arrow_type(kind.element_type))
    if kind.type == "map":
        return pa.map_(_arrow_type(kind.key_type), _arrow_type(kind.value_type))
    if kind.type == "struct":
        return pa.struct([_arrow_field(field) for field in kind.fields])
    return {
        "string": pa.string(),
        "integer": pa.int32(),
        "long": pa.int64(),
        "float": pa.float32(),
        "double": pa.float64(),
        "boolean": pa.bool_(),
        "date": pa.date32(),
        "timestamp": pa.timestamp("us", "UTC"),
    }[kind.type]


def in_columns(
    batch: pa.RecordBatch, schema: pa.Schema, values: Mapping[str, Any] = MappingProxyType({})
) -> pa.RecordBatch:
    """Return `batch` in the columns and types of `schema`; `values` are those of the partition,
    which are in no file.
    """
    import pyarrow as pa

    arrays = []
    for field in schema:
        if field.name in values:
            arrays.append(pa.array([values[field.name]] * batch.num_rows, field.type))
        else:
            arrays.append(batch.column(field.name).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _of_night(batch: pa.RecordBatch, night: date) -> pa.RecordBatch:
    import pyarrow.compute as pc

    return batch.filter(pc.equal(batch.column("run_date"), night))


def _damaged(table: str, error: Exception, file: str = "") -> DamagedFileError:
    said = (str(error).splitlines() or [type(error).__name__])[0][:300]
    what = f"its file {file}" if file else "its log, or a file that the log lists,"
    return DamagedFileError(
        f"table '{table}': {what} cannot be read ({said}). Put the file back from a backup, or run the "
        "stage that writes the table again (docs/runbook.md)"
    )

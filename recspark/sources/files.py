"""The files of one input: where they lie, whether they are there, what their content is."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq

from recspark import storage
from recspark.config import Source
from recspark.errors import MissingLandingError, SourceError

HEAD_BYTES = 1 << 20
HASHED_BYTES = 1 << 30
DELTA_LOG = "_delta_log"


@dataclass(frozen=True)
class Place:
    """One input of a source: a file, or a folder with everything below it.

    Parameters
    ----------
    source : name of the source, for messages
    root : absolute URI of the file or folder
    entries : (name below `root`, bytes, stamp) of each file; hidden ones (`_x`, `.x`) left out, but
        for a Delta table: there the commits of its log
    """

    source: str
    root: str
    entries: tuple[tuple[str, int, str], ...]

    @property
    def is_file(self) -> bool:
        """Whether `root` is one file."""
        return len(self.entries) == 1 and not storage.exists(
            storage.join(self.root, self.entries[0][0])
        )

    @property
    def files(self) -> list[str]:
        """URIs of the files that are not empty, by name."""
        if self.is_file:
            return [self.root] if self.entries[0][1] else []
        return [storage.join(self.root, name) for name, size, _ in self.entries if size]

    @property
    def folder_columns(self) -> set[str]:
        """Columns that come from folder names: `country` of `country=UK/a.csv`."""
        folders = [part for name, _, _ in self.entries for part in name.split("/")[:-1]]
        return {part.split("=")[0] for part in folders if "=" in part}

    def content(self) -> list[tuple[str, int, str]]:
        """Return (name, bytes, SHA-256) of each file; what is remote or above 1 GB keeps its stamp.

        Cost: reads the local files once, on the driver, in blocks. A fresh clone gives the same.
        """
        if not storage.is_local(self.root):
            return list(self.entries)
        where = {name: storage.join(self.root, name) for name, _, _ in self.entries}
        if self.is_file:
            where = {self.entries[0][0]: self.root}
        return [
            (name, size, storage.sha256(where[name]) if size < HASHED_BYTES else stamp)
            for name, size, stamp in self.entries
        ]


def find_place(
    source: Source, path: str, run_date: date, only: Sequence[str] | None = None
) -> Place:
    """Return the files of `path` on the night `run_date`; `only` keeps the files so named, in that
    order.

    Raises MissingLandingError where nothing is at `path`; an empty folder or file is fine.
    """
    root = _absolute(path.replace("{run_date}", run_date.isoformat()))
    if not storage.exists(root):
        if source.archive:
            raise MissingLandingError(
                f"source '{source.name}': nothing is at {root}; "
                f"bring the data there, or point source.path (conf/sources/{source.name}.yaml) at it"
            )
        raise MissingLandingError(
            f"source '{source.name}': the landing of {run_date} is missing, nothing is at {root}; "
            "deliver it and run the night again. If that day really had no events, make an empty folder there"
        )
    found = {name: (name, size, stamp) for name, size, stamp in storage.fingerprint(root)}
    if only is not None:
        return Place(source.name, root, tuple(found[name] for name in only if name in found))
    shown = [entry for name, entry in found.items() if not _is_hidden(name)]
    if any(name.startswith(f"{DELTA_LOG}/") for name in found):
        shown = [
            entry
            for name, entry in found.items()
            if posixpath.dirname(name) == DELTA_LOG and name.endswith(".json")
        ]
    return Place(source.name, root, tuple(shown))


def csv_header(uri: str, options: Mapping[str, str]) -> list[str]:
    """Return the fields of the first line of a CSV file, `options` as Spark's; reads at most 1
    MB.
    """
    line = next(iter(head_lines(uri, options.get("encoding", "UTF-8"))), "")
    separator = options.get("sep", options.get("delimiter", ",")).replace("\\t", "\t")
    if len(separator) > 1:
        return line.split(separator)
    quote = options.get("quote", '"')
    if quote:
        rows = csv.reader([line], delimiter=separator, quotechar=quote)
    else:
        rows = csv.reader([line], delimiter=separator, quoting=csv.QUOTE_NONE)
    return next(iter(rows), [])


def head_lines(uri: str, encoding: str = "UTF-8") -> list[str]:
    """Return the lines in the first MB of a text file; a line cut at its end is left out.

    Raises SourceError where the file cannot be read (a torn gzip file).
    """
    try:
        with storage.open_read(uri, decompress=True) as stream:
            block: bytes = stream.read(HEAD_BYTES)
    except (OSError, EOFError) as error:
        raise SourceError(f"{uri} cannot be read: {error}; was it delivered in full?") from None
    lines = block.decode(encoding, errors="replace").removeprefix("\ufeff").splitlines()
    return lines[:-1] if len(block) == HEAD_BYTES and len(lines) > 1 else lines


def parquet_footer(uri: str) -> tuple[pa.Schema, int]:
    """Return schema and number of rows of a Parquet file.

    Raises SourceError where it is none, and where a time is in nanoseconds, which Spark cannot read.
    """
    try:
        with storage.open_read(uri) as stream:
            file = pq.ParquetFile(stream)
            columns = [file.schema.column(i) for i in range(len(file.schema.names))]
            footer = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise SourceError(
            f"{uri} is not a Parquet file, or not all of it: {str(error).splitlines()[0]}"
        ) from None
    nanos = [c.path for c in columns if "nanoseconds" in str(c.logical_type)]
    if nanos and footer[1]:  # a file without rows is never read
        raise SourceError(
            f"{uri}: column '{nanos[0]}' counts nanoseconds, which Spark does not read; nothing was "
            "written. Write it in microseconds (pandas: to_parquet(..., coerce_timestamps='us', "
            "allow_truncated_timestamps=True))"
        )
    return footer


def _absolute(path: str) -> str:
    root = storage.absolute(path)
    return posixpath.normpath(root) if storage.is_local(root) else root


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))

"""The files of one input: where they lie, whether they are there, what their content is."""

from __future__ import annotations

import bz2
import gzip
import posixpath
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recspark import storage
from recspark.config import Source
from recspark.errors import MissingLandingError, SourceError

HEAD_BYTES = 1 << 20
HASHED_BYTES = 1 << 30
BOM = b"\xef\xbb\xbf"
DELTA_LOG = "_delta_log"
# Of a Delta table's log; a checkpoint of the second form and a compacted log end in .json too.
_COMMIT = re.compile(r"_delta_log/(\d{20})[.]json")

# Compressions of text that Spark's readers and `head` both undo: how a name ends (Spark goes by
# nothing else), and the first bytes.
COMPRESSIONS = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh[1-9]"),
    ".deflate": re.compile(rb"[\x08\x18\x28\x38\x48\x58\x68\x78]"),
}
# Compressed or packed, and for Spark so many bytes of text, or readable with a native library only.
_OTHER_COMPRESSIONS = (
    ".xz", ".lzma", ".zip", ".7z", ".rar", ".zst", ".zstd", ".lz4", ".lzo", ".snappy", ".sz", ".br",
    ".z", ".gzip", ".bzip2", ".bz", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".xlsx", ".xls", ".ods",
)  # fmt: skip
_NO_TEXT = {
    "gzip": rb"\x1f\x8b\x08",
    "bzip2": rb"BZh[1-9]1AY&SY",
    "xz": rb"\xfd7zXZ\x00",
    "zip (also .xlsx)": rb"PK(?:\x03\x04|\x05\x06|\x07\x08)",
    "7z": rb"7z\xbc\xaf\x27\x1c",
    "rar": rb"Rar!\x1a\x07",
    "zstd": rb"\x28\xb5\x2f\xfd",
    "lz4": rb"\x04\x22\x4d\x18",
    "snappy": rb"\xff\x06\x00\x00sNaPpY",
    "lzma": rb"\x5d\x00\x00[\x00-\xff]{2}",
    "compress (.Z)": rb"\x1f\x9d",
    "tar": rb"[\x00-\xff]{257}ustar",
    "Parquet": rb"PAR1[\x00-\x1f]",
    "ORC": rb"ORC[\x00-\x1f]",
    "Avro": rb"Obj\x01",
}


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
        return len(self.entries) == 1 and storage.is_file(self.root)

    @property
    def files(self) -> list[str]:
        """URIs of the files that are not empty, by name."""
        if self.is_file:
            return [self.root] if self.entries[0][1] else []
        return [storage.join(self.root, name) for name, size, _ in self.entries if size]

    def name_of(self, uri: str) -> str:
        """Return the name below `root` of one of `files`; that of the file where `root` is one."""
        return posixpath.basename(uri) if uri == self.root else uri[len(self.root) :].lstrip("/")

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
        shown = [found[name] for name in only if name in found]
    elif any(name.startswith(f"{DELTA_LOG}/") for name in found):
        shown = [entry for name, entry in found.items() if _COMMIT.fullmatch(name)]
        if not shown:
            raise SourceError(
                f"source '{source.name}': {root}/{DELTA_LOG} has no commit (…00.json): the Delta table "
                "was not delivered in full; deliver it again"
            )
    else:
        shown = [entry for name, entry in found.items() if not _is_hidden(name)]
        for name in found:
            if f"/{DELTA_LOG}/" in name:
                table = storage.join(root, name.partition(f"/{DELTA_LOG}/")[0])
                raise SourceError(
                    f"source '{source.name}': {table} is a Delta table below the landing, whose files "
                    "may be of older versions; make its folder the landing, with source.format: delta"
                )
    place = Place(source.name, root, tuple(shown))
    if storage.is_local(root):
        for uri in (root,) if place.is_file else [storage.join(root, name) for name, *_ in shown]:
            if not storage.is_file(uri):
                raise SourceError(
                    f"source '{source.name}': {uri} is no file (a link that leads nowhere or to a "
                    "folder, or a pipe); deliver the file itself, or take it away"
                )
    return place


def delta_version(place: Place) -> int | None:
    """Return the newest version of a Delta table that the log at `place` has; None where it has
    none.
    """
    found = [_COMMIT.fullmatch(name) for name, _, _ in place.entries]
    return max((int(name[1]) for name in found if name), default=None)


def head(uri: str) -> bytes:
    """Return the first MB of the content of a text file.

    Raises SourceError where the file cannot be read (a torn gzip file), or is compressed or packed
    in a way that Spark does not undo, or other than its name says.
    """
    ending = _ending(uri)
    try:
        with storage.open_read(uri) as stream:
            start: bytes = stream.read(512)
            stream.seek(0)
            _check_form(uri, ending, start)
            content = _decompressed(stream, ending)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{uri} cannot be read: {error}; was it delivered in full?") from None
    if ending:
        _check_content(uri, content)
    return content


def head_lines(content: bytes, end: bytes | None = None) -> list[bytes]:
    r"""Return the lines of `content`, the head of a file; `end` is what ends a line, by default what
    does for Spark. Where the file has more, the last line is left out: it may be cut.

    >>> head_lines(b"a\r\nb\x0bc\rd")
    [b'a', b'b\x0bc', b'd']
    """
    text = content.removeprefix(BOM)
    lines = text.split(end) if end else re.split(rb"\r\n|\n|\r", text)
    return lines if len(content) < HEAD_BYTES else lines[:-1]


def _ending(uri: str) -> str:
    """Return how the name says that a text file is compressed, in lower case; "" where it does not.

    Raises SourceError for an ending that Spark does not know.
    """
    ending = posixpath.splitext(uri)[1].lower()
    if ending in COMPRESSIONS:
        return ending
    if ending in _OTHER_COMPRESSIONS:
        raise SourceError(
            f"{uri} is compressed or packed as '{ending}', which is not supported; nothing was "
            f"written. Deliver it plain, or as one of {', '.join(COMPRESSIONS)}"
        )
    return ""


def _check_form(uri: str, ending: str, start: bytes) -> None:
    if not ending:
        _check_content(uri, start)
    elif not COMPRESSIONS[ending].match(start):
        raise SourceError(
            f"{uri} is not what its name says: its content is not that of a {ending} file; nothing "
            "was written. Name it as what it is, or deliver it again"
        )


def _check_content(uri: str, start: bytes) -> None:
    for form, signature in _NO_TEXT.items():
        if re.match(signature, start, re.DOTALL):
            raise SourceError(
                f"{uri} is no text: it holds {form}; nothing was written. Deliver text, plain or as "
                f"one of {', '.join(COMPRESSIONS)} with that ending, or is source.format right?"
            )


def _decompressed(stream: Any, ending: str) -> bytes:
    if ending == ".gz":
        return gzip.GzipFile(fileobj=stream).read(HEAD_BYTES)
    if ending == ".bz2":
        return bz2.BZ2File(stream).read(HEAD_BYTES)
    if ending == ".deflate":
        return zlib.decompressobj().decompress(stream.read(HEAD_BYTES), HEAD_BYTES)
    content: bytes = stream.read(HEAD_BYTES)
    return content


def parquet_footer(uri: str) -> tuple[pa.Schema, int]:
    """Return schema and number of rows of a Parquet file.

    Raises SourceError where it is none, and where a time is in nanoseconds, which Spark cannot read.
    """
    try:
        with storage.open_read(uri) as stream:
            file = pq.ParquetFile(stream)
            columns = [file.schema.column(i) for i in range(len(file.schema.names))]
            footer = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(f"{uri} is not a Parquet file, or not all of it: {said[:300]}") from None
    for column in footer[0] if footer[1] else ():
        if pa.types.is_decimal256(column.type) or pa.types.is_time(column.type):
            raise SourceError(
                f"{uri}: column '{column.name}' is {column.type}, which Spark does not read; nothing "
                "was written. Write a decimal of at most 38 digits, a time of day as text"
            )
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

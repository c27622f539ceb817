"""The files of one input of a source: listing them, checking their form, hashing their content."""

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

HEAD_BYTES = 1 << 20  # how much of a file `head` reads
HASHED_BYTES = 1 << 30  # files of this size or more are not hashed
# The byte order mark with which some programs begin a UTF-8 file.
BOM = b"\xef\xbb\xbf"
DELTA_LOG = "_delta_log"
# The name of a commit in a Delta table's log. Checkpoints of version 2 and compacted logs end in
# .json as well, but they have longer names.
_DELTA_COMMIT = re.compile(r"_delta_log/(\d{20})[.]json")

# Compressions of text that both Spark's readers and `head` can undo: the ending of the file's name
# (Spark looks at nothing else) -> the first bytes of such a file.
COMPRESSIONS = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".bz2": re.compile(rb"BZh[1-9]"),
    ".deflate": re.compile(rb"[\x08\x18\x28\x38\x48\x58\x68\x78]"),
}
# Endings of other compressed or packed files. Spark would read their bytes as if they were text,
# or could read them only with a native library.
_UNSUPPORTED_ENDINGS = (
    ".xz", ".lzma", ".zip", ".7z", ".rar", ".zst", ".zstd", ".lz4", ".lzo", ".snappy", ".sz", ".br",
    ".z", ".gzip", ".bzip2", ".bz", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".xlsx", ".xls", ".ods",
)  # fmt: skip
# Form of a file that is no text -> a pattern of its first bytes.
_BINARY_SIGNATURES = {
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
class SourceInput:
    """One input of a source: a file, or a folder with everything below it.

    Parameters
    ----------
    source : name of the source, for messages
    root : absolute URI of the file or folder
    entries : (name below `root`, bytes, stamp) of each file, without hidden files (`_x`, `.x`). The
        stamp is an etag, checksum or modification time. For a Delta table, the entries are the
        commits of its log instead
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
        """URIs of the files that are not empty, in the order of `entries`."""
        if self.is_file:
            return [self.root] if self.entries[0][1] else []
        return [storage.join(self.root, name) for name, size, _ in self.entries if size]

    def name_of(self, uri: str) -> str:
        """Return the name of one of `files` below `root`; where `root` is a file, its own name."""
        return posixpath.basename(uri) if uri == self.root else uri[len(self.root) :].lstrip("/")

    @property
    def folder_columns(self) -> set[str]:
        """Names of the columns that Spark makes from folders: `country` of `country=UK/a.csv`."""
        folders = [folder for name, _, _ in self.entries for folder in name.split("/")[:-1]]
        return {folder.split("=")[0] for folder in folders if "=" in folder}

    def content(self) -> list[tuple[str, int, str]]:
        """Return (name, bytes, SHA-256) of each file.

        A remote file, and a file of 1 GB or more, keeps its stamp in place of the SHA-256. Smaller
        local files give the same result in a fresh clone, as their modification times play no part.
        Cost: reads these files once, on the driver, in blocks.
        """
        if not storage.is_local(self.root):
            return list(self.entries)
        uri_by_name = {name: storage.join(self.root, name) for name, _, _ in self.entries}
        if self.is_file:
            uri_by_name = {self.entries[0][0]: self.root}
        return [
            (name, size, storage.sha256(uri_by_name[name]) if size < HASHED_BYTES else stamp)
            for name, size, stamp in self.entries
        ]


def find_input(
    source: Source, path: str, run_date: date, only: Sequence[str] | None = None
) -> SourceInput:
    """Return the files at `path` on the night `run_date`.

    `path` may contain `{run_date}`. Where `only` names files, the result has just these files, in
    the order of `only`; a name that does not exist is left out.

    Raises MissingLandingError where nothing is at `path`. An empty folder or file is fine. Raises
    SourceError for a Delta table without a commit, for a Delta table in a folder below `path`, and
    for an entry that is no regular file (a broken link, a pipe).
    """
    root = _absolute_uri(path.replace("{run_date}", run_date.isoformat()))
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
    entry_by_name = {name: (name, size, stamp) for name, size, stamp in storage.fingerprint(root)}
    if only is not None:
        entries = [entry_by_name[name] for name in only if name in entry_by_name]
    elif any(name.startswith(f"{DELTA_LOG}/") for name in entry_by_name):
        entries = [entry for name, entry in entry_by_name.items() if _DELTA_COMMIT.fullmatch(name)]
        if not entries:
            raise SourceError(
                f"source '{source.name}': {root}/{DELTA_LOG} has no commit (…00.json): the Delta table "
                "was not delivered in full; deliver it again"
            )
    else:
        entries = [entry for name, entry in entry_by_name.items() if not _is_hidden(name)]
        for name in entry_by_name:
            if f"/{DELTA_LOG}/" in name:
                table_uri = storage.join(root, name.partition(f"/{DELTA_LOG}/")[0])
                raise SourceError(
                    f"source '{source.name}': {table_uri} is a Delta table below the landing, "
                    "whose files may be of older versions; make its folder the landing, with "
                    "source.format: delta"
                )
    source_input = SourceInput(source.name, root, tuple(entries))
    if storage.is_local(root):
        for uri in (
            (root,) if source_input.is_file else [storage.join(root, name) for name, *_ in entries]
        ):
            if not storage.is_file(uri):
                raise SourceError(
                    f"source '{source.name}': {uri} is no file (a link that leads nowhere or to a "
                    "folder, or a pipe); deliver the file itself, or take it away"
                )
    return source_input


def delta_version(source_input: SourceInput) -> int | None:
    """Return the newest version in the log of the Delta table at `source_input`; None where `source_input` has no
    Delta log.
    """
    matches = [_DELTA_COMMIT.fullmatch(name) for name, _, _ in source_input.entries]
    return max((int(match[1]) for match in matches if match), default=None)


def head(uri: str) -> bytes:
    """Return the first MB of the content of a text file, after decompression.

    Raises SourceError where the file cannot be read (a torn gzip file), is compressed or packed in
    a way that Spark cannot undo, or is compressed in another way than its name says.
    """
    ending = _compression_ending(uri)
    try:
        with storage.open_read(uri) as stream:
            first_bytes: bytes = stream.read(512)
            stream.seek(0)
            _check_first_bytes(uri, ending, first_bytes)
            content = _decompressed(stream, ending)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{uri} cannot be read: {error}; was it delivered in full?") from None
    if ending:
        _check_is_text(uri, content)
    return content


def head_lines(content: bytes, line_end: bytes | None = None) -> list[bytes]:
    r"""Return the lines of `content`, the first MB of a file.

    Lines end with the bytes `line_end`; by default they end as for Spark, with `\n`, `\r\n` or
    `\r`. Where `content` is a full MB, the file may go on after it, and the last line may be cut.
    Therefore the last line is left out then.

    >>> head_lines(b"a\r\nb\x0bc\rd")
    [b'a', b'b\x0bc', b'd']
    """
    text = content.removeprefix(BOM)
    lines = text.split(line_end) if line_end else re.split(rb"\r\n|\n|\r", text)
    return lines if len(content) < HEAD_BYTES else lines[:-1]


def _compression_ending(uri: str) -> str:
    """Return the ending in the file's name that stands for a compression, in lower case; "" where
    the name has none.

    Raises SourceError for the ending of a compression or package that Spark does not support.
    """
    ending = posixpath.splitext(uri)[1].lower()
    if ending in COMPRESSIONS:
        return ending
    if ending in _UNSUPPORTED_ENDINGS:
        raise SourceError(
            f"{uri} is compressed or packed as '{ending}', which is not supported; nothing was "
            f"written. Deliver it plain, or as one of {', '.join(COMPRESSIONS)}"
        )
    return ""


def _check_first_bytes(uri: str, ending: str, first_bytes: bytes) -> None:
    if not ending:
        _check_is_text(uri, first_bytes)
    elif not COMPRESSIONS[ending].match(first_bytes):
        raise SourceError(
            f"{uri} is not what its name says: its content is not that of a {ending} file; nothing "
            "was written. Name it as what it is, or deliver it again"
        )


def _check_is_text(uri: str, first_bytes: bytes) -> None:
    for file_form, signature in _BINARY_SIGNATURES.items():
        if re.match(signature, first_bytes, re.DOTALL):
            raise SourceError(
                f"{uri} is no text: it holds {file_form}; nothing was written. Deliver text, plain "
                f"or as one of {', '.join(COMPRESSIONS)} with that ending, or is source.format "
                "right?"
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
    """Return the schema and the number of rows of a Parquet file.

    Raises SourceError where the file is not a complete Parquet file. Where the file has rows, also
    raises SourceError for types that Spark cannot read: times in nanoseconds, a time of day, and
    decimals of more than 38 digits.
    """
    try:
        with storage.open_read(uri) as stream:
            file = pq.ParquetFile(stream)
            parquet_columns = [file.schema.column(i) for i in range(len(file.schema.names))]
            footer = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise SourceError(
            f"{uri} is not a Parquet file, or not all of it: {message[:300]}"
        ) from None
    for column in footer[0] if footer[1] else ():
        if pa.types.is_decimal256(column.type) or pa.types.is_time(column.type):
            raise SourceError(
                f"{uri}: column '{column.name}' is {column.type}, which Spark does not read; nothing "
                "was written. Write a decimal of at most 38 digits, a time of day as text"
            )
    nanosecond_columns = [
        parquet_column.path
        for parquet_column in parquet_columns
        if "nanoseconds" in str(parquet_column.logical_type)
    ]
    if nanosecond_columns and footer[1]:  # a file without rows is not read later
        raise SourceError(
            f"{uri}: column '{nanosecond_columns[0]}' counts nanoseconds, which Spark does not "
            "read; nothing was written. Write it in microseconds (pandas: to_parquet(..., "
            "coerce_timestamps='us', allow_truncated_timestamps=True))"
        )
    return footer


# A local path also loses its `..` and double slashes.
def _absolute_uri(path: str) -> str:
    root = storage.absolute(path)
    return posixpath.normpath(root) if storage.is_local(root) else root


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))

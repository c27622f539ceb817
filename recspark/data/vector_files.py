"""Vectors of words or items from a file: word2vec's text and binary formats, and `.npy`.

A file is read strictly, because one byte too few moves every number behind it, and the vectors are
then wrong without looking wrong. Whatever does not fit is a ModelError that names the file, the line
or the byte, and what to do.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recspark import storage
from recspark.data.blocks import Array
from recspark.errors import ModelError, shortened

Format = Literal["text", "binary", "npy"]
FORMATS: tuple[Format, ...] = get_args(Format)

_GZIP = b"\x1f\x8b"
_LINES_AT_ONCE = 4096  # lines of numbers that one call parses
_READ_BYTES = 16 << 20  # bytes of a binary file that are read at once
_MOST_TOKEN_BYTES = 4096  # a longer token means that the file is not what it is read as
_MOST_HEADER_BYTES = 100
_AGAIN = "copy or download the file again, and set the setting sha256 to its new checksum"


@dataclass(frozen=True)
class VectorFile:
    """The content of a file of vectors.

    `tokens` strings (n,), each once, in the order of the file; `vectors` float32 (n, size), finite.
    """

    tokens: pa.StringArray
    vectors: Array

    def numbers_of(self, words: pa.Array) -> Array:
        """Return the row of each word, int32, or -1 for a word that the file does not have."""
        rows = pc.index_in(words, value_set=self.tokens).fill_null(-1)
        return np.asarray(rows.to_numpy(zero_copy_only=False), np.int32)


def read_vectors(
    uri: str, sha256: str, kind: Format, index: str = "", index_sha256: str = ""
) -> VectorFile:
    """Return the vectors of a file.

    Parameters
    ----------
    uri : the file; a text or binary file may be compressed by gzip, whatever it is called
    sha256 : the checksum of the file as it lies there, compressed or not
    kind : text = a line with the number of vectors and their size, then a line for each vector: the
        token, and the numbers, with spaces between; binary = the same line, then the token, a space
        and float32 numbers (little-endian), with or without a line end behind; npy = an array of
        numpy, (n, size), of float16, float32 or float64
    index, index_sha256 : with npy, the text file with the token of each row, a line each

    Raises ModelError where a file is missing, has another checksum, is cut off, or has more or fewer
    vectors than it says, rows of unequal length, a token twice, no token, a number that is NaN or
    infinite, or another type of numbers. Cost: the file is read twice. Memory: the vectors, and the
    tokens; a local `.npy` of float32 is mapped, so that the workers of a machine share its pages.
    """
    uri = storage.absolute(uri)
    _check_sum(uri, sha256)
    if kind == "npy":
        index = storage.absolute(index)
        _check_sum(index, index_sha256)
        vectors = _read_npy(uri)
        tokens = _read_index(index, uri, len(vectors))
    else:
        try:
            with _opened(uri) as stream:
                read = _read_text if kind == "text" else _read_binary
                tokens, vectors = read(stream, uri)
        except (OSError, EOFError, zlib.error) as error:
            raise ModelError(f"{uri}: cannot be read to its end ({error}); {_AGAIN}") from None
    _check_finite(vectors, tokens, uri)
    return VectorFile(_distinct(tokens, index if kind == "npy" else uri, kind), vectors)


def _check_sum(uri: str, sha256: str) -> None:
    try:
        actual = storage.sha256(uri)
    except OSError as error:
        raise ModelError(f"{uri} cannot be read: {error}") from None
    if actual != sha256:
        raise ModelError(
            f"{uri}: SHA-256 {actual}, the settings say {sha256 or 'none'}; put the right file there, "
            "or its checksum into the settings"
        )


@contextmanager
def _opened(uri: str) -> Iterator[IO[bytes]]:
    with storage.open_read(uri) as stream:
        is_compressed = stream.read(2) == _GZIP
        stream.seek(0)
        yield io.BufferedReader(gzip.GzipFile(fileobj=stream) if is_compressed else stream, 1 << 20)


# --- text ----------------------------------------------------------------------------------------


def _read_text(stream: IO[bytes], uri: str) -> tuple[list[bytes], Array]:
    n, size, _ = _header(stream, uri)
    tokens: list[bytes] = []
    blocks: list[Array] = []
    while batch := list(islice(stream, _LINES_AT_ONCE)):
        first = 2 + len(tokens)
        if len(tokens) + len(batch) > n:
            raise ModelError(
                f"{uri}: line 1 says {n:,} vectors, and line {n + 2:,} has one more; correct line 1, or "
                f"{_AGAIN}"
            )
        parts = [line.rstrip(b"\r\n ").partition(b" ") for line in batch]
        tokens += [token for token, _, _ in parts]
        blocks.append(_numbers([rest for _, _, rest in parts], size, uri, first))
    if len(tokens) < n:
        raise ModelError(
            f"{uri}: line 1 says {n:,} vectors, and the file ends after {len(tokens):,}, at line "
            f"{len(tokens) + 1:,}; {_AGAIN}"
        )
    return tokens, np.concatenate(blocks)


def _header(stream: IO[bytes], uri: str) -> tuple[int, int, int]:
    """Return the number of vectors, their size, and the number of bytes of the first line."""
    line = stream.readline(_MOST_HEADER_BYTES)
    fields = line.split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields) or not line.endswith(b"\n"):
        shown = line[:40].decode(errors="replace").rstrip()
        raise ModelError(
            f"{uri}: line 1 is '{shown}', expected two whole numbers: how many vectors there are, and "
            "the size of a vector. Is the setting format right? A file of GloVe lacks this line: put it "
            "before the first one"
        )
    n, size = (int(field) for field in fields)
    if n < 1 or size < 1:
        raise ModelError(
            f"{uri}: line 1 says {n} vectors of {size} numbers; there is nothing to read"
        )
    return n, size, len(line)


def _numbers(texts: Sequence[bytes], size: int, uri: str, first_line: int) -> Array:
    """Return the numbers of some lines, float32 (n, size); the first one is line `first_line`."""
    block = np.zeros((0, 0))
    with suppress(ValueError):
        if all(texts):  # an empty line would be left out
            strings = [text.decode("latin-1") for text in texts]
            block = np.loadtxt(strings, np.float64, comments=None, ndmin=2)
    if block.shape != (len(texts), size):
        for line, text in enumerate(texts, first_line):
            _check_line(text, size, f"{uri}: line {line:,}")
        raise ModelError(f"{uri}: the lines from {first_line:,} on are not numbers; {_AGAIN}")
    with np.errstate(over="ignore"):  # what is infinite as a float32 is named later
        return block.astype(np.float32)


def _check_line(text: bytes, size: int, where: str) -> None:
    fields = text.split()
    if len(fields) != size:
        raise ModelError(
            f"{where} has {len(fields)} numbers behind the token, line 1 says {size}. A token may have "
            f"no space in it; else {_AGAIN}"
        )
    for field in fields:
        try:
            float(field)
        except ValueError:
            shown = field[:40].decode(errors="replace")
            raise ModelError(f"{where}: '{shown}' is no number; {_AGAIN}") from None


# --- binary --------------------------------------------------------------------------------------


def _read_binary(stream: IO[bytes], uri: str) -> tuple[list[bytes], Array]:
    n, size, n_header_bytes = _header(stream, uri)
    source = _Buffer(stream, n_header_bytes)
    n_bytes = 4 * size
    tokens: list[bytes] = []
    blocks: list[Array] = []
    block = np.empty((min(n, max(1, _READ_BYTES // n_bytes)), size), np.float32)
    n_in_block = 0
    for number in range(n):
        where = f"{uri}: vector {number + 1:,} of {n:,} at byte {source.offset:,}"
        token = source.until_space(_MOST_TOKEN_BYTES)
        if token is None:
            raise ModelError(
                f"{where}: there is no token with a space behind it; the file is cut off, or it is not "
                f"in word2vec's binary format. Look at the setting format, or {_AGAIN}"
            )
        numbers = source.take(n_bytes)
        if numbers is None:
            raise ModelError(
                f"{where}: the file ends before its {size} numbers of 4 bytes; {_AGAIN}"
            )
        if n_in_block == len(block):
            blocks.append(block)
            block, n_in_block = np.empty_like(block), 0
        block[n_in_block] = np.frombuffer(numbers, "<f4")
        n_in_block += 1
        tokens.append(token)
        source.skip_line_end()
    blocks.append(block[:n_in_block])
    if source.rest():
        raise ModelError(
            f"{uri}: line 1 says {n:,} vectors, and there is more behind the last one, at byte "
            f"{source.offset:,}; correct line 1, look at the setting format, or {_AGAIN}"
        )
    return tokens, np.concatenate(blocks)


class _Buffer:
    """The bytes of a stream, taken from its front; `offset` is where in the file the next one is."""

    def __init__(self, stream: IO[bytes], offset: int) -> None:
        self._stream = stream
        self._bytes = b""
        self._begin = 0
        self.offset = offset

    def until_space(self, most: int) -> bytes | None:
        """Take the bytes before the next space, and the space; None where there is none."""
        end = self._bytes.find(b" ", self._begin, self._begin + most)
        if end < 0 and len(self._bytes) - self._begin < most:
            self._fill(most)
            end = self._bytes.find(b" ", self._begin, self._begin + most)
        if end < 0:
            return None
        token = self._bytes[self._begin : end]
        self._advance(end + 1 - self._begin)
        return token

    def take(self, n: int) -> bytes | None:
        """Take n bytes; None where there are fewer."""
        self._fill(n)
        if len(self._bytes) - self._begin < n:
            return None
        taken = self._bytes[self._begin : self._begin + n]
        self._advance(n)
        return taken

    def skip_line_end(self) -> None:
        """Take a line end, if the next byte is one."""
        self._fill(1)
        if self._bytes[self._begin : self._begin + 1] == b"\n":
            self._advance(1)

    def rest(self) -> bytes:
        """Return what is left of the first bytes behind; it is not taken."""
        self._fill(_MOST_HEADER_BYTES)
        return self._bytes[self._begin :]

    def _fill(self, n: int) -> None:
        while len(self._bytes) - self._begin < n:
            more = self._stream.read(max(_READ_BYTES, n))
            if not more:
                return
            self._bytes, self._begin = self._bytes[self._begin :] + more, 0

    def _advance(self, n: int) -> None:
        self._begin += n
        self.offset += n


# --- npy -----------------------------------------------------------------------------------------


def _read_npy(uri: str) -> Array:
    try:
        array: Array = storage.read_array(uri, mmap=True)
    except (ValueError, EOFError, OSError) as error:
        first_line = str(error).split("\n", 1)[0]
        raise ModelError(f"{uri}: no array that numpy reads: {first_line}; {_AGAIN}") from None
    if array.ndim != 2 or 0 in array.shape:
        raise ModelError(
            f"{uri}: an array of the shape {array.shape}, expected (number of vectors, size)"
        )
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ModelError(
            f"{uri}: numbers of the type {array.dtype}, expected float16, float32 or float64; convert "
            "them with numpy's astype"
        )
    if array.dtype == np.float32:
        return array
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _read_index(uri: str, array_uri: str, n: int) -> list[bytes]:
    data = storage.read_bytes(uri)
    if data[:2] == _GZIP:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ModelError(f"{uri}: cannot be read to its end ({error}); {_AGAIN}") from None
    tokens = [line.rstrip(b"\r") for line in data.removesuffix(b"\n").split(b"\n")]
    if len(tokens) != n:
        which = (
            f"row {len(tokens) + 1:,} has no line"
            if len(tokens) < n
            else f"line {n + 1:,} has no row"
        )
        raise ModelError(
            f"{uri}: {len(tokens):,} lines for the {n:,} rows of {array_uri}: {which}. Line i is the "
            "token of row i; write the index anew"
        )
    return tokens


# --- what holds for all formats --------------------------------------------------------------------


def _check_finite(vectors: Array, tokens: Sequence[bytes], uri: str) -> None:
    for begin in range(0, len(vectors), _LINES_AT_ONCE):
        is_finite = np.isfinite(vectors[begin : begin + _LINES_AT_ONCE]).all(axis=1)
        if not is_finite.all():
            row = begin + int(np.argmin(is_finite))
            token = tokens[row][:40].decode(errors="replace")
            raise ModelError(
                f"{uri}: vector {row + 1:,} ('{token}') has a number that is NaN or infinite as a "
                "float32; leave the vector out, and correct the number of vectors"
            )


def _distinct(tokens: Sequence[bytes], uri: str, kind: Format) -> pa.StringArray:
    """Return the tokens as strings. Raises ModelError where one is empty, twice, or not UTF-8."""

    def line(row: int) -> str:
        return f"vector {row + 1:,}" if kind == "binary" else f"line {row + (kind == 'text') + 1:,}"

    for row, token in _not_strings(tokens):
        what = "has no token" if not token else "has a token that is not UTF-8"
        raise ModelError(
            f"{uri}: {line(row)} {what}; write the file anew in UTF-8, without that row"
        )
    strings = pa.array([token.decode() for token in tokens], pa.string())
    if len(pc.unique(strings)) < len(strings):
        first_of: dict[bytes, int] = {}
        for row, token in enumerate(tokens):
            first = first_of.setdefault(token, row)
            if first != row:
                raise ModelError(
                    f"{uri}: {line(row)} has the token '{shortened([token.decode()])}' of {line(first)} "
                    "again; leave one of the two vectors out"
                )
    return strings


def _not_strings(tokens: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    for row, token in enumerate(tokens):
        try:
            token.decode()
        except UnicodeDecodeError:
            yield row, token
        else:
            if not token:
                yield row, token


def folder_sha256(folder: str) -> str:
    r"""Return one SHA-256 for all files below a folder: of a line `checksum  name` for each, sorted.

    It is that of `cd FOLDER && find . -type f | LC_ALL=C sort | cut -c3- | xargs -d '\n' sha256sum |
    sha256sum`.
    """
    root = storage.absolute(folder).rstrip("/")
    lines: list[Any] = [
        f"{storage.sha256(uri)}  {uri.removeprefix(root).lstrip('/')}\n"
        for uri in storage.list_files(root)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()

"""Files of vectors: the same vectors from every format, and errors that say where a file is wrong."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recspark.data import vector_files
from recspark.data.vector_files import Format, VectorFile, folder_sha256, read_vectors
from recspark.errors import ModelError

TOKENS = ["the", "mug", "茶", "3.5cm"]
VECTORS = np.array([[0.5, -1, 2], [1e-7, 3, 0], [7, 8, 9], [-0.25, 0, 1]], np.float32)


def text(tokens: list[str] = TOKENS, vectors: Any = VECTORS, end: str = "\n") -> bytes:
    lines = [f"{len(tokens)} {len(vectors[0])}"]
    lines += [f"{t} {' '.join(map(str, v))}" for t, v in zip(tokens, vectors, strict=True)]
    return (end.join(lines) + end).encode()


def binary(end: bytes = b"\n") -> bytes:
    rows = [t.encode() + b" " + v.tobytes() + end for t, v in zip(TOKENS, VECTORS, strict=True)]
    return b"4 3\n" + b"".join(rows)


def saved(path: Path, data: bytes) -> tuple[str, str]:
    path.write_bytes(data)
    return str(path), hashlib.sha256(data).hexdigest()


def read(path: Path, data: bytes, kind: Format) -> VectorFile:
    return read_vectors(*saved(path, data), kind)


def npy(folder: Path, array: Any, tokens: bytes) -> VectorFile:
    folder = folder / str(len([*folder.iterdir()]))  # the array of an earlier call is mapped
    folder.mkdir()
    np.save(folder / "v.npy", array)
    array_file = saved(folder / "v.npy", (folder / "v.npy").read_bytes())
    return read_vectors(*array_file, "npy", *saved(folder / "index.txt", tokens))


@pytest.mark.parametrize("block", [4096, 3])
def test_all_formats_give_the_same_vectors(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks too: of 3 lines, and of 12 bytes, which is one vector."""
    monkeypatch.setattr(vector_files, "_LINES_AT_ONCE", block)
    monkeypatch.setattr(vector_files, "_READ_BYTES", 16 << 20 if block > 3 else 12)
    index = "\n".join(TOKENS).encode()
    spaced = text().replace(b"\n", b" \n")  # as word2vec itself writes it
    files = {
        "text": read(tmp_path / "a.txt", text(), "text"),
        "spaced": read(tmp_path / "s.txt", spaced, "text"),
        "windows": read(tmp_path / "w.txt", text(end="\r\n"), "text"),
        "text, gzip": read(tmp_path / "a.bin", gzip.compress(text()), "text"),
        "binary": read(tmp_path / "b.bin", binary(), "binary"),
        "binary, no line ends": read(tmp_path / "c.bin", binary(b""), "binary"),
        "binary, gzip": read(tmp_path / "d.gz", gzip.compress(binary()), "binary"),
        "npy": npy(tmp_path, VECTORS, index + b"\n"),
        "npy, no last line end": npy(tmp_path, VECTORS, index),
        "npy, float64, gzip": npy(tmp_path, VECTORS.astype(np.float64), gzip.compress(index)),
        "npy, by columns": npy(tmp_path, np.asfortranarray(VECTORS), index),
    }
    for name, file in files.items():
        assert file.tokens.to_pylist() == TOKENS, name
        assert file.vectors.dtype == np.float32, name
        np.testing.assert_array_equal(file.vectors, VECTORS, err_msg=name)
    rows = files["text"].numbers_of(pa.array(["茶", "none", "the", None]))
    assert rows.tolist() == [2, -1, 0, -1]


def with_line(number: int, line: str) -> bytes:
    lines = text().decode().split("\n")
    lines[number - 1] = line
    return "\n".join(lines).encode()


START_OF_THIRD = len(b"4 3\n") + len(b"the ") + 12 + 1 + len(b"mug ") + 12 + 1
NAN = VECTORS.copy()
NAN[2, 1] = np.nan
BROKEN: dict[str, tuple[Format, bytes, str]] = {
    "no header": (
        "text",
        text().split(b"\n", 1)[1],
        r"line 1 is 'the 0.5 -1.0 2.0', expected two whole numbers.*A file of GloVe lacks this line",
    ),
    "empty": ("text", b"", "line 1 is '', expected two whole numbers"),
    "nothing": ("text", b"0 3\n", "line 1 says 0 vectors of 3 numbers"),
    "binary as text": ("text", binary(), r"line 2 has \d+ numbers|line 2: .* is no number"),
    "too few": (
        "text",
        with_line(1, "5 3"),
        r"says 5 vectors, and the file ends after 4, at line 5",
    ),
    "too many": ("text", with_line(1, "3 3"), "says 3 vectors, and line 5 has one more"),
    "cut off": ("text", text()[:-5], "line 5 has 2 numbers behind the token, line 1 says 3"),
    "ragged": (
        "text",
        with_line(3, "mug 1 2"),
        "line 3 has 2 numbers behind the token, line 1 says 3",
    ),
    "all too long": ("text", with_line(1, "4 2"), "line 2 has 3 numbers behind the token"),
    "a space": ("text", with_line(4, "New York 1 2 3"), "line 4 has 4 numbers.*no space in it"),
    "no number": ("text", with_line(5, "3.5cm 1 2,5 3"), "line 5: '2,5' is no number"),
    "empty line": ("text", with_line(3, ""), "line 3 has 0 numbers"),
    "no token": ("text", with_line(3, " 1 2 3"), "line 3 has no token"),
    "twice": ("text", with_line(5, "mug 1 2 3"), "line 5 has the token 'mug' of line 3 again"),
    "not UTF-8": (
        "text",
        text().replace("茶".encode(), b"\xff"),
        "line 4 has a token that is not UTF-8",
    ),
    "NaN": ("text", text(vectors=NAN), r"vector 3 \('茶'\) has a number that is NaN or infinite"),
    "too large": ("text", with_line(3, "mug 1 1e39 3"), r"vector 2 \('mug'\) has a number"),
    "half a gzip": ("text", gzip.compress(text())[:-9], "cannot be read to its end"),
    "bad gzip": ("text", gzip.compress(text())[:15] + b"xxxxx", "cannot be read to its end"),
    "text as binary": (
        "binary",
        text(),
        "there is more behind the last one.*look at the setting format",
    ),
    "binary, cut off": (
        "binary",
        binary()[: START_OF_THIRD + 9],
        f"vector 3 of 4 at byte {START_OF_THIRD}: the file ends before its 3 numbers of 4 bytes",
    ),
    "binary, cut off in a token": (
        "binary",
        binary()[: START_OF_THIRD + 2],
        f"vector 3 of 4 at byte {START_OF_THIRD}: there is no token",
    ),
    "binary, too many": (
        "binary",
        binary().replace(b"4 3\n", b"3 3\n"),
        f"says 3 vectors, and there is more behind the last one, at byte {START_OF_THIRD + 17}",
    ),
    "binary, too few": ("binary", binary().replace(b"4 3\n", b"5 3\n"), "vector 5 of 5 at byte"),
    "binary, other size": (
        "binary",
        binary().replace(b"4 3\n", b"4 2\n"),
        "there is more behind the last one",
    ),
    "binary, twice": (
        "binary",
        binary().replace(b"3.5cm", b"mug"),
        "vector 4 has the token 'mug' of vector 2 again",
    ),
    "binary, infinite": (
        "binary",
        binary().replace(np.float32(9).tobytes(), np.float32(np.inf).tobytes()),
        r"vector 3 \('茶'\) has a number",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_says_where(name: str, tmp_path: Path) -> None:
    kind, data, message = BROKEN[name]
    with pytest.raises(ModelError, match=message) as raised:
        read(tmp_path / "broken.vec", data, kind)
    assert str(tmp_path / "broken.vec") in str(raised.value)


INDEX = "\n".join(TOKENS).encode()
BROKEN_ARRAYS: dict[str, tuple[Callable[[Path], VectorFile], str]] = {
    "integers": (
        lambda p: npy(p, np.ones((4, 3), np.int64), INDEX),
        "v.npy: numbers of the type int64, expected float16, float32 or float64",
    ),
    "one row": (lambda p: npy(p, VECTORS[0], INDEX), r"v.npy: an array of the shape \(3,\)"),
    "nothing": (lambda p: npy(p, VECTORS[:0], INDEX), r"v.npy: an array of the shape \(0, 3\)"),
    "objects": (
        lambda p: npy(p, np.array([[None]]), INDEX),
        "v.npy: no array that numpy reads: Array can't be memory-mapped: Python objects",
    ),
    "index too short": (
        lambda p: npy(p, VECTORS, b"the\nmug\n"),
        "index.txt: 2 lines for the 4 rows of .*v.npy: row 3 has no line",
    ),
    "index too long": (
        lambda p: npy(p, VECTORS, INDEX + b"\nmore\nand more"),
        "index.txt: 6 lines for the 4 rows of .*: line 5 has no row",
    ),
    "twice": (
        lambda p: npy(p, VECTORS, b"a\nb\nc\nb"),
        "index.txt: line 4 has the token 'b' of line 2 again",
    ),
    "empty token": (lambda p: npy(p, VECTORS, b"a\n\nc\nd"), "index.txt: line 2 has no token"),
    "NaN": (lambda p: npy(p, NAN, INDEX), r"v.npy: vector 3 \('茶'\) has a number that is NaN"),
    "too large": (
        lambda p: npy(p, np.full((4, 3), 1e39), INDEX),
        r"v.npy: vector 1 \('the'\) has a number",
    ),
    "no index": (
        lambda p: read_vectors(*saved(p / "v.npy", b"x"), "npy", str(p / "none.txt"), "0" * 64),
        "none.txt cannot be read",
    ),
    "no array": (
        lambda p: read_vectors(*saved(p / "v.npy", b"x"), "npy", *saved(p / "i", INDEX)),
        "v.npy: no array that numpy reads",
    ),
}


@pytest.mark.parametrize("name", BROKEN_ARRAYS)
def test_a_broken_array_says_where(name: str, tmp_path: Path) -> None:
    make, message = BROKEN_ARRAYS[name]
    with pytest.raises(ModelError, match=message):
        make(tmp_path)


def test_half_an_array_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", VECTORS)
    half = saved(tmp_path / "v.npy", (tmp_path / "whole.npy").read_bytes()[:-5])
    with pytest.raises(ModelError, match=r"v.npy: no array that numpy reads"):
        read_vectors(*half, "npy", *saved(tmp_path / "i", INDEX))


def test_another_file_is_refused(tmp_path: Path) -> None:
    path, actual = saved(tmp_path / "a.txt", text())
    with pytest.raises(ModelError, match=f"SHA-256 {actual}, the settings say {'0' * 64}"):
        read_vectors(path, "0" * 64, "text")
    with pytest.raises(ModelError, match="none.txt cannot be read"):
        read_vectors(str(tmp_path / "none.txt"), actual, "text")


def test_the_checksum_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.json").write_bytes(b"{}")
    (tmp_path / "sub" / "a.bin").write_bytes(b"1")
    sums = [hashlib.sha256(data).hexdigest() for data in (b"{}", b"1")]
    lines = f"{sums[0]}  b.json\n{sums[1]}  sub/a.bin\n"
    assert folder_sha256(str(tmp_path)) == hashlib.sha256(lines.encode()).hexdigest()

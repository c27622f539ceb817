"""What befalls a file: every way of damaging one that the tests of saved state go through."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

REMOVED = None
_GARBAGE = (
    b"null", b"[]", b"{}", b"0", b"[" * 100_000, b"\xff\xfe\x00", b"PK\x03\x04" + bytes(40),
    b"\x93NUMPY\x01\x00\xff\xff" + bytes(300),
)  # fmt: skip


def damages(file: Path, others: list[Path]) -> Iterator[tuple[str, bytes | None]]:
    """Give a name and the content, None = no file, of each damage of `file`, whose folder has
    `others`.
    """
    whole = file.read_bytes()
    yield "removed", REMOVED
    for length in {0, 1, len(whole) // 2, max(len(whole) - 1, 0)} - {len(whole)}:
        yield f"cut after {length} bytes", whole[:length]
    if any(whole):
        yield "zeros", bytes(len(whole))
        yield "zeros at its end", whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
    yield "a byte more", whole + b"\0"
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        yield f"byte {place} changed", bytes(changed)
    for garbage in _GARBAGE:
        yield f"garbage {garbage[:9]!r}", garbage
    for other in others:
        if other.read_bytes() != whole:
            yield f"swapped with {other.name}", other.read_bytes()
    if file.suffix == ".npy":
        array = np.load(file)
        for what, changed_array in {
            "zeroed": np.zeros_like(array),
            "of one element": array.reshape(-1)[:1],
            "flat": array.reshape(1, -1),
            "of another type": array.astype(np.float16),
        }.items():
            stream = io.BytesIO()
            np.save(stream, changed_array)
            yield f"an array {what}", stream.getvalue()


def put(file: Path, content: bytes | None) -> None:
    """Let `content` be in `file`; None removes it."""
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)

"""The only module that opens files. Every location is a URI, whatever kind of store it is in.

A path without a scheme is local. Other schemes go through fsspec (`s3`, `gs`, `abfs`, `memory` in
tests). No function relies on an atomic rename. Instead, a folder counts as complete when its marker
file exists, and the marker is written last.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import uuid
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import numpy.typing as npt

from recspark.errors import ArtifactError, SetupError, SourceError

COMPLETE = "_complete"  # the name of the marker file of a complete folder
_SEAL = "sha256"  # the key in a sealed JSON file with the checksum of all other keys
_CHANGED_MESSAGE = "its bytes are not those that were written"
# Characters that have a meaning in the path patterns of Spark's readers.
_PATTERN_CHARACTERS = re.compile(r"[\\*?\[\]{}]")


def join(base: str, *parts: str) -> str:
    """Return the URI of `parts` below `base`.

    >>> join("s3://bucket/root/", "a", "b")
    's3://bucket/root/a/b'
    """
    return "/".join([base.rstrip("/"), *[part.strip("/") for part in parts]])


def is_local(uri: str) -> bool:
    """Return whether `uri` is on a file system of this machine.

    >>> is_local("build/x"), is_local("file:///x"), is_local("s3://b/x")
    (True, True, False)
    """
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """Return `uri`, where a local path is made absolute, as Spark executors need it."""
    if not is_local(uri):
        return uri
    return str(Path(uri.removeprefix("file://")).absolute())


def for_spark(uri: str) -> str:
    r"""Return `uri` with the characters escaped that Spark's readers would take for a pattern.

    Needed for the formats `csv`, `text`, `parquet`, …. Delta takes a path literally. Raises
    SourceError for a name that Spark cannot read: one that is not UTF-8, or a local one with a ':'.

    >>> for_spark("/landing/x[1].csv"), for_spark("/landing/{a,b}/*.csv")
    ('/landing/x\\[1\\].csv', '/landing/\\{a,b\\}/\\*.csv')
    """
    name = uri.rsplit("/", 1)[1] if "/" in uri else uri
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise SourceError(
            f"{uri.encode(errors='backslashreplace').decode()}: the name is not UTF-8, and Spark cannot "
            "read the file; rename it and run the night again"
        ) from None
    if is_local(uri) and ":" in name:
        raise SourceError(
            f"{uri}: Spark cannot read a file of a local disk whose name has a ':'; "
            "rename it and run the night again"
        )
    return _PATTERN_CHARACTERS.sub(lambda character: "\\" + character[0], uri)


def is_file(uri: str) -> bool:
    """Return whether `uri` is a file, or a link to a file."""
    fs, path = _open_fs(uri)
    return bool(fs.isfile(path))


def exists(uri: str) -> bool:
    """Return whether `uri` is a file or folder that exists."""
    fs, path = _open_fs(uri)
    return bool(fs.exists(path))


def size(uri: str) -> int | None:
    """Return the number of bytes of one file; None where the file does not exist."""
    fs, path = _open_fs(uri)
    try:
        return int(fs.info(path)["size"])
    except FileNotFoundError:
        return None


def folders(uri: str) -> list[str]:
    """Return the folders directly below `uri`, sorted by name; [] where `uri` is no folder. The
    URIs have the form of `uri` (relative, `file://`, …).
    """
    fs, path = _open_fs(uri)
    if not fs.isdir(path):
        return []
    folder_paths = sorted(
        entry["name"] for entry in fs.ls(path, detail=True) if entry["type"] == "directory"
    )
    return [join(uri, name.rstrip("/").rsplit("/", 1)[1]) for name in folder_paths]


def list_files(uri: str) -> list[str]:
    """Return the files at any depth below `uri`, sorted: absolute paths where `uri` is local, else
    URIs with their scheme.
    """
    fs, path = _open_fs(uri)
    file_paths = cast("list[str]", fs.find(path))
    return sorted(
        file_paths
        if is_local(uri)
        else [str(fs.unstrip_protocol(file_path)) for file_path in file_paths]
    )


def fingerprint(uri: str) -> list[tuple[str, int, str]]:
    """Return (name below `uri`, bytes, stamp) of each file, sorted by name.

    The stamp is the file's etag, modification time or creation time, whichever the store gives
    first; "" where the store gives none. Where `uri` is a file, its name is the file's own.
    """
    fs, path = _open_fs(uri)
    root = str(path).rstrip("/")
    entries = []
    for name, info in sorted(fs.find(path, detail=True).items()):
        stamp = (
            info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created") or ""
        )
        entries.append(
            (name.removeprefix(root).lstrip("/") or Path(name).name, int(info["size"]), str(stamp))
        )
    return entries


def open_read(uri: str) -> Any:
    """Return one file, opened for reading bytes, as a context manager."""
    fs, path = _open_fs(uri)
    return fs.open(path, "rb")


def open_write(uri: str) -> Any:
    """Return one file, opened for writing bytes, as a context manager. Makes the folders above the
    file.
    """
    fs, path = _open_fs(uri)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    return fs.open(path, "wb")


def sha256(uri: str) -> str:
    """Return the SHA-256 of one file's bytes."""
    with open_read(uri) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return the content of one file, or its bytes from `start` up to but not including `end`."""
    fs, path = _open_fs(uri)
    return cast("bytes", fs.cat_file(path, start=start, end=end))


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file. Makes the folders above the file."""
    fs, path = _open_fs(uri)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, data)


def read_json(uri: str) -> Any:
    """Return the parsed content of a JSON file."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, data: object) -> None:
    """Write `data` as indented JSON with sorted keys."""
    write_bytes(uri, json.dumps(data, indent=1, sort_keys=True, default=str).encode())


def read_sealed(uri: str) -> dict[str, Any]:
    """Return the data that `write_sealed` wrote to `uri`.

    Raises ValueError where the content is no longer the one that was written.
    """
    try:
        content = read_json(uri)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    stored_checksum = content.pop(_SEAL, None) if isinstance(content, dict) else None
    if stored_checksum is None or stored_checksum != _checksum(content):
        raise ValueError("it has changed since it was written")
    return cast("dict[str, Any]", content)


def write_sealed(uri: str, data: dict[str, Any]) -> None:
    """Write `data` as JSON together with its checksum. `read_sealed` returns floats with the same
    bits.
    """
    plain_data = json.loads(json.dumps(data, default=str))
    write_json(uri, {**plain_data, _SEAL: _checksum(plain_data)})


def _checksum(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_array(uri: str, *, mmap: bool = False, checksum: str = "") -> npt.NDArray[Any]:
    """Return the array of a `.npy` file. The file is never unpickled.

    With `mmap`, a local file is mapped into memory, so that the workers of a machine share its
    pages. `checksum` is what `write_array` returned. It covers the bytes of the file, which include
    the type and the shape of the array. Raises ValueError where the file has another checksum. Cost
    of the check: a mapped file is read once more.
    """
    if mmap and is_local(uri):
        if checksum and sha256(uri) != checksum:
            raise ValueError(_CHANGED_MESSAGE)
        return cast(
            "npt.NDArray[Any]",
            np.load(uri.removeprefix("file://"), mmap_mode="r", allow_pickle=False),
        )
    data = read_bytes(uri)
    if checksum and hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(_CHANGED_MESSAGE)
    return cast("npt.NDArray[Any]", np.load(io.BytesIO(data), allow_pickle=False))


def write_array(uri: str, array: npt.NDArray[Any]) -> str:
    """Write `array` as a `.npy` file and return the SHA-256 of the file's bytes.

    Raises ValueError for an array of Python objects.
    """
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(uri, buffer.getvalue())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def remove(uri: str) -> None:
    """Remove a file or folder. Nothing happens where `uri` does not exist.

    A folder's marker is removed first, so that a half removed folder does not count as complete.
    """
    fs, path = _open_fs(uri)
    marker = join(path, COMPLETE)
    if fs.exists(marker):
        fs.rm(marker)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def nearest_folder(uri: str) -> str:
    """Return the nearest folder that exists: `uri` itself or one above it. A URI that is not local
    is returned unchanged.
    """
    if not is_local(uri):
        return uri
    path = Path(absolute(uri))
    return str(next(candidate for candidate in (path, *path.parents) if candidate.exists()))


def check_writable(folder: str) -> None:
    """Raise SetupError where no file can be written below `folder`. Writes and removes a file."""
    probe_uri = join(folder, f"_writable-{uuid.uuid4().hex}")  # unique, as others may check too
    try:
        write_bytes(probe_uri, b"")
        remove(probe_uri)
    except OSError as error:
        raise SetupError(
            f"{folder}: nothing can be written there ({error}); mend its rights or paths.root"
        ) from None


def mark_complete(folder: str) -> None:
    """Mark `folder` as complete: everything in the folder is written."""
    write_bytes(join(folder, COMPLETE), b"")


def is_complete(folder: str) -> bool:
    """Return whether `folder` is complete: it was written to its end and marked."""
    return exists(join(folder, COMPLETE))


def read_state(folder: str, name: str) -> dict[str, Any]:
    """Return the data of the sealed JSON file `name` in a complete folder.

    Raises ArtifactError where the folder is not complete, and where the file is missing or has
    changed since it was written.
    """
    if not is_complete(folder):
        raise ArtifactError(f"{folder} was not written to its end")
    uri = join(folder, name)
    try:
        return read_sealed(uri)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{uri}: {error}") from None


def complete_folders(folder: str) -> list[str]:
    """Return the complete folders directly below `folder`, sorted by name; [] where `folder` is ""
    or does not exist.
    """
    if not folder or not exists(folder):
        return []
    names = {file.rsplit("/", 2)[1] for file in list_files(folder)}
    return [subfolder for name in sorted(names) if is_complete(subfolder := join(folder, name))]


def remove_older(folder: str, keep: int, *also_kept: str) -> None:
    """Remove the complete folders below `folder`, except the last `keep` (at least 1) by name and
    the folders `also_kept` (URIs).
    """
    for old_folder in complete_folders(folder)[:-keep]:
        if old_folder not in also_kept:
            remove(old_folder)


def _open_fs(uri: str) -> tuple[Any, str]:
    if is_local(uri):  # not by `url_to_fs`, which takes '::' for a chain of URIs
        path = uri.removeprefix("file://")
        return fsspec.filesystem("file"), str(Path(path).absolute()) if path else path
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:  # fsspec's message names the missing package
        raise SetupError(f"{uri}: {error}; executors need it too") from None
    return fs, str(path)

"""The one module that opens files: every location is a URI, whatever store it points to.

A path without a scheme is local. Other schemes go through fsspec (`s3`, `gs`, `abfs`, `memory` in
tests). Nothing here relies on an atomic rename: a folder is complete when its marker file is there,
and the marker is written last.
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

COMPLETE = "_complete"
_SEAL = "sha256"  # the key of a JSON file's checksum of the rest
_CHANGED = "its bytes are not those that were written"
_PATTERN = re.compile(r"[\\*?\[\]{}]")


def join(base: str, *parts: str) -> str:
    """Return `base` with `parts` below it.

    >>> join("s3://bucket/root/", "a", "b")
    's3://bucket/root/a/b'
    """
    return "/".join([base.rstrip("/"), *[part.strip("/") for part in parts]])


def is_local(uri: str) -> bool:
    """Return whether `uri` names a file of this machine.

    >>> is_local("build/x"), is_local("file:///x"), is_local("s3://b/x")
    (True, True, False)
    """
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """Return `uri` with a relative local path made absolute, as Spark executors need it."""
    if not is_local(uri):
        return uri
    return str(Path(uri.removeprefix("file://")).absolute())


def for_spark(uri: str) -> str:
    r"""Return `uri` as the readers of Spark take it, which take every path for a pattern.

    For `csv`, `text`, `parquet`, …; Delta takes a path as it is. Raises SourceError for a name that
    Spark cannot read.

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
    return _PATTERN.sub(lambda sign: "\\" + sign[0], uri)


def is_file(uri: str) -> bool:
    """Return whether a file is at `uri`, or a link that leads to one."""
    fs, path = _open_fs(uri)
    return bool(fs.isfile(path))


def exists(uri: str) -> bool:
    """Return whether a file or folder is at `uri`."""
    fs, path = _open_fs(uri)
    return bool(fs.exists(path))


def size(uri: str) -> int | None:
    """Return the bytes of one file; None where there is none."""
    fs, path = _open_fs(uri)
    try:
        return int(fs.info(path)["size"])
    except FileNotFoundError:
        return None


def folders(uri: str) -> list[str]:
    """Return the folders right below `uri`, sorted, as URIs of the same form; [] where it is none."""
    fs, path = _open_fs(uri)
    if not fs.isdir(path):
        return []
    found = sorted(
        entry["name"] for entry in fs.ls(path, detail=True) if entry["type"] == "directory"
    )
    return [join(uri, name.rstrip("/").rsplit("/", 1)[1]) for name in found]


def list_files(uri: str) -> list[str]:
    """Return the files below `uri`, sorted, as URIs of the same form."""
    fs, path = _open_fs(uri)
    found = cast("list[str]", fs.find(path))
    return sorted(found if is_local(uri) else [str(fs.unstrip_protocol(f)) for f in found])


def fingerprint(uri: str) -> list[tuple[str, int, str]]:
    """Return (name below `uri`, bytes, stamp) of each file; the stamp is an etag, checksum or
    mtime.
    """
    fs, path = _open_fs(uri)
    root = str(path).rstrip("/")
    rows = []
    for name, info in sorted(fs.find(path, detail=True).items()):
        stamp = (
            info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created") or ""
        )
        rows.append(
            (name.removeprefix(root).lstrip("/") or Path(name).name, int(info["size"]), str(stamp))
        )
    return rows


def open_read(uri: str) -> Any:
    """Return a context manager of one file opened for reading bytes."""
    fs, path = _open_fs(uri)
    return fs.open(path, "rb")


def open_write(uri: str) -> Any:
    """Return a context manager of one file opened for writing bytes; makes its folders."""
    fs, path = _open_fs(uri)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    return fs.open(path, "wb")


def sha256(uri: str) -> str:
    """Return the SHA-256 of one file's bytes."""
    with open_read(uri) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_bytes(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return the content of one file, or its bytes from `start` up to `end`."""
    fs, path = _open_fs(uri)
    return cast("bytes", fs.cat_file(path, start=start, end=end))


def write_bytes(uri: str, data: bytes) -> None:
    """Write one file, making its folders."""
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
    """Return what `write_sealed` wrote; ValueError where the file says anything else by now."""
    try:
        found = read_json(uri)
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    seal = found.pop(_SEAL, None) if isinstance(found, dict) else None
    if seal is None or seal != _digest(found):
        raise ValueError("it has changed since it was written")
    return cast("dict[str, Any]", found)


def write_sealed(uri: str, data: dict[str, Any]) -> None:
    """Write `data` as JSON that holds its own checksum. Floats come back as the same bits."""
    plain = json.loads(json.dumps(data, default=str))
    write_json(uri, {**plain, _SEAL: _digest(plain)})


def _digest(data: object) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_array(uri: str, *, mmap: bool = False, checksum: str = "") -> npt.NDArray[Any]:
    """Return the array of a `.npy` file; `mmap` shares local files between workers. Never
    unpickles.

    Raises ValueError where `checksum`, of `write_array`, is not that of the file's bytes: type and
    shape are among them. Cost of that: the file is read once more where it is mapped.
    """
    if mmap and is_local(uri):
        if checksum and sha256(uri) != checksum:
            raise ValueError(_CHANGED)
        return cast(
            "npt.NDArray[Any]",
            np.load(uri.removeprefix("file://"), mmap_mode="r", allow_pickle=False),
        )
    data = read_bytes(uri)
    if checksum and hashlib.sha256(data).hexdigest() != checksum:
        raise ValueError(_CHANGED)
    return cast("npt.NDArray[Any]", np.load(io.BytesIO(data), allow_pickle=False))


def write_array(uri: str, array: npt.NDArray[Any]) -> str:
    """Write `array` as a `.npy` file and return the SHA-256 of its bytes; object arrays raise
    ValueError.
    """
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(uri, buffer.getvalue())
    return hashlib.sha256(buffer.getbuffer()).hexdigest()


def remove(uri: str) -> None:
    """Remove a file or folder; nothing happens where there is none.

    A folder's marker goes first: what is half removed is not complete.
    """
    fs, path = _open_fs(uri)
    marker = join(path, COMPLETE)
    if fs.exists(marker):
        fs.rm(marker)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def nearest_folder(uri: str) -> str:
    """Return `uri`, or the nearest above it that exists, where a local folder is not there yet."""
    if not is_local(uri):
        return uri
    path = Path(absolute(uri))
    return str(next(place for place in (path, *path.parents) if place.exists()))


def check_writable(folder: str) -> None:
    """Raise SetupError where nothing can be written below `folder`."""
    probe = join(folder, f"_writable-{uuid.uuid4().hex}")  # others may look at this moment
    try:
        write_bytes(probe, b"")
        remove(probe)
    except OSError as error:
        raise SetupError(
            f"{folder}: nothing can be written there ({error}); mend its rights or paths.root"
        ) from None


def mark_complete(folder: str) -> None:
    """Say that everything in `folder` is written."""
    write_bytes(join(folder, COMPLETE), b"")


def is_complete(folder: str) -> bool:
    """Return whether `folder` was written to its end."""
    return exists(join(folder, COMPLETE))


def read_state(folder: str, name: str) -> dict[str, Any]:
    """Return the sealed JSON file `name` of a folder that was written to its end.

    Raises ArtifactError where it was not, and where the file is missing or not as it was written.
    """
    if not is_complete(folder):
        raise ArtifactError(f"{folder} was not written to its end")
    uri = join(folder, name)
    try:
        return read_sealed(uri)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{uri}: {error}") from None


def complete_folders(folder: str) -> list[str]:
    """Return the folders below `folder` that were written to their end, by name; "" has none."""
    if not folder or not exists(folder):
        return []
    names = {file.rsplit("/", 2)[1] for file in list_files(folder)}
    return [place for name in sorted(names) if is_complete(place := join(folder, name))]


def remove_older(folder: str, keep: int, *also: str) -> None:
    """Remove the folders below `folder` that were written to their end, but for the last `keep` by
    name, and `also` those named.
    """
    for old in complete_folders(folder)[:-keep]:
        if old not in also:
            remove(old)


def _open_fs(uri: str) -> tuple[Any, str]:
    if is_local(uri):  # fsspec takes a '::' in it for a chain of places
        path = uri.removeprefix("file://")
        return fsspec.filesystem("file"), str(Path(path).absolute()) if path else path
    try:
        fs, path = fsspec.core.url_to_fs(uri)
    except ImportError as error:  # fsspec names the package
        raise SetupError(f"{uri}: {error}; executors need it too") from None
    return fs, str(path)

"""What a row of `runs` says of the process that wrote it: its code, and the memory that it took."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import psutil


def code_digest() -> str:
    """Return 12 hex digits over recspark's Python sources, also when they are shipped in a zip.

    The code revision where git is not at hand; the same for a checkout and for a package made of
    it.
    """
    sha = hashlib.sha256()
    for name, source in sorted(_sources(resources.files("recspark"), "")):
        sha.update(name.encode())
        sha.update(source)
    return sha.hexdigest()[:12]


def _sources(folder: Traversable, path: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _sources(entry, f"{path}{entry.name}/")
        elif entry.name.endswith(".py"):
            yield f"{path}{entry.name}", entry.read_bytes()


def peak_memory_mb() -> float:
    """Return the peak resident memory of this Python process and the JVM it started, in MB."""
    total = 0.0
    for pid in _own_processes():
        try:
            text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="ignore")
        except OSError:
            continue
        peak = [line for line in text.splitlines() if line.startswith("VmHWM")]
        total += int(peak[0].split()[1]) / 1024 if peak else 0.0
    if not total:
        total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return round(total, 1)


def _own_processes() -> list[int]:
    """Return this process and its Java child or parent: the driver's two halves."""
    me = psutil.Process()
    java = [p for p in [*me.children(), *me.parents()[:1]] if p.name() == "java"]
    return [me.pid, *[p.pid for p in java]]

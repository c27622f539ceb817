"""What a row of `runs` says of the process that wrote it: the memory that it took."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil


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

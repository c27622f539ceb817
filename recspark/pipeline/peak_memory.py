"""What a row of `runs` records about the process that wrote it: its peak memory."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil


def peak_memory_mb() -> float:
    """Return the peak resident memory of this Python process and its JVM, in MB."""
    total = 0.0
    for pid in _driver_processes():
        try:
            status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="ignore")
        except OSError:
            continue
        peak_lines = [line for line in status.splitlines() if line.startswith("VmHWM")]
        total += int(peak_lines[0].split()[1]) / 1024 if peak_lines else 0.0
    if not total:
        total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return round(total, 1)


def _driver_processes() -> list[int]:
    """Return the ids of this process and of its Java child or parent.

    The two are the halves of Spark's driver: Python starts the JVM, or spark-submit's JVM starts
    Python.
    """
    this_process = psutil.Process()
    java_processes = [
        process
        for process in [*this_process.children(), *this_process.parents()[:1]]
        if process.name() == "java"
    ]
    return [this_process.pid, *[process.pid for process in java_processes]]

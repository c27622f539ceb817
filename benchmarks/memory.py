"""Peak memory and CPU time of a piece of work: this process, the JVM, the Python workers."""

from __future__ import annotations

import threading
import time
from typing import Any, Self

import psutil


class PeakMemory:
    """Peak resident memory while inside, sampled every two seconds, MB; and CPU seconds, of all threads.

    A sample walks the pages of every process, which stops them meanwhile: twice a second cost a
    fit of item2vec half of its speed.

    On a machine that does other things as well, CPU seconds compare better than seconds.

    `driver` is this process; `jvm` all Java below it (with a local master the driver's and the
    executors' in one, which keeps what an earlier run took); `workers` the Python workers. A page that
    several processes share counts once (PSS).
    """

    def __init__(self, every_s: float = 2.0) -> None:
        self.megabytes = {"driver_mb": 0, "jvm_mb": 0, "workers_mb": 0}
        self._every_s, self._ended = every_s, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._begun = cpu_seconds()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.cpu_seconds = cpu_seconds() - self._begun
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(self._every_s):
            cpu_seconds()
            now = {"driver_mb": held(me), "jvm_mb": 0, "workers_mb": 0}
            for child in me.children(recursive=True):
                now["jvm_mb" if _name(child) == "java" else "workers_mb"] += held(child)
            for kind, size in now.items():
                self.megabytes[kind] = max(self.megabytes[kind], size >> 20)


_taken: dict[tuple[int, float], float] = {}  # a child's (pid, start) -> CPU seconds when last seen


def cpu_seconds() -> float:
    """Return what this process and all below it, those that ended too, have taken of the processors.

    Of one that has ended it counts what was seen at the last call. This process is counted to the
    microsecond, those below it to a hundredth of a second.
    """
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
            _taken[process.pid, process.create_time()] = times.user + times.system
        except psutil.Error:
            continue
    return time.process_time() + sum(_taken.values())


def held(process: Any) -> int:
    """Return the bytes that a process holds, its part of shared pages; 0 where it has ended."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.Error, OSError):
        return 0


def _name(process: Any) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""

"""Executors of a standalone cluster on this machine, for tests that kill one at work."""

from __future__ import annotations

from collections.abc import Callable

import psutil

_EXECUTOR_CLASS = "CoarseGrainedExecutorBackend"


def executors(belongs: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Return the JVMs of executors for which `belongs` is true."""
    matched = []
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"] != "java" or not any(
                _EXECUTOR_CLASS in part for part in process.cmdline()
            ):
                continue
            if belongs(process):
                matched.append(process)
        except psutil.Error:  # the process has ended
            continue
    return matched


def connected_executors(belongs: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """Return those `executors` whose Python workers have a TCP connection to a Python worker of
    another: they train one model together.
    """
    executor_by_ends = {}
    for executor in executors(belongs):
        try:
            for worker in executor.children(recursive=True):
                for connection in worker.net_connections("tcp"):
                    if connection.raddr:
                        ends = tuple(connection.laddr), tuple(connection.raddr)
                        executor_by_ends[ends] = executor
        except psutil.Error:
            continue
    return [
        executor
        for (here, there), executor in executor_by_ends.items()
        if executor_by_ends.get((there, here), executor) is not executor
    ]

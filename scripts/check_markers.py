"""Fail when an expected pytest marker selects no test: a green run must not have lost a whole kind.

::

    .venv/bin/python scripts/check_markers.py spark torch horovod cluster slow notebook

Collects once, prints how many tests carry each marker, and exits with 1 when one of those named
carries none or when the collection itself fails.
"""

from __future__ import annotations

import collections
import sys

import pytest


class Counter:
    """A pytest plugin that counts the tests under each marker."""

    def __init__(self) -> None:
        self.tests = 0
        self.markers: collections.Counter[str] = collections.Counter()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count after all deselection."""
        self.tests = len(session.items)
        for item in session.items:
            self.markers.update({marker.name for marker in item.iter_markers()})


def main() -> int:
    """Collect, print the counts, return the exit code."""
    expected = sys.argv[1:]
    counter = Counter()
    code = pytest.main(["--collect-only", "-qq", "--no-summary"], plugins=[counter])
    counts = ", ".join(f"{name} {counter.markers[name]}" for name in expected)
    print(f"{counter.tests} tests; {counts}")
    if code not in {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}:
        print("the collection failed")
        return 1
    empty = [name for name in expected if not counter.markers[name]]
    if empty:
        print("no test is marked:", ", ".join(empty))
    return int(bool(empty))


if __name__ == "__main__":
    sys.exit(main())

"""The log of one night as a file, and its warnings in one place."""

from __future__ import annotations

import logging
import os
import tempfile
import traceback
from datetime import UTC, date, datetime
from types import TracebackType
from typing import IO, Self

from recspark import storage
from recspark.errors import RecsparkError
from recspark.masking import mask, presentable

log = logging.getLogger("recspark")
_SPARK_BYTES = 1_000_000  # the newest of what Spark said that are kept


class NightLog(logging.Handler):
    """Keeps what a night says in `<root>/logs/<night>-<time>.log`, and gathers its warnings.

    On this machine the file grows with the night; on a store it is written at the end. A folder
    where nothing can be written gives no log: the night itself says so.

    Parameters
    ----------
    root : `paths.root`
    night : names the file
    keep : how many files of older nights stay
    alone : warnings are only gathered, not printed on the way
    """

    def __init__(self, root: str, night: date, keep: int, *, alone: bool) -> None:
        super().__init__(logging.INFO)
        self.folder = storage.join(storage.absolute(root), "logs")
        self.uri = storage.join(self.folder, f"{night}-{datetime.now(UTC):%Y%m%dT%H%M%S}.log")
        self.warnings: dict[str, int] = {}  # text -> how often
        # What Spark says, until the night's end.
        self.spark: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.keep = keep
        self.alone = alone
        self._file: IO[bytes] | None = None
        self._writable = True
        self._level, self._propagate = log.level, log.propagate

    def __enter__(self) -> Self:
        self._level, self._propagate = log.level, log.propagate
        log.addHandler(self)
        log.setLevel(logging.INFO)
        log.propagate = not self.alone
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        log.removeHandler(self)
        log.setLevel(self._level)
        log.propagate = self._propagate
        if self._file is not None:
            if error is not None:
                for text in _told(error):
                    self.line(text)
            self._add_spark()
            self._file.close()
            self._forget()
        self.spark.close()

    @property
    def path(self) -> str | None:
        """Where the log is; None where nothing was written."""
        return self.uri if self._file is not None else None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one log record."""
        text = mask(record.getMessage())
        if record.levelno >= logging.WARNING:
            self.warnings[text] = self.warnings.get(text, 0) + 1
            text = f"{record.levelname}: {text}"
        self.line(text)

    def line(self, text: str) -> None:
        """Write one line."""
        if self._file is None and self._writable:
            try:
                self._file = storage.open_write(self.uri)
            except OSError:
                self._writable = False
        if self._file is not None:
            self._file.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}  {_shown(text)}\n".encode())
            self._file.flush()

    def _add_spark(self) -> None:
        size = self.spark.seek(0, os.SEEK_END)
        self.spark.seek(max(0, size - _SPARK_BYTES))
        if said := self.spark.read().decode(errors="replace").strip():
            self.line("what Spark said:")
            for line in said.splitlines():
                self.line(f"  {line.expandtabs(2)}")

    def _forget(self) -> None:
        older = [file for file in storage.list_files(self.folder) if file.endswith(".log")]
        for file in older[: -self.keep]:
            storage.remove(file)


def _told(error: BaseException) -> list[str]:
    """Return the lines of an error: its message where it has a name here, else its traceback."""
    if isinstance(error, RecsparkError):
        return f"{type(error).__name__}: {error}".splitlines()
    return "".join(traceback.format_exception(error)).splitlines()


def _shown(text: str) -> str:
    """Return a line as it may stand in a log: no secrets, nothing that a terminal would obey."""
    return presentable(text)

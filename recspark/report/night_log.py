"""The log of one night as a file, and the collected warnings of the night."""

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
_MAX_SPARK_BYTES = 1_000_000  # how much of the end of Spark's output is kept


class NightLog(logging.Handler):
    """Writes what a night logs to `<root>/logs/<night>-<time>.log`, and collects its warnings.

    On this machine the file grows during the night; on a store it is written at the end. If nothing
    can be written to the folder, there is no log here; the night itself reports the problem.

    Parameters
    ----------
    root : `paths.root`
    night : names the file
    n_kept_files : how many log files stay, the newest ones
    is_only_handler : warnings are only collected here, not printed during the night
    """

    def __init__(self, root: str, night: date, n_kept_files: int, *, is_only_handler: bool) -> None:
        super().__init__(logging.INFO)
        self.folder = storage.join(storage.absolute(root), "logs")
        self.uri = storage.join(self.folder, f"{night}-{datetime.now(UTC):%Y%m%dT%H%M%S}.log")
        self.warnings: dict[str, int] = {}  # text -> how many times
        # The output of Spark, which goes to the log at the night's end.
        self.spark_stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.n_kept_files = n_kept_files
        self.is_only_handler = is_only_handler
        self._file: IO[bytes] | None = None
        self._writable = True
        self._level_before, self._propagates_before = log.level, log.propagate

    def __enter__(self) -> Self:
        self._level_before, self._propagates_before = log.level, log.propagate
        log.addHandler(self)
        log.setLevel(logging.INFO)
        log.propagate = not self.is_only_handler
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        log.removeHandler(self)
        log.setLevel(self._level_before)
        log.propagate = self._propagates_before
        if self._file is not None:
            if error is not None:
                for text in _error_lines(error):
                    self.line(text)
            self._add_spark_output()
            self._file.close()
            self._remove_old_files()
        self.spark_stderr.close()

    @property
    def path(self) -> str | None:
        """URI of the log; None if nothing was written."""
        return self.uri if self._file is not None else None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one log record, and count it if it is a warning."""
        text = mask(record.getMessage())
        if record.levelno >= logging.WARNING:
            self.warnings[text] = self.warnings.get(text, 0) + 1
            text = f"{record.levelname}: {text}"
        self.line(text)

    def line(self, text: str) -> None:
        """Write one line with the time. The first line opens the file."""
        if self._file is None and self._writable:
            try:
                self._file = storage.open_write(self.uri)
            except OSError:
                self._writable = False
        if self._file is not None:
            self._file.write(
                f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}  {_printable(text)}\n".encode()
            )
            self._file.flush()

    def _add_spark_output(self) -> None:
        size = self.spark_stderr.seek(0, os.SEEK_END)
        self.spark_stderr.seek(max(0, size - _MAX_SPARK_BYTES))
        if spark_output := self.spark_stderr.read().decode(errors="replace").strip():
            self.line("what Spark said:")
            for line in spark_output.splitlines():
                self.line(f"  {line.expandtabs(2)}")

    def _remove_old_files(self) -> None:
        log_files = [file for file in storage.list_files(self.folder) if file.endswith(".log")]
        for file in log_files[: -self.n_kept_files]:
            storage.remove(file)


def _error_lines(error: BaseException) -> list[str]:
    """Return the lines to log for an error: the message of an error of recspark, the traceback of
    any other.
    """
    if isinstance(error, RecsparkError):
        return f"{type(error).__name__}: {error}".splitlines()
    return "".join(traceback.format_exception(error)).splitlines()


def _printable(text: str) -> str:
    """Return a line that may stand in a log: without secrets and without control sequences for a
    terminal.
    """
    return presentable(text)

"""What the commands share: options, the console, and how they open the tables."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from recspark.config import Config
from recspark.config.load import load_config
from recspark.errors import ConfigError
from recspark.masking import presentable
from recspark.tables.reader import Reader, TableReader, is_readable_without_spark
from recspark.terminal import printable

if TYPE_CHECKING:
    from recspark.tables.spark_reader import SparkReader

Env = Annotated[str, typer.Option("--env", help="conf/env/<name>.yaml")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="a.b=value, over the YAML files; may be repeated")
]
RunDate = Annotated[
    str, typer.Option("--run-date", help="the night: its last full day, YYYY-MM-DD")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]


class PlainConsole(Console):
    """A console that prints text letter by letter. Markup and emoji names are not interpreted, and
    characters of the data that a terminal would obey are replaced.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of `renderable` with printable text. rich's own colours are styles,
        not text, so they stay.
        """
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, keep="\n"), style, control)


_terminal = PlainConsole()
# A log file or a pipe has no width, so tables get 150 columns there.
console = _terminal if _terminal.is_terminal else PlainConsole(width=150)


def print_json(value: object) -> None:
    """Print one JSON document in printable ASCII, so that nothing in it can control a terminal."""
    print(json.dumps(value, default=str))


def parse_date(text: str) -> date:
    """Return the date. Raises ConfigError, which names the expected form, for any other text."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise ConfigError(f"'{text}' is not a date: write YYYY-MM-DD, such as 2010-12-09") from None


def reporter(started: float | None = None) -> Callable[[str], None]:
    """Return a function that prints one line of progress with the seconds since `started`.

    `started` : a value of `time.monotonic()`; None = now
    """
    start = time.monotonic() if started is None else started

    def report(text: str) -> None:
        seconds = f"{time.monotonic() - start:6.1f} s"
        console.print(
            Text.assemble((seconds, "dim"), "  ", presentable(text)),
            highlight=False,
            soft_wrap=True,
        )

    return report


def is_verbose() -> bool:
    """Return whether `--verbose` was given, or RECSPARK_LOG asks for the same log level."""
    return logging.getLogger().isEnabledFor(logging.INFO)


@contextmanager
def quiet_spark(spark_stderr: IO[bytes]) -> Iterator[None]:
    """Redirect the standard error of a Spark that starts within the block to the file
    `spark_stderr`, for as long as that Spark lives. With `--verbose` it keeps the terminal.

    The file descriptor is redirected, because the JVM prints a part of its output before it reads
    any logging settings.
    """
    if is_verbose():
        yield
        return
    sys.stderr.flush()
    terminal_stderr = os.dup(2)
    try:
        os.dup2(spark_stderr.fileno(), 2)
        yield
    finally:
        os.dup2(terminal_stderr, 2)
        os.close(terminal_stderr)


@contextmanager
def reading(env: str, overrides: list[str] | None) -> Iterator[tuple[Config, Reader]]:
    """Yield the settings and a reader of the tables, without Spark if `paths.root` is local."""
    config = load_config(env, overrides or [])
    if is_readable_without_spark(config.paths.root):
        yield config, TableReader(config.paths.tables)
    else:
        with reading_by_spark(config) as tables:
            yield config, tables


@contextmanager
def reading_by_spark(config: Config) -> Iterator[SparkReader]:
    """Yield a reader of the tables. Its small local Spark session is stopped at the end."""
    from recspark.session import build_session
    from recspark.tables.spark_reader import spark_reader_of_root

    with tempfile.TemporaryFile() as spark_stderr:
        try:
            with quiet_spark(spark_stderr):
                spark = build_session(config.spark, "recspark read")
        except Exception:
            spark_stderr.seek(0)  # if the JVM did not start, it printed the reason
            print(
                presentable(spark_stderr.read().decode(errors="replace"), keep="\n"),
                file=sys.stderr,
            )
            raise
    try:
        yield spark_reader_of_root(spark, config.paths.tables)
    finally:
        spark.stop()

"""What the commands share: options, the console, and a door to the tables."""

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
from recspark.errors import ConfigError
from recspark.layers import load_config
from recspark.masking import presentable
from recspark.tables.reader import Reader, TableReader, opens
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
    """A console that prints what it is given, letter by letter: no markup, no emoji by name, and of
    the data nothing that a terminal would obey.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Give the segments of `renderable`; rich's own colours are styles, not text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, keep="\n"), style, control)


_terminal = PlainConsole()
# A log file or a pipe has no width of its own: give the tables room there.
console = _terminal if _terminal.is_terminal else PlainConsole(width=150)


def print_json(value: object) -> None:
    """Print one JSON document: printable ASCII, so that no terminal obeys it."""
    print(json.dumps(value, default=str))


def parse_date(text: str) -> date:
    """Return the date; ConfigError says what is expected."""
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise ConfigError(f"'{text}' is not a date: write YYYY-MM-DD, such as 2010-12-09") from None


def reporter(started: float | None = None) -> Callable[[str], None]:
    """Return a function that prints one progress line with the seconds since `started`."""
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
    """Return whether `--verbose` was given (or RECSPARK_LOG asks for as much)."""
    return logging.getLogger().isEnabledFor(logging.INFO)


@contextmanager
def quiet_spark(kept: IO[bytes]) -> Iterator[None]:
    """Give a Spark that starts within the block `kept` for its standard error, for as long as it
    lives. With `--verbose` it keeps the terminal.

    By file descriptor: a part of what the JVM says comes before it reads any logging settings.
    """
    if is_verbose():
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        os.dup2(kept.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def reading(env: str, overrides: list[str] | None) -> Iterator[tuple[Config, Reader]]:
    """Give the settings and the tables: without Spark where `paths.root` allows it."""
    config = load_config(env, overrides or [])
    if opens(config.paths.root):
        yield config, TableReader(config.paths.tables)
    else:
        with reading_by_spark(config) as tables:
            yield config, tables


@contextmanager
def reading_by_spark(config: Config) -> Iterator[SparkReader]:
    """Give the tables, with a small local session that is stopped at the end."""
    from recspark.session import build_session
    from recspark.tables.spark_reader import of_root

    with tempfile.TemporaryFile() as said:
        try:
            with quiet_spark(said):
                spark = build_session(config.spark, "recspark read")
        except Exception:
            said.seek(0)  # the reason, where the JVM did not start
            print(presentable(said.read().decode(errors="replace"), keep="\n"), file=sys.stderr)
            raise
    try:
        yield of_root(spark, config.paths.tables)
    finally:
        spark.stop()

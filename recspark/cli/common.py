"""What the commands share: options, the console, and a session for reading."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from recspark.config import Config
from recspark.errors import ConfigError
from recspark.layers import load_config
from recspark.tables.catalog import TableCatalog

Env = Annotated[str, typer.Option("--env", help="conf/env/<name>.yaml")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="a.b=value, over the YAML files; may be repeated")
]
RunDate = Annotated[
    str, typer.Option("--run-date", help="the night: its last full day, YYYY-MM-DD")
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]

# No markup: a name of an item may look like it.
_terminal = Console(markup=False)
# A log file or a pipe has no width of its own: give the tables room there.
console = _terminal if _terminal.is_terminal else Console(width=150, markup=False)


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
        console.print(Text.assemble((seconds, "dim"), "  ", text), highlight=False)

    return report


@contextmanager
def reading(env: str, overrides: list[str] | None) -> Iterator[tuple[Config, TableCatalog]]:
    """Give the settings and the tables, with a small local session that is stopped at the end."""
    from recspark.session import build_session

    config = load_config(env, overrides or [])
    spark = build_session(config.spark, "recspark read")
    try:
        yield config, TableCatalog(spark, config.paths.tables)
    finally:
        spark.stop()

"""`recspark nightly`: the whole night in one go. `recspark demo`: the same on the bundled data."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recspark.cli.common import (
    Env,
    RunDate,
    Set,
    console,
    is_verbose,
    parse_date,
    quiet_spark,
    reporter,
)
from recspark.errors import Interrupted, ModelsFailedError
from recspark.layers import load_config
from recspark.masking import mask, presentable
from recspark.terminal import printable

if TYPE_CHECKING:
    from recspark.pipeline.context import RunContext
    from recspark.report.night_log import NightLog

DEMO_NIGHT = "2010-12-09"
# Whatever the environment names: the demo is of the bundled data.
DEMO_SETTINGS = ["source=online_retail", "paths.root=build/demo"]

Force = Annotated[bool, typer.Option("--force", help="run every stage again and train again")]
Repin = Annotated[
    bool, typer.Option("--repin", help="begin a new run on the tables as they are now")
]


def nightly(
    run_date: RunDate,
    env: Env = "local",
    set_: Set = None,
    force: Force = False,
    repin: Repin = False,
    report: Annotated[bool, typer.Option(help="print what the night made")] = True,
) -> None:
    """Run every stage of one night: ingest, sessionize, features, train, recommend, evaluate,
    publish.

    A second run of the same night takes what is recorded; nothing changes. A model that failed
    alone is named at the end, with an exit code of its own, and tried again by a second run.
    """
    from recspark.pipeline.checks import check_landing
    from recspark.pipeline.run import night
    from recspark.report.night import print_night

    started, day = time.monotonic(), parse_date(run_date)
    failed = None
    with night_context(
        env,
        run_date,
        set_,
        force=force,
        repin=repin,
        trains=True,
        check=lambda config: check_landing(config, day),
    ) as opened:
        context, log = opened
        try:
            night(context)
        except ModelsFailedError as error:
            failed = error  # told below what is published
        users = print_night(context, console) if report else []
        _print_warnings(log)
        console.print(f"night of {run_date} done in {time.monotonic() - started:.0f} s")
        _say_what_next(context, log, users, set_ or [])
    if failed:
        raise failed


@contextmanager
def night_context(
    env: str,
    run_date: str,
    overrides: list[str] | None,
    *,
    what: str = "the night",
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[tuple[RunContext, NightLog]]:
    """Give the context of a night and its log; `options` are those of `open_night`, `say` is told of
    each step in the place of the terminal.

    What Spark says goes to the log, warnings are printed at the end, and so is the place of the log
    where something went wrong.
    """
    from recspark.pipeline.interrupt import Progress, opened
    from recspark.pipeline.run import open_night
    from recspark.report.night_log import NightLog

    day = parse_date(run_date)
    config = load_config(env, overrides or [])
    say = say or reporter()
    log = NightLog(config.paths.root, day, config.keep_nights, alone=not is_verbose())

    def both(text: str) -> None:
        log.line(text)
        say(text)

    progress = Progress(both)

    def begin() -> RunContext:
        with quiet_spark(log.spark):
            return open_night(env, day, overrides or [], progress=progress, **options)

    ended = False
    try:
        with log, opened(begin, progress, f"{what} of {day}") as context:
            yield context, log
        ended = True
    except Interrupted:
        ended = True  # by a person, who knows why
        raise
    finally:
        _print_warnings(log)
        if log.path and not ended:
            print(f"log: {presentable(log.path)}", file=sys.stderr)


def _print_warnings(log: NightLog) -> None:
    """Print the warnings that were not printed yet."""
    warnings, log.warnings = log.warnings, {}
    if warnings:
        console.print(
            f"{len(warnings)} warnings" if len(warnings) > 1 else "a warning", style="bold"
        )
    for text, times in warnings.items():
        again = f" ({times} times)" if times > 1 else ""
        console.print(f"  {presentable(text)}{again}", highlight=False, soft_wrap=True)


def _say_what_next(
    context: RunContext, log: NightLog, users: Sequence[str], overrides: Sequence[str]
) -> None:
    """Print commands that look at this night, to be copied, and where things are."""
    config = context.config
    options = _reading_options(config.env, overrides)
    user = users[0] if users and users[0] == printable(users[0]) else "USER"
    # An id that begins with `-` would be taken for an option.
    shown = ["--", user] if user.startswith("-") else [user]
    console.print("what next", style="bold")
    for words, says in (
        (["show", *options, *shown], "one user's list"),
        (["runs", *options], "what each stage did"),
        (["tables", *options], "all tables"),
    ):
        line = mask(shlex.join([_called(), *words]))
        console.print(f"  {line}   # {says}", highlight=False, soft_wrap=True)
    for name, place in (("tables", config.paths.tables), ("log", log.path)):
        if place:
            console.print(f"{name}: {mask(place)}", highlight=False, soft_wrap=True)


def _reading_options(env: str, overrides: Sequence[str]) -> list[str]:
    """Return the options with which the other commands find this night."""
    options = [] if env == "local" else ["--env", env]
    for text in overrides:
        if text.split("=")[0].split(".")[0].strip() in ("paths", "sessions"):
            options += ["--set", text]
    return options


def _called() -> str:
    """Return how recspark is called from this folder: by name only where every shell finds it."""
    called = Path(sys.argv[0])
    if called.name != "recspark":
        return "recspark"
    in_venv = sys.prefix != sys.base_prefix
    if not in_venv or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return "recspark"
    here, place = Path.cwd(), called.absolute()
    return str(place.relative_to(here) if place.is_relative_to(here) else place)


def demo(set_: Set = None, force: Force = False) -> None:
    """Run the night of 2010-12-09 on the bundled Online Retail data; everything lands in
    build/demo.
    """
    nightly(DEMO_NIGHT, "local", [*DEMO_SETTINGS, *(set_ or [])], force, False, True)

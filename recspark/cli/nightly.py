"""`recspark nightly`: all stages of one night. `recspark demo`: the same on the bundled data."""

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
from recspark.config.load import load_config
from recspark.errors import Interrupted, ModelsFailedError
from recspark.masking import mask, presentable
from recspark.terminal import printable

if TYPE_CHECKING:
    from recspark.pipeline.context import RunContext
    from recspark.report.night_log import NightLog

DEMO_NIGHT = "2010-12-09"
# These override RECSPARK_SOURCE and RECSPARK_ROOT: the demo always uses the bundled data.
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
    models_failed = None
    with night_context(
        env,
        run_date,
        set_,
        force=force,
        repin=repin,
        trains=True,
        check=lambda config: check_landing(config, day),
    ) as context_and_log:
        context, log = context_and_log
        try:
            night(context)
        except ModelsFailedError as error:
            models_failed = error  # raised at the end, after what was published is printed
        users = print_night(context, console) if report else []
        _print_warnings(log)
        console.print(f"night of {run_date} done in {time.monotonic() - started:.0f} s")
        _print_next_steps(context, log, users, set_ or [])
    if models_failed:
        raise models_failed


@contextmanager
def night_context(
    env: str,
    run_date: str,
    overrides: list[str] | None,
    *,
    night_name: str = "the night",
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[tuple[RunContext, NightLog]]:
    """Yield the context of a night and its log.

    Parameters
    ----------
    night_name : how messages call the night, such as `stage train of the night`
    report : called with each step; default: print it on the terminal
    options : passed to `open_night`

    The output of Spark goes to the log. Warnings are printed at the end. If something went wrong,
    the path of the log is printed too.
    """
    from recspark.pipeline.interrupt import Progress, opened
    from recspark.pipeline.run import open_night
    from recspark.report.night_log import NightLog

    day = parse_date(run_date)
    config = load_config(env, overrides or [])
    report = report or reporter()
    log = NightLog(config.paths.root, day, config.keep_nights, is_only_handler=not is_verbose())

    def report_and_log(text: str) -> None:
        log.line(text)
        report(text)

    progress = Progress(report_and_log)

    def open_context() -> RunContext:
        with quiet_spark(log.spark_stderr):
            return open_night(env, day, overrides or [], progress=progress, **options)

    has_ended_well = False
    try:
        with log, opened(open_context, progress, f"{night_name} of {day}") as context:
            yield context, log
        has_ended_well = True
    except Interrupted:
        has_ended_well = True  # a person ended it and needs no log
        raise
    finally:
        _print_warnings(log)
        if log.path and not has_ended_well:
            print(f"log: {presentable(log.path)}", file=sys.stderr)


def _print_warnings(log: NightLog) -> None:
    """Print the warnings that were not printed yet."""
    warnings, log.warnings = log.warnings, {}
    if warnings:
        console.print(
            f"{len(warnings)} warnings" if len(warnings) > 1 else "a warning", style="bold"
        )
    for text, n_times in warnings.items():
        repetitions = f" ({n_times} times)" if n_times > 1 else ""
        console.print(f"  {presentable(text)}{repetitions}", highlight=False, soft_wrap=True)


def _print_next_steps(
    context: RunContext, log: NightLog, users: Sequence[str], overrides: Sequence[str]
) -> None:
    """Print commands to copy that look at this night, and where the tables and the log are."""
    config = context.config
    options = _reading_options(config.env, overrides)
    user = users[0] if users and users[0] == printable(users[0]) else "USER"
    # Without `--` an id that begins with `-` would be taken for an option.
    user_arguments = ["--", user] if user.startswith("-") else [user]
    console.print("what next", style="bold")
    for arguments, meaning in (
        (["show", *options, *user_arguments], "one user's lists"),
        (["runs", *options], "what each stage did"),
        (["tables", *options], "all tables"),
    ):
        line = mask(shlex.join([_command_name(), *arguments]))
        console.print(f"  {line}   # {meaning}", highlight=False, soft_wrap=True)
    for name, uri in (("tables", config.paths.tables), ("log", log.path)):
        if uri:
            console.print(f"{name}: {mask(uri)}", highlight=False, soft_wrap=True)


def _reading_options(env: str, overrides: Sequence[str]) -> list[str]:
    """Return the options that other commands need to find the tables of this night."""
    options = [] if env == "local" else ["--env", env]
    for override in overrides:
        if override.split("=")[0].split(".")[0].strip() in ("paths", "sessions"):
            options += ["--set", override]
    return options


def _command_name() -> str:
    """Return how to call recspark from this folder: `recspark` if shells find it, else the path of
    the program.
    """
    program = Path(sys.argv[0])
    if program.name != "recspark":
        return "recspark"
    is_in_venv = sys.prefix != sys.base_prefix
    if not is_in_venv or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return "recspark"
    current_folder, program_path = Path.cwd(), program.absolute()
    return str(
        program_path.relative_to(current_folder)
        if program_path.is_relative_to(current_folder)
        else program_path
    )


def demo(set_: Set = None, force: Force = False) -> None:
    """Run the night of 2010-12-09 on the bundled Online Retail data; everything lands in
    build/demo.
    """
    nightly(DEMO_NIGHT, "local", [*DEMO_SETTINGS, *(set_ or [])], force, False, True)

"""The `recspark` command: one small file a command, no logic of its own."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from recspark import __version__, masking
from recspark.cli import (
    doctor,
    export,
    nightly,
    runs,
    settings,
    show,
    similar,
    stage,
    tables,
    tune,
)
from recspark.errors import RecsparkError

app = typer.Typer(
    name="recspark",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"recspark {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and end"
        ),
    ] = False,
) -> None:
    """Nightly recommendations: raw events in, fresh top-N lists in Delta tables."""


app.command("demo")(nightly.demo)
app.command("nightly")(nightly.nightly)
app.command("stage")(stage.stage)
app.command("tune")(tune.tune)
app.command("show")(show.show)
app.command("similar")(similar.similar)
app.command("runs")(runs.runs)
app.command("tables")(tables.tables)
app.command("export")(export.export)
app.command("settings")(settings.settings)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; a named error ends with its message and its own exit code."""
    logging.basicConfig(level=os.environ.get("RECSPARK_LOG", "WARNING"), format="%(message)s")
    masking.guard_output()
    try:
        app()
    except RecsparkError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)

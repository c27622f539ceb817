"""The `recspark` command: one small file a command, no logic of its own."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from recspark import masking
from recspark.cli import (
    doctor,
    export,
    models,
    nightly,
    plan,
    runs,
    settings,
    show,
    similar,
    stage,
    tables,
    tune,
)
from recspark.errors import Interrupted, RecsparkError
from recspark.terminal import log_to_terminal
from recspark.version import __version__


class Commands(TyperGroup):
    """All commands; `--verbose` may stand before or after the command's name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options of all commands."""
        own = args[: args.index("--")] if "--" in args else args
        if "--verbose" in own:
            args = ["--verbose", *[a for a in own if a != "--verbose"], *args[len(own) :]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C is an error with a message, as any other."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(f"recspark {ctx.invoked_subcommand} was ended by Ctrl-C") from None


class OfAnId(TyperCommand):
    """A command whose argument is an id, which may look like an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; an unknown option may be meant as the id."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            option = getattr(error, "option_name", None)
            if option and "message" in vars(error):
                error.message += (  # type: ignore[attr-defined]
                    f". An id that begins with '-' goes after --, behind all options: "
                    f"{ctx.command_path} -- {_whole(option, args)}"
                )
            raise


def _whole(option: str, args: list[str]) -> str:
    """Return the argument that `option` was found in: `-5` of `-5x`."""
    return next((arg for arg in args if arg.startswith(option)), option)


app = typer.Typer(
    name="recspark",
    cls=Commands,
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
    verbose: Annotated[
        bool, typer.Option("--verbose", help="all that recspark and Spark log, on the terminal")
    ] = False,
) -> None:
    """Nightly recommendations: raw events in, fresh top-N lists in Delta tables."""
    if verbose:
        logging.getLogger().setLevel(logging.INFO)


app.command("demo")(nightly.demo)
app.command("nightly")(nightly.nightly)
app.command("stage")(stage.stage)
app.command("plan")(plan.plan)
app.command("models")(models.models)
app.command("tune")(tune.tune)
app.command("show", cls=OfAnId)(show.show)
app.command("similar", cls=OfAnId)(similar.similar)
app.command("runs")(runs.runs)
app.command("tables")(tables.tables)
app.command("export")(export.export)
app.command("settings")(settings.settings)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; a named error ends with its message and its own exit code."""
    log_to_terminal(os.environ.get("RECSPARK_LOG", "WARNING"))
    masking.guard_output()
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app()
    except RecsparkError as error:
        print(masking.presentable(f"{type(error).__name__}: {error}", keep="\n"), file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        print(masking.presentable(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)
        sys.exit(1)

"""The `recspark` command. Each of its commands is one small file in this folder, which has no logic
of its own.
"""

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
    explain,
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


class RecsparkCommands(TyperGroup):
    """All commands. The option `--verbose` may stand before or after the name of the command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, after moving `--verbose` to the front.

        Example: `show 13085 --verbose` is parsed as `--verbose show 13085`. After `--` every
        argument is left alone, because it may be an id.
        """
        args_before_dashes = args[: args.index("--")] if "--" in args else args
        if "--verbose" in args_before_dashes:
            args = [
                "--verbose",
                *[arg for arg in args_before_dashes if arg != "--verbose"],
                *args[len(args_before_dashes) :],
            ]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Ctrl-C raises an error with a message, like any other error."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted(f"recspark {ctx.invoked_subcommand} was ended by Ctrl-C") from None


class CommandWithId(TyperCommand):
    """A command whose argument is an id. An id such as `-5` may look like an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments. The error for an unknown option says how to pass an id that begins
        with `-`.
        """
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            option = getattr(error, "option_name", None)
            if option and "message" in vars(error):
                error.message += (  # type: ignore[attr-defined]
                    f". An id that begins with '-' goes after --, behind all options: "
                    f"{ctx.command_path} -- {_full_argument(option, args)}"
                )
            raise


def _full_argument(option: str, args: list[str]) -> str:
    """Return the argument in which `option` was recognised, such as `-5x` for the option `-5`."""
    return next((arg for arg in args if arg.startswith(option)), option)


app = typer.Typer(
    name="recspark",
    cls=RecsparkCommands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
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
app.command("show", cls=CommandWithId)(show.show)
app.command("explain", cls=CommandWithId)(explain.explain)
app.command("similar", cls=CommandWithId)(similar.similar)
app.command("runs")(runs.runs)
app.command("tables")(tables.tables)
app.command("export")(export.export)
app.command("settings")(settings.settings)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line. An error of recspark ends the process with its message and its own exit
    code.
    """
    log_to_terminal(os.environ.get("RECSPARK_LOG", "WARNING"))
    masking.guard_output()
    # Names of items may have characters that the terminal's encoding lacks: print those as escapes.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        app()
    except RecsparkError as error:
        print(masking.presentable(f"{type(error).__name__}: {error}", keep="\n"), file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        print(masking.presentable(traceback.format_exc(), keep="\n"), end="", file=sys.stderr)
        sys.exit(1)

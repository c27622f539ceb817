"""The entry of a spark-submit job: arguments in, exit code out."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from datetime import date

from recspark import masking
from recspark.errors import RecsparkError
from recspark.pipeline.checks import check_stage
from recspark.pipeline.context import RunContext
from recspark.pipeline.interrupt import Progress, opened
from recspark.pipeline.plan import STAGES, find_stage
from recspark.pipeline.run import execute_models, open_night
from recspark.terminal import log_to_terminal


def parser(stage: str) -> argparse.ArgumentParser:
    """Return the argument parser of the job of `stage`. Airflow's tests use the same parser."""
    chosen_stage = find_stage(stage)
    argument_parser = argparse.ArgumentParser(prog=f"jobs/{stage}.py")
    argument_parser.add_argument(
        "--run-date", required=True, type=date.fromisoformat, help="YYYY-MM-DD"
    )
    argument_parser.add_argument("--env", default="cluster", help="conf/env/<name>.yaml")
    argument_parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="may be repeated"
    )
    argument_parser.add_argument("--force", action="store_true", help="run again what is recorded")
    if stage == STAGES[0].name:
        argument_parser.add_argument("--repin", action="store_true", help="begin a new run")
    if chosen_stage.per_model:
        argument_parser.add_argument(
            "--model", action="append", help="may be repeated; default all"
        )
    return argument_parser


def run_job(stage: str, argv: Sequence[str]) -> int:
    """Run one stage of one night and return the exit code of the process.

    Where a RecsparkError ends the stage, its name and message are printed, and its own exit code is
    returned.
    """
    arguments = parser(stage).parse_args(argv)
    log_to_terminal(os.environ.get("RECSPARK_LOG", "INFO"))
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    masking.guard_output()
    chosen_stage = find_stage(stage)
    requested_models = getattr(arguments, "model", None) or ()
    started = time.monotonic()
    progress = Progress(
        lambda text: print(
            f"{time.monotonic() - started:6.1f} s  {masking.presentable(text)}", flush=True
        )
    )

    def open_context() -> RunContext:
        return open_night(
            arguments.env,
            arguments.run_date,
            arguments.set,
            force=arguments.force,
            repin=getattr(arguments, "repin", False),
            app=f"recspark {stage}",
            trains=chosen_stage.trains,
            check=lambda config: check_stage(
                config, arguments.run_date, chosen_stage, requested_models
            ),
            models=requested_models or None,
            progress=progress,
        )

    try:
        with opened(
            open_context, progress, f"stage {stage} of the night of {arguments.run_date}"
        ) as context:
            models = chosen_stage.models(context.config, requested_models)
            for error in execute_models(context, chosen_stage, models).values():
                raise error
    except RecsparkError as error:
        print(masking.presentable(f"{type(error).__name__}: {error}", keep="\n"), file=sys.stderr)
        return error.exit_code
    return 0

"""The door of a spark-submit job: arguments in, exit code out."""

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
    """Return the arguments of the job of `stage`; Airflow's tests parse with the same."""
    chosen = find_stage(stage)
    out = argparse.ArgumentParser(prog=f"jobs/{stage}.py")
    out.add_argument("--run-date", required=True, type=date.fromisoformat, help="YYYY-MM-DD")
    out.add_argument("--env", default="cluster", help="conf/env/<name>.yaml")
    out.add_argument("--set", action="append", default=[], metavar="a.b=c", help="may be repeated")
    out.add_argument("--force", action="store_true", help="run again what is recorded")
    if stage == STAGES[0].name:
        out.add_argument("--repin", action="store_true", help="begin a new run")
    if chosen.per_model:
        out.add_argument("--model", action="append", help="may be repeated; default all")
    return out


def run_job(stage: str, argv: Sequence[str]) -> int:
    """Run one stage of one night and return the process's exit code; a named error prints its
    message.
    """
    arguments = parser(stage).parse_args(argv)
    log_to_terminal(os.environ.get("RECSPARK_LOG", "INFO"))
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    masking.guard_output()
    chosen = find_stage(stage)
    asked = getattr(arguments, "model", None) or ()
    started = time.monotonic()
    progress = Progress(
        lambda text: print(
            f"{time.monotonic() - started:6.1f} s  {masking.presentable(text)}", flush=True
        )
    )

    def begin() -> RunContext:
        return open_night(
            arguments.env,
            arguments.run_date,
            arguments.set,
            force=arguments.force,
            repin=getattr(arguments, "repin", False),
            app=f"recspark {stage}",
            trains=chosen.trains,
            check=lambda config: check_stage(config, arguments.run_date, chosen, asked),
            models=asked or None,
            progress=progress,
        )

    try:
        with opened(
            begin, progress, f"stage {stage} of the night of {arguments.run_date}"
        ) as context:
            models = chosen.models(context.config, asked)
            for error in execute_models(context, chosen, models).values():
                raise error
    except RecsparkError as error:
        print(masking.presentable(f"{type(error).__name__}: {error}", keep="\n"), file=sys.stderr)
        return error.exit_code
    return 0

"""`recspark nightly`: the whole night in one go. `recspark demo`: the same on the bundled data."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from recspark.cli.common import Env, RunDate, Set, console, parse_date, reporter
from recspark.errors import ModelsFailedError

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
    from recspark.pipeline.run import check_landing, night, open_night
    from recspark.report.night import print_night

    started, day = time.monotonic(), parse_date(run_date)
    context = open_night(
        env,
        day,
        set_ or [],
        force=force,
        repin=repin,
        trains=True,
        check=lambda config: check_landing(config, day),
        progress=reporter(started),
    )
    failed = None
    try:
        try:
            night(context)
        except ModelsFailedError as error:
            failed = error  # told below what is published
        if report:
            print_night(context, console)
        console.print(f"night of {run_date} done in {time.monotonic() - started:.0f} s")
    finally:
        context.spark.stop()
    if failed:
        raise failed


def demo(set_: Set = None, force: Force = False) -> None:
    """Run the night of 2010-12-09 on the bundled Online Retail data; everything lands in
    build/demo.
    """
    nightly(DEMO_NIGHT, "local", [*DEMO_SETTINGS, *(set_ or [])], force, False, True)

"""`recspark stage NAME`: run one stage of a night. `jobs/NAME.py` does the same with
spark-submit.
"""

from __future__ import annotations

from typing import Annotated

import typer

from recspark.cli.common import Env, RunDate, Set, parse_date
from recspark.cli.nightly import Force, Repin, night_context


def stage(
    name: Annotated[str, typer.Argument(help="ingest, sessionize, build_features, train, ...")],
    run_date: RunDate,
    env: Env = "local",
    model: Annotated[
        str | None, typer.Option(help="of a stage per model; all of them if left out")
    ] = None,
    set_: Set = None,
    force: Force = False,
    repin: Repin = False,
) -> None:
    """Run one stage of one night; the stages before it must have ended."""
    from recspark.pipeline.checks import check_stage
    from recspark.pipeline.plan import find_stage
    from recspark.pipeline.run import execute_models

    chosen, night, requested_models = (
        find_stage(name),
        parse_date(run_date),
        (model,) if model else (),
    )
    with night_context(
        env,
        run_date,
        set_,
        force=force,
        repin=repin,
        trains=chosen.trains,
        check=lambda config: check_stage(config, night, chosen, requested_models),
        models=requested_models or None,
        app=f"recspark {name}",
        night_name=f"stage {name} of the night",
    ) as (context, _):
        models = chosen.models(context.config, requested_models)
        for error in execute_models(context, chosen, models).values():
            raise error

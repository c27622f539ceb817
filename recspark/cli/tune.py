"""`recspark tune MODEL`: choose the settings of a model on the split before the backtest."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
import yaml

from recspark.cli.common import Env, Json, RunDate, Set, console, reporter
from recspark.cli.nightly import night_context
from recspark.config import Config
from recspark.config.load import tuned_file


def tune(
    model: Annotated[str, typer.Argument(help="such as ease")],
    run_date: RunDate,
    env: Env = "local",
    set_: Set = None,
    trials: Annotated[int | None, typer.Option(min=1, help="default: tune.n_trials")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="write the best to conf/tuned/SOURCE/MODEL.yaml")
    ] = False,
    as_json: Json = False,
) -> None:
    """Search a model's settings; every trial is recorded in table `tuning`.

    The night's tables must be there: run `recspark nightly` first. The backtest's own horizon is
    never looked at. What is written holds for nights of the same source.
    """
    from recspark.pipeline.tune import check_tunable, search_space
    from recspark.pipeline.tune import tune as search

    report = (lambda _text: None) if as_json else reporter()

    def report_trial(settings: dict[str, Any], value: float) -> None:
        settings_text = ", ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in settings.items()
        )
        report(f"{value:.4f}  {settings_text}")

    def check_model(config: Config) -> None:
        check_tunable(config, model)
        search_space(model, config.settings_of(model))

    with night_context(
        env,
        run_date,
        set_,
        night_name=f"tune {model} of the night",
        report=report,
        app=f"recspark tune {model}",
        trains=True,
        check=check_model,
        models=(model,),
        begins=False,
    ) as (context, _):
        best = search(context, model, trials or context.config.tune.n_trials, report_trial)
    if write:
        path = tuned_file(context.config.source.name, model)
        header = (
            f"# Chosen by `recspark tune {model} --run-date {run_date}` at cutoff {best.cutoff:%Y-%m-%d} "
            f"of source {context.config.source.name}: {best.metric} {best.value:.4f}.\n"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + yaml.safe_dump(best.settings, sort_keys=True), encoding="utf-8")
        report(f"written to {path}")
    if as_json:
        print(json.dumps(best.settings))
    else:
        console.print(f"best of {model}:", best.settings)

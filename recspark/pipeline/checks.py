"""What is known to be wrong with a night before Spark starts."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

from recspark import storage
from recspark.config import Config
from recspark.errors import ConfigError, NoSlotsError, suggest
from recspark.eval.kernel import METRICS
from recspark.models.registry import make, spec_of
from recspark.pipeline.plan import STAGES, Stage, kind_of_model
from recspark.session import most_slots
from recspark.sources import check_places


def check_settings(config: Config) -> None:
    """Raise ConfigError where settings name a model or metric that there is not, or that cannot do
    what it is named for. It says everything at once.
    """
    wrong = []
    for model in dict.fromkeys([*config.models, *config.model_settings]):
        try:
            algorithm = make(model, config.settings_of(model))
            if model in config.models:
                kinds = {name: kind_of_model(config, name) for name in config.needs_of(model)}
                algorithm.check_needs(kinds)
        except ConfigError as error:
            wrong.append(str(error))
    if not wrong:
        wrong += _encoders_that_should_list(config)
    metric = config.evaluate.metric
    if metric not in METRICS:
        wrong.append(f"evaluate.metric = '{metric}' is no metric.{suggest(metric, METRICS)}")
    neighbours = config.publish.neighbours_model
    if neighbours is not None and not wrong:
        able = [model for model in config.models if "neighbours" in _tags(config, model)]
        if neighbours not in able:
            wrong.append(
                f"publish.neighbours_model = '{neighbours}' gives no neighbours; these do: {able}"
            )
    if wrong:
        raise ConfigError("; ".join(wrong))


def _encoders_that_should_list(config: Config) -> list[str]:
    """Return what is wrong with settings that name an encoder where lists are wanted."""
    named = {
        "publish.model": config.publish.model,
        "evaluate.baseline": config.evaluate.baseline,
        **{f"publish.ladder ({step})": step for step in config.publish.ladder},
    }
    return [
        f"{setting} = '{model}' is an encoder, which gives vectors and no lists"
        for setting, model in named.items()
        if kind_of_model(config, model) == "encoder"
    ]


def check_landing(config: Config, run_date: date) -> None:
    """Raise MissingLandingError, or SourceError, where the landing of a night that has not begun is
    not there; a night that has begun may have taken it in, and nobody needs it again.
    """
    begun = storage.join(config.paths.tables, "runs", f"run_date={run_date}")
    if not storage.exists(storage.absolute(begun)):
        check_places(config.source, run_date)


def check_stage(config: Config, run_date: date, stage: Stage, asked: Sequence[str] = ()) -> None:
    """Raise what is wrong with a stage that is asked for, as far as it is known without Spark."""
    stage.models(config, asked)
    if stage is STAGES[0]:
        check_landing(config, run_date)


def check_slots(config: Config, models: Sequence[str]) -> None:
    """Raise NoSlotsError where one of `models` trains on more ranks than tasks can run at once."""
    ranks, slots = config.train.ranks, most_slots(config.spark)
    networks = [model for model in models if "neural" in _tags(config, model)]
    if networks and slots is not None and ranks > slots:
        raise NoSlotsError(
            f"{', '.join(networks)}: train.ranks = {ranks} need as many task slots, spark.master = "
            f"{config.spark.master} has {slots}: set train.ranks={max(slots, 1)}, or give Spark more"
        )


def _tags(config: Config, model: str) -> frozenset[str]:
    return spec_of(model, config.settings_of(model)).tags

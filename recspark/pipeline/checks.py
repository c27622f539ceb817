"""Checks of a night that can be made before Spark starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date

from recspark import storage
from recspark.config import Config, Mode
from recspark.data.examples import feature_names
from recspark.errors import ConfigError, NoSlotsError, suggest
from recspark.eval.kernel import METRICS
from recspark.models.base import Algorithm, Settings
from recspark.models.registry import learns_from_examples, make, spec_of
from recspark.pipeline.plan import (
    STAGES,
    Stage,
    kind_of_model,
    learning_rankers,
    models_of,
    vector_models_of,
)
from recspark.session import most_slots
from recspark.sources import check_inputs


def check_settings(config: Config) -> None:
    """Raise ConfigError where settings name a model or metric that does not exist, or that cannot
    do what it is named for. The message has all faults at once.
    """
    faults = []
    for model in dict.fromkeys([*config.models, *config.model_settings]):
        try:
            algorithm = make(model, config.settings_of(model))
            if model in config.models:
                kinds_of_needs = {
                    name: kind_of_model(config, name) for name in config.needs_of(model)
                }
                algorithm.check_needs(kinds_of_needs)
                _check_learning(config, model, algorithm)
        except ConfigError as error:
            faults.append(str(error))
    if not faults:
        faults += _encoders_instead_of_lists(config)
        faults += _vectors_that_nobody_reads(config)
        faults += _features_that_are_none(config)
        for published_list in config.publish.published_lists:
            faults += modes_never_learnt(config, published_list.steps, published_list.mode)
    metric = config.evaluate.metric
    if metric not in METRICS:
        faults.append(f"evaluate.metric = '{metric}' is no metric.{suggest(metric, METRICS)}")
    neighbours = config.publish.neighbours_model
    if neighbours is not None and not faults:
        capable_models = [model for model in config.models if "neighbours" in _tags(config, model)]
        if neighbours not in capable_models:
            faults.append(
                f"publish.neighbours_model = '{neighbours}' gives no neighbours; "
                f"these do: {capable_models}"
            )
    if faults:
        raise ConfigError("; ".join(faults))


def _encoders_instead_of_lists(config: Config) -> list[str]:
    """Return a message for each setting that names an encoder where lists are needed."""
    settings = [*config.publish.named_models(), ("evaluate.baseline", config.evaluate.baseline)]
    return [
        f"{setting} = '{model}' is an encoder, which gives vectors and no lists"
        for setting, model in settings
        if kind_of_model(config, model) == "encoder"
    ]


def _check_learning(config: Config, model: str, algorithm: Algorithm[Settings]) -> None:
    """Raise ConfigError where a ranker and its setting `learns` disagree on whether it needs
    examples.
    """
    settings = config.settings_of(model)
    if kind_of_model(config, model) != "ranker":
        return
    if learns_from_examples(model, settings) != algorithm.needs_examples:
        does, value = ("needs", "true") if algorithm.needs_examples else ("needs no", "false")
        raise ConfigError(
            f"model '{model}' {does} examples with these settings: say so, models.{model}.learns={value}"
        )


def modes_never_learnt(config: Config, models: Iterable[str], mode: Mode) -> list[str]:
    """Return a message for each ranker among `models` that would list in a mode whose lists it has
    not learnt from.

    `models` : those of one published list. `mode` : the mode of that list.
    """
    return [
        f"'{model}' is a ranker and lists in mode {mode}, but examples.modes = "
        f"{[*config.examples.modes]}: it would order lists of a kind that it never saw. Add {mode} "
        "to examples.modes"
        for model in models
        if model in learning_rankers(config) and mode not in config.examples.modes
    ]


def _vectors_that_nobody_reads(config: Config) -> list[str]:
    """Return a message for each model of `examples.vectors` that no learning ranker needs."""
    rankers = learning_rankers(config)
    read = {name for ranker in rankers for name in vector_models_of(config, ranker)}
    return [
        f"examples.vectors names '{name}', which none of {sorted(rankers)} needs: add it to the `needs` "
        f"of one of them.{suggest(name, config.models)}"
        for name in config.examples.vectors
        if rankers and name not in read
    ]


def _features_that_are_none(config: Config) -> list[str]:
    """Return a message for each name in `examples.honest_features` that no ranker's feature has."""
    rankers = models_of(config, "ranker")
    known_names = {
        name
        for ranker in rankers
        for name in feature_names(
            models_of(config, "retriever", among=config.needs_of(ranker)),
            config.examples.features,
            vector_models_of(config, ranker),
        )
    }
    return [
        f"examples.honest_features names '{name}', which is no feature of tonight's rankers."
        f"{suggest(name, known_names)}"
        for name in config.examples.honest_features
        if rankers and name not in known_names
    ]


def check_landing(config: Config, run_date: date) -> None:
    """Raise MissingLandingError or SourceError where the landing of a night that has not begun is
    missing.

    A night that has begun may have ingested its landing already, which is then not needed again.
    """
    runs_of_night = storage.join(config.paths.tables, "runs", f"run_date={run_date}")
    if not storage.exists(storage.absolute(runs_of_night)):
        check_inputs(config.source, run_date)


def check_stage(
    config: Config, run_date: date, stage: Stage, requested: Sequence[str] = ()
) -> None:
    """Raise what is wrong with a stage that is to run, as far as that is known without Spark.

    `requested` : the models to run it for; () = all models of its kinds.
    """
    stage.models(config, requested)
    if stage is STAGES[0]:
        check_landing(config, run_date)


def check_slots(config: Config, models: Sequence[str]) -> None:
    """Raise NoSlotsError where one of `models` trains on more ranks than tasks can run at the same
    time.
    """
    ranks, slots = config.train.ranks, most_slots(config.spark)
    on_ranks = [m for m in models if spec_of(m, config.settings_of(m)).depends_on_ranks]
    if on_ranks and slots is not None and ranks > slots:
        raise NoSlotsError(
            f"{', '.join(on_ranks)}: train.ranks = {ranks} need as many task slots, spark.master = "
            f"{config.spark.master} has {slots}: set train.ranks={max(slots, 1)}, or give Spark more"
        )


def _tags(config: Config, model: str) -> frozenset[str]:
    return spec_of(model, config.settings_of(model)).tags

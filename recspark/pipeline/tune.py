"""Choosing a model's settings on the split before the backtest, and recording what was tried."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import optuna
from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.data import features
from recspark.data.dataset import Dataset
from recspark.data.encoded import with_features
from recspark.data.interactions import before, queries
from recspark.errors import ConfigError
from recspark.eval import evaluate as scoring
from recspark.models.base import FitOptions, RetrieverModel
from recspark.models.registry import make, spec_of
from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import kind_of_model
from recspark.pipeline.training_sets import training_set, write_training


@dataclass(frozen=True)
class Chosen:
    """The best settings, and what they reached: `value` of `metric` at `cutoff`."""

    settings: dict[str, Any]
    metric: str
    value: float
    cutoff: datetime


def tune(
    context: RunContext, model: str, n_trials: int, told: Callable[[dict[str, Any], float], None]
) -> Chosen:
    """Return the best settings of `model` found in `n_trials`, all of them written to `tuning`.

    The split: cutoff two horizons before the published one, truth in the horizon that follows, so
    that the backtest's own horizon is never looked at. Trial 0 has the configured settings. The
    search is Optuna's TPE with `tune.seed`; ranges come from the fields of the model's config
    class. `told` hears each trial. The tables of the night must be there (`build_features` has
    ended).
    """
    config = context.config
    configured = config.settings_of(model)
    if kind_of_model(config, model) != "retriever" or config.needs_of(model):
        raise ConfigError(
            f"'{model}' is built on other models or gives no lists; only retrievers that need no other "
            "model can be tuned"
        )
    space = search_space(model, configured)
    cutoff = context.backtest_cutoff - timedelta(days=config.evaluate.horizon_days)
    data, kept = _dataset(context, cutoff, make(model, configured).training_tables)
    mode = config.publish.mode
    everyone = context.read("histories")
    truths = scoring.truth(everyone, cutoff, config.evaluate.horizon_days)
    known = data.histories.select("user_idx", "seen").join(
        data.user_features.select("user_idx", "activity"), on="user_idx", how="inner"
    )
    users = scoring.population(truths, known).persist(StorageLevel.MEMORY_AND_DISK)
    items = scoring.catalogue(data.item_features)
    asked = queries(
        data.histories.join(truths.select("user_idx"), on="user_idx", how="left_semi"),
        mode,
    ).persist(StorageLevel.MEMORY_AND_DISK)
    settings = config.evaluate.model_copy(update={"n_bootstrap": 0})
    rows: list[tuple[Any, ...]] = []

    def value_of(trial: optuna.Trial) -> float:
        started = time.monotonic()
        values = {**configured, **{name: _suggest(trial, name, how) for name, how in space.items()}}
        with fit_options(context, model) as options:
            fitted = make(model, values).fit(data, options)
            assert isinstance(fitted, RetrieverModel)
            read = with_features(asked, data.user_features, fitted.user_encoding)
            lists = fitted.recommend(read, max(settings.ks)).select(
                F.lit(model).alias("model"),
                F.lit(mode).alias("mode"),
                "user_idx",
                "item_idx",
                "rank",
            )
            found = scoring.evaluate(
                lists,
                users,
                items,
                settings,
                run_date=context.run_date,
                kind="tuning",
                cutoff=cutoff,
                models=(model,),
                modes=(mode,),
            )
        value = next(
            row.value or 0.0
            for row in found
            if (row.metric, row.k, row.segment) == (settings.metric, settings.ks[0], "warm")
        )
        rows.append(
            (trial.number, json.dumps(values, sort_keys=True), value, time.monotonic() - started)
        )
        told(values, value)
        return value

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.tune.seed)
    )
    start = make(model, configured).settings.model_dump()
    study.enqueue_trial({n: start[n] for n, how in space.items() if holds(how, start[n])})
    try:
        study.optimize(value_of, n_trials=n_trials)
    finally:
        for frame in (*kept, users, asked):
            frame.unpersist()
    _write(context, model, cutoff, rows, study.best_trial.number)
    best, value = next((row[1], row[2]) for row in rows if row[0] == study.best_trial.number)
    metric = f"{settings.metric}@{settings.ks[0]}"
    return Chosen(json.loads(best), metric, value, cutoff)


@contextmanager
def fit_options(context: RunContext, model: str) -> Iterator[FitOptions]:
    """Give the options of one trial's fit, with a folder of its own that all workers reach; it is
    removed afterwards, or with the night's checkpoints where this process is killed.
    """
    root = storage.absolute(context.config.paths.checkpoints)
    scratch = storage.join(root, f"{context.run_date}", f"tune-{model}-{uuid.uuid4().hex}")
    try:
        yield FitOptions(train=context.config.train, scratch=scratch, progress=context.progress)
    finally:
        storage.remove(scratch)


def search_space(
    model: str, configured: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Return field -> range of the model's tunable settings; ConfigError where it has none.

    Without those that the settings as `configured` have no use for.
    """
    fields = spec_of(model, configured or {}).load().settings_class.model_fields
    values = {name: field.default for name, field in fields.items()} | dict(configured or {})
    space = {}
    for name, field in fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and "tune" in extra:
            how: dict[str, Any] = extra["tune"]  # type: ignore[assignment]
            unless = how.get("unless", {})
            if not any(values[other] == value for other, value in unless.items()):
                space[name] = {key: value for key, value in how.items() if key != "unless"}
    if not space:
        raise ConfigError(f"model '{model}' has no setting with a range to search")
    return space


def holds(how: dict[str, Any], value: Any) -> bool:
    """Return whether the range `how` of `search_space` holds a value that is configured."""
    if value is None:
        return False
    return value in how["choices"] if "choices" in how else how["low"] <= value <= how["high"]


def _suggest(trial: optuna.Trial, name: str, how: dict[str, Any]) -> Any:
    if "choices" in how:
        return trial.suggest_categorical(name, how["choices"])
    if how.get("int"):
        return trial.suggest_int(name, how["low"], how["high"], log=bool(how.get("log")))
    value = trial.suggest_float(name, how["low"], how["high"], log=bool(how.get("log")))
    return float(f"{value:.3g}")  # what is written to a YAML file should be readable


def _dataset(
    context: RunContext, cutoff: datetime, training_tables: Sequence[str]
) -> tuple[Dataset, list[DataFrame]]:
    """Return the data before `cutoff`, kept in memory for the trials; only the feed's tables are
    written.
    """
    config = context.config
    every = context.read("histories")
    histories = before(every, cutoff, ratings=config.features.explicit).persist(
        StorageLevel.MEMORY_AND_DISK
    )
    items = features.items_as_of(context.read("items"), cutoff)
    item_features = features.item_features(histories, items, cutoff).persist(
        StorageLevel.MEMORY_AND_DISK
    )
    training = {}
    for table in training_tables:
        written = write_training(context, table, histories, cutoff)
        training[table] = training_set(context.catalog, table, written.version, {"cutoff": cutoff})
    data = Dataset(
        cutoff=cutoff,
        histories=histories,
        items=item_features.select("item_idx").join(items, on="item_idx", how="left"),
        user_features=features.user_features(histories, cutoff).drop("cutoff"),
        item_features=item_features.drop("cutoff"),
        training=training,
    )
    return data, [histories, item_features]


def _write(
    context: RunContext, model: str, cutoff: datetime, rows: list[tuple[Any, ...]], best: int
) -> None:
    settings, mode = context.config.evaluate, context.config.publish.mode
    frame = context.spark.createDataFrame(
        [
            (cutoff, settings.horizon_days, model, mode, f"{settings.metric}@{settings.ks[0]}",
             number, values, value, number == best, round(seconds, 3))
            for number, values, value, seconds in rows
        ],
        schema.TUNING,
    )  # fmt: skip
    context.catalog.replace_slice("tuning", frame, {"model": model, "cutoff": cutoff, "mode": mode})

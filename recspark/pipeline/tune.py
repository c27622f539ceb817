"""Choosing a model's settings on the split before the backtest, and recording every trial."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import optuna
from pyspark import StorageLevel
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Config
from recspark.data import features
from recspark.data.dataset import Dataset
from recspark.data.feature_encoding import with_features
from recspark.data.interactions import before, queries
from recspark.errors import ConfigError
from recspark.eval import evaluate as scoring
from recspark.models.base import FitOptions, RetrieverModel
from recspark.models.registry import lists_only_own_items, make, spec_of
from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import kind_of_model
from recspark.pipeline.training_sets import training_set, write_training


@dataclass(frozen=True)
class Chosen:
    """The best settings of a search, and what they reached.

    Parameters
    ----------
    value : the value of `metric` at `cutoff`
    """

    settings: dict[str, Any]
    metric: str
    value: float
    cutoff: datetime


def tune(
    context: RunContext,
    model: str,
    n_trials: int,
    on_trial: Callable[[dict[str, Any], float], None],
) -> Chosen:
    """Return the best settings of `model` among `n_trials` trials, and write all trials to
    `tuning`.

    The split: the cutoff lies one horizon before the backtest's, and the truth is what users do
    in the horizon that follows. So the backtest's own horizon is never looked at. Example: with
    a horizon of 7 days and a backtest cutoff at 2024-05-25, trials learn from events before
    2024-05-18 and are judged by events from 2024-05-18 to 2024-05-24.

    Trial 0 has the configured settings. The search is Optuna's TPE with `tune.seed`. The ranges
    come from the fields of the model's config class. `on_trial` is called after each trial with its
    settings and its value. The tables of the night must exist (`build_features` has ended).

    Raises ConfigError as `check_tunable` and `search_space` do, before anything is read.
    """
    config = context.config
    check_tunable(config, model)
    configured = config.settings_of(model)
    search_ranges = search_space(model, configured)
    cutoff = context.cutoffs.backtest - timedelta(days=config.evaluate.horizon_days)
    data, persisted_frames = _dataset(context, cutoff, make(model, configured).training_tables)
    mode = config.publish.mode
    all_histories = context.read("histories")
    truths = scoring.truth(all_histories, cutoff, config.evaluate.horizon_days)
    known_users = data.histories.select("user_idx", "seen").join(
        data.user_features.select("user_idx", "activity"), on="user_idx", how="inner"
    )
    users = scoring.population(truths, known_users).persist(StorageLevel.MEMORY_AND_DISK)
    items = scoring.catalogue(data.item_features)
    user_queries = queries(
        data.histories.join(truths.select("user_idx"), on="user_idx", how="left_semi"),
        mode,
    ).persist(StorageLevel.MEMORY_AND_DISK)
    evaluate_settings = config.evaluate.model_copy(update={"n_bootstrap": 0})
    rows: list[tuple[Any, ...]] = []

    def value_of(trial: optuna.Trial) -> float:
        started = time.monotonic()
        values = {
            **configured,
            **{
                name: _suggest(trial, name, search_range)
                for name, search_range in search_ranges.items()
            },
        }
        with fit_options(context, model) as options:
            fitted = make(model, values).fit(data, options)
            assert isinstance(fitted, RetrieverModel)
            encoded_queries = with_features(user_queries, data.user_features, fitted.user_encoding)
            lists = fitted.recommend(encoded_queries, max(evaluate_settings.ks)).select(
                F.lit(model).alias("model"),
                F.lit(mode).alias("mode"),
                "user_idx",
                "item_idx",
                "rank",
            )
            metric_rows = scoring.evaluate(
                lists,
                users,
                items,
                evaluate_settings,
                run_date=context.run_date,
                kind="tuning",
                cutoff=cutoff,
                models=(model,),
                modes=(mode,),
            )
        value = next(
            row.value or 0.0
            for row in metric_rows
            if (row.metric, row.k, row.segment)
            == (evaluate_settings.metric, evaluate_settings.ks[0], "warm")
        )
        rows.append(
            (trial.number, json.dumps(values, sort_keys=True), value, time.monotonic() - started)
        )
        on_trial(values, value)
        return value

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.tune.seed)
    )
    start_settings = make(model, configured).settings.model_dump()
    study.enqueue_trial(
        {
            name: start_settings[name]
            for name, search_range in search_ranges.items()
            if holds(search_range, start_settings[name])
        }
    )
    try:
        study.optimize(value_of, n_trials=n_trials)
    finally:
        for frame in (*persisted_frames, users, user_queries):
            frame.unpersist()
    _write_trials(context, model, cutoff, rows, study.best_trial.number)
    best_settings, value = next(
        (row[1], row[2]) for row in rows if row[0] == study.best_trial.number
    )
    metric = f"{evaluate_settings.metric}@{evaluate_settings.ks[0]}"
    return Chosen(json.loads(best_settings), metric, value, cutoff)


def check_tunable(config: Config, model: str) -> None:
    """Raise ConfigError for a model whose trials would tell nothing.

    These are models that need other models, models that give no lists, and, in mode novel, models
    that list only items that the user acted on: their lists are empty with any settings.
    """
    if kind_of_model(config, model) != "retriever" or config.needs_of(model):
        raise ConfigError(
            f"'{model}' is built on other models or gives no lists; only retrievers that need no other "
            "model can be tuned"
        )
    if config.publish.mode == "novel" and lists_only_own_items(model, config.settings_of(model)):
        raise ConfigError(
            f"'{model}' lists only items that the user acted on before, and publish.mode is novel, where "
            "these items are left out: every trial would list nothing and reach 0. Tune it in mode "
            "repeat: --set publish.mode=repeat"
        )


@contextmanager
def fit_options(context: RunContext, model: str) -> Iterator[FitOptions]:
    """Yield the options of one trial's fit, with a scratch folder of its own."""
    with context.scratch_folder(f"tune-{model}") as scratch:
        yield FitOptions(train=context.config.train, scratch=scratch, progress=context.progress)


def search_space(
    model: str, configured: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Return field -> search range, for each setting of the model that can be tuned.

    `configured` are the model's settings in the night, which may name its algorithm. Raises
    ConfigError where the model has no setting to tune.
    """
    fields = spec_of(model, configured or {}).load().settings_class.model_fields
    search_ranges: dict[str, dict[str, Any]] = {
        name: field.json_schema_extra["tune"]  # type: ignore[misc]
        for name, field in fields.items()
        if isinstance(field.json_schema_extra, dict) and "tune" in field.json_schema_extra
    }
    if not search_ranges:
        raise ConfigError(f"model '{model}' has no setting with a range to search")
    return search_ranges


def holds(search_range: dict[str, Any], value: Any) -> bool:
    """Return whether `search_range` (from `search_space`) contains a configured value."""
    if value is None:
        return False
    return (
        value in search_range["choices"]
        if "choices" in search_range
        else search_range["low"] <= value <= search_range["high"]
    )


def _suggest(trial: optuna.Trial, name: str, search_range: dict[str, Any]) -> Any:
    if "choices" in search_range:
        return trial.suggest_categorical(name, search_range["choices"])
    if search_range.get("int"):
        return trial.suggest_int(
            name, search_range["low"], search_range["high"], log=bool(search_range.get("log"))
        )
    value = trial.suggest_float(
        name, search_range["low"], search_range["high"], log=bool(search_range.get("log"))
    )
    return float(f"{value:.3g}")  # rounded, since a person copies the value to a YAML file


def _dataset(
    context: RunContext, cutoff: datetime, training_tables: Sequence[str]
) -> tuple[Dataset, list[DataFrame]]:
    """Return the data before `cutoff`, and the frames of it that are persisted for the trials.

    Only training tables are written, and only those that the model reads.
    """
    config = context.config
    all_histories = context.read("histories")
    histories = before(all_histories, cutoff, ratings=config.features.explicit).persist(
        StorageLevel.MEMORY_AND_DISK
    )
    items, older_items = features.catalogues_as_of(context.read("items"), cutoff)
    item_features = features.item_features(histories, items, cutoff, older_items).persist(
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
        catalogue=items.select(*schema.CONTENT.names),
    )
    return data, [histories, item_features]


def _write_trials(
    context: RunContext, model: str, cutoff: datetime, rows: list[tuple[Any, ...]], best_number: int
) -> None:
    evaluate_settings, mode = context.config.evaluate, context.config.publish.mode
    frame = context.spark.createDataFrame(
        [
            (cutoff, evaluate_settings.horizon_days, model, mode,
             f"{evaluate_settings.metric}@{evaluate_settings.ks[0]}",
             number, values, value, number == best_number, round(seconds, 3))
            for number, values, value, seconds in rows
        ],
        schema.TUNING,
    )  # fmt: skip
    context.catalog.replace_slice("tuning", frame, {"model": model, "cutoff": cutoff, "mode": mode})

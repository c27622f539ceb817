"""Fitted models of a night: the data of a cutoff, where an artifact is kept, and loading it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pyspark.sql import functions as F

from recspark import storage
from recspark.config import Config, digest
from recspark.data import features
from recspark.data.dataset import Dataset
from recspark.data.interactions import before
from recspark.errors import ArtifactError, StageOrderError
from recspark.models import artifacts
from recspark.models.base import FitOptions, RecommenderModel
from recspark.models.registry import make, spec_of
from recspark.pipeline.code import algorithm_code, code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import OK, RunRow
from recspark.pipeline.training_sets import training_set
from recspark.train.curve import Curve

# What makes the data that every model is fitted on.
_DATA_MODULES = ("recspark.data.features", "recspark.data.interactions")
# In the detail of the row of `train`, beside cutoff -> folder of the artifact:
RECIPE = "recipe"  # what made them but their data
BACKTEST_OF = (
    "backtest_of_run"  # the run whose artifact the backtest takes, where it is not this one
)
NOT_FITTED = "not_fitted"  # in the detail of a `runs` row: cutoff -> why there is no model of it


def fit(context: RunContext, model: str, cutoff: datetime) -> str:
    """Fit one model on everything before `cutoff`, or find it fitted; return its artifact's folder."""
    recommender = make(model, context.config.settings_of(model))
    folder = artifact_folder(context, model, cutoff)
    made_of = _made_of(context, model)
    if not context.force and _is_of(folder, made_of):
        context.progress(f"  {model} as of {cutoff:%Y-%m-%d}: artifact of the same inputs and code")
        return folder
    data = dataset(context, cutoff, recommender.training_table)
    told: list[Curve] = []
    options = FitOptions(
        train=context.config.train,
        scratch=checkpoint_folder(context, model, cutoff),
        progress=context.progress,
        record=told.append,
    )
    fitted = recommender.fit(data, options)
    artifacts.save(fitted, folder, told[0].to_dict() if told else None, made_of)
    storage.remove(options.scratch)
    return folder


def dataset(context: RunContext, cutoff: datetime, training_table: str | None) -> Dataset:
    """Return everything before `cutoff`, from the versions that this run reads, and the training
    set of `training_table`.
    """
    at = F.col("cutoff") == F.lit(cutoff)
    items = features.items_as_of(context.read("items"), cutoff)
    item_features = context.read("item_features").where(at).drop("cutoff")
    version = context.version(training_table) if training_table else None
    return Dataset(
        cutoff=cutoff,
        histories=before(
            context.read("histories"), cutoff, ratings=context.config.features.explicit
        ),
        interactions=context.read("interactions").where(at).drop("cutoff"),
        items=item_features.select("item_idx").join(items, on="item_idx", how="left"),
        user_features=context.read("user_features").where(at).drop("cutoff"),
        item_features=item_features,
        training=None
        if training_table is None or version is None
        else training_set(context.catalog, training_table, version, {"cutoff": cutoff}),
    )


def recipe(config: Config, model: str) -> str:
    """Return the digest of all that makes a model but its data: settings, seed, and the code of the
    algorithm and of its data. No other code makes it be trained again.
    """
    settings = config.settings_of(model)
    is_network = "neural" in spec_of(model, settings).tags
    return digest(
        {
            "settings": settings,
            "features": config.features.model_dump(),
            "training": config.train.arithmetic() if is_network else {"seed": config.train.seed},
            "code": [algorithm_code(config, model), code_digest(*_DATA_MODULES)],
        }
    )


def artifact_folder(context: RunContext, model: str, cutoff: datetime) -> str:
    """Return where the model of this cutoff is kept, if it is fitted on the data that this run reads."""
    config = context.config
    inputs = {table: context.version(table) for table in _inputs(config, model)}
    key = digest({"recipe": recipe(config, model), "inputs": inputs})
    return storage.join(storage.absolute(config.paths.artifacts), model, f"{cutoff:%Y-%m-%d}", key)


def artifact_name(folder: str) -> str:
    """Return model/cutoff/key of an artifact's folder: its name below any root."""
    return "/".join(folder.rsplit("/", 3)[1:])


def _inputs(config: Config, model: str) -> tuple[str, ...]:
    """Return the tables that a model is fitted on."""
    training = spec_of(model, config.settings_of(model)).training
    return ("histories", "item_features", "items", *training)


def _made_of(context: RunContext, model: str) -> dict[str, Any]:
    """Return version and commit of what a model is fitted on, and of the dictionary of its items."""
    tables = (*_inputs(context.config, model), "item_ids")
    return {table: context.catalog.identity(table, context.version(table)) for table in tables}


def _is_of(folder: str, made_of: Mapping[str, Any]) -> bool:
    """Return whether a whole artifact lies there, made of these commits: a table put back from a
    backup has other commits of the same numbers.
    """
    try:
        return storage.is_complete(folder) and artifacts.made_of(folder) == made_of
    except ArtifactError:  # it is damaged: it is made again
        return False


@dataclass(frozen=True)
class Kept:
    """A fitted model of the backtest's cutoff.

    Parameters
    ----------
    folder : of its artifact
    run_id : of the night that fitted it as its own; None where this run does
    """

    folder: str
    run_id: str | None


def backtest_artifact(context: RunContext, model: str) -> Kept:
    """Return the artifact that the backtest takes: as fitted on the night of its cutoff, where that
    was by the same recipe, and the integers of items are the same; else one that is made tonight.

    What was fitted that night is what was published then, without what came late. One small job a
    process.
    """
    night = context.backtest_cutoff.date() - timedelta(days=1)
    day = f"{context.backtest_cutoff:%Y-%m-%d}"
    made_by = recipe(context.config, model)
    for row in context.runlog.trained(night, model):
        kept = row.detail.get(day)
        if row.detail.get(RECIPE) != made_by or kept is None:
            continue
        folder = _folder(context, kept)
        if storage.is_complete(folder) and _has_items_of(context, folder):
            return Kept(folder, row.run_id)
    return Kept(artifact_folder(context, model, context.backtest_cutoff), None)


def _has_items_of(context: RunContext, folder: str) -> bool:
    """Return whether the integers of a model's items stand for the same items now."""
    try:
        then = artifacts.made_of(folder).get("item_ids")
    except ArtifactError:
        return False
    now = context.version("item_ids")
    return then is not None and context.catalog.extends("item_ids", now, then)


def artifacts_of(context: RunContext, row: RunRow) -> list[str]:
    """Return the folders of the artifacts that a row of `train` names, that of the backtest first."""
    days = [f"{cutoff:%Y-%m-%d}" for cutoff in (context.backtest_cutoff, context.cutoff)]
    return [_folder(context, row.detail[day]) for day in days if day in row.detail]


def _folder(context: RunContext, kept: str) -> str:
    return storage.join(storage.absolute(context.config.paths.artifacts), kept)


def checkpoint_folder(context: RunContext, model: str, cutoff: datetime) -> str:
    """Return where this run's training of a model keeps checkpoints; other code does not go on from
    them.
    """
    run = f"{context.run_date}/{context.run_id}/{algorithm_code(context.config, model)}"
    root = storage.absolute(context.config.paths.checkpoints)
    return storage.join(root, run, model, f"{cutoff:%Y-%m-%d}")


def backtest_model(context: RunContext, model: str) -> RecommenderModel | None:
    """Return the model fitted for the backtest; None where `train` found too little to fit it on."""
    row = context.runlog.find("train", model)
    cutoff = context.backtest_cutoff
    if row is not None and f"{cutoff:%Y-%m-%d}" in row.detail.get(NOT_FITTED, {}):
        return None
    return load_model(context, model, cutoff)


def load_model(context: RunContext, model: str, cutoff: datetime) -> RecommenderModel:
    """Return the fitted model of this run; StageOrderError where it was not trained."""
    row = context.runlog.find("train", model)
    kept = None if row is None else row.detail.get(f"{cutoff:%Y-%m-%d}")
    same = row is not None and row.detail.get(RECIPE) == recipe(context.config, model)
    if kept is None or not same or not storage.is_complete(_folder(context, kept)):
        raise StageOrderError(
            f"no artifact of model '{model}' as of {cutoff:%Y-%m-%d} for run {context.run_id}; run stage "
            f"train for it first (the code or the settings may have changed since)"
        )
    spec = spec_of(model, context.config.settings_of(model))
    return artifacts.load(_folder(context, kept), spec)


def not_compared(context: RunContext) -> dict[str, str]:
    """Return model -> why it has no lists of the backtest, of this night's models without."""
    day = f"{context.backtest_cutoff:%Y-%m-%d}"
    out = {}
    for model in context.config.models:
        rows = [context.runlog.find(stage, model) for stage in ("train", "recommend")]
        failed = [row for row in rows if row is not None and row.status != OK]
        if failed:
            out[model] = f"{failed[0].stage} failed, {failed[0].detail.get('error')}"
        elif None in rows:
            out[model] = f"{'recommend' if rows[0] else 'train'} has not ended in this run"
        elif why := rows[0].detail.get(NOT_FITTED, {}).get(day):  # type: ignore[union-attr]
            out[model] = why
    return out

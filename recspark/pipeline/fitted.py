"""Fitted models of a night: the data of a cutoff, where an artifact is kept, and loading it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import storage
from recspark.config import Config, digest
from recspark.data import features
from recspark.data.content import content_as_of
from recspark.data.dataset import Dataset, Examples
from recspark.data.encoded import Encoding, with_features
from recspark.data.interactions import before
from recspark.errors import ArtifactError, EmptyDataError, StageOrderError
from recspark.models import artifacts
from recspark.models.base import FitOptions, FittedModel, RetrieverModel
from recspark.models.registry import make, spec_of
from recspark.pipeline.code import algorithm_code, code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import kind_of_model, models_of
from recspark.pipeline.runlog import OK, RunRow
from recspark.pipeline.training_sets import features_as_of, training_set
from recspark.train.curve import Curve

# What makes the data that every model is fitted on.
_DATA_MODULES = ("recspark.data.features", "recspark.data.interactions")
# What makes the examples of a ranker.
_EXAMPLES_MODULES = ("recspark.data.examples", "recspark.pipeline.stages.examples")
# In the detail of the row of `train`, beside cutoff -> folder of the artifact:
RECIPE = "recipe"  # what made them but their data
BACKTEST_OF = (
    "backtest_of_run"  # the run whose artifact the backtest takes, where it is not this one
)
# In the detail of the row of `examples`: the cutoffs that there are examples of, and their encoding.
MADE, ENCODING = "made", "encoding"
NOT_FITTED = "not_fitted"  # in the detail of a `runs` row: cutoff -> why there is no model of it


def fit(context: RunContext, model: str, cutoff: datetime) -> str:
    """Fit one model on everything before `cutoff`, or find it fitted; return its artifact's folder."""
    algorithm = make(model, context.config.settings_of(model))
    folder = artifact_folder(context, model, cutoff)
    made_of = _made_of(context, model)
    if not context.force and _is_of(folder, made_of):
        context.progress(f"  {model} as of {cutoff:%Y-%m-%d}: artifact of the same inputs and code")
        return folder
    data = dataset(context, cutoff, model)
    needed = {name: load_model(context, name, cutoff) for name in context.config.needs_of(model)}
    told: list[Curve] = []
    options = FitOptions(
        train=context.config.train,
        scratch=checkpoint_folder(context, model, cutoff),
        progress=context.progress,
        record=told.append,
    )
    fitted = algorithm.fit(data, options, needed)
    artifacts.save(fitted, folder, told[0].to_dict() if told else None, made_of)
    storage.remove(options.scratch)
    return folder


def dataset(context: RunContext, cutoff: datetime, model: str) -> Dataset:
    """Return everything before `cutoff` that a model is fitted on, from the versions that this run
    reads.
    """
    config = context.config
    at = F.col("cutoff") == F.lit(cutoff)
    items = features.items_as_of(context.read("items"), cutoff)
    item_features = context.read("item_features").where(at).drop("cutoff")
    training = {
        table: training_set(context.catalog, table, version, {"cutoff": cutoff})
        for table in make(model, config.settings_of(model)).training_tables
        if (version := context.version(table)) is not None
    }
    encoders = models_of(config, "encoder", among=config.needs_of(model))
    return Dataset(
        cutoff=cutoff,
        histories=before(
            context.read("histories"), cutoff, ratings=context.config.features.explicit
        ),
        items=item_features.select("item_idx").join(items, on="item_idx", how="left"),
        user_features=context.read("user_features").where(at).drop("cutoff"),
        item_features=item_features,
        training=training,
        vectors={name: item_vectors(context, name, cutoff) for name in encoders},
        examples=examples_of(context, model, cutoff)
        if kind_of_model(config, model) == "ranker"
        else None,
    )


def item_vectors(context: RunContext, encoder: str, cutoff: datetime) -> DataFrame:
    """Return `item_idx, vector` of the items as they were before `cutoff`, by the encoder as fitted
    then; of items that it has a vector of.
    """
    row = context.runlog.find("encode", encoder)
    if row is None:
        raise StageOrderError(
            f"encoder '{encoder}' has no vectors in run {context.run_id}; encode first"
        )
    stored = context.catalog.read("item_vectors", row.outputs["item_vectors"])
    mine = (F.col("encoder") == F.lit(encoder)) & F.col("vector").isNotNull()
    of_artifact = F.col("artifact") == F.lit(vectors_key(context, encoder, cutoff))
    now = content_as_of(context.read("items"), cutoff).select("item_idx", "content")
    return (
        stored.where(mine & of_artifact)
        .join(now, on=["item_idx", "content"], how="left_semi")
        .select("item_idx", "vector")
    )


def examples_of(context: RunContext, ranker: str, cutoff: datetime) -> Examples:
    """Return what a ranker of `cutoff` learns from; EmptyDataError where there is none."""
    row = context.runlog.find("examples", ranker)
    if row is None:
        raise StageOrderError(
            f"ranker '{ranker}' has no examples in run {context.run_id}; make them first"
        )
    made = [datetime.fromisoformat(day) for day in row.detail[MADE]]
    cutoffs = [c for c in context.examples_before(cutoff) if c in made]
    if not cutoffs:
        raise EmptyDataError(
            f"{ranker}: no examples end before {cutoff:%Y-%m-%d}; the shop, or the grid "
            "examples.every_days, is too young for it"
        )
    rows = context.catalog.read("examples", row.outputs["examples"]).where(
        (F.col("model") == F.lit(ranker)) & F.col("cutoff").isin(cutoffs)
    )
    return Examples(rows.drop("model", "sources"), Encoding.of_text(row.detail[ENCODING]))


def recipe(config: Config, model: str) -> str:
    """Return the digest of all that makes a model but its data: settings, seed, and the code of the
    algorithm and of its data. No other code makes it be trained again.
    """
    settings = config.settings_of(model)
    learns_from: Any = None
    if kind_of_model(config, model) == "ranker":
        learns_from = [
            config.examples.model_dump(),
            config.evaluate.horizon_days,
            config.publish.mode,
            config.n_candidates,
            code_digest(*_EXAMPLES_MODULES),
        ]
    is_network = "neural" in spec_of(model, settings).tags
    return digest(
        {
            "settings": settings,
            "features": config.features.model_dump(),
            "training": config.train.arithmetic() if is_network else {"seed": config.train.seed},
            "code": [algorithm_code(config, model), code_digest(*_DATA_MODULES)],
            "needs": [recipe(config, name) for name in config.needs_of(model)],
            "examples": learns_from,
        }
    )


def artifact_folder(context: RunContext, model: str, cutoff: datetime) -> str:
    """Return where the model of this cutoff is kept, if it is fitted on the data that this run reads
    and on the models that it needs.
    """
    config = context.config
    inputs = {table: version for table, (version, _) in _made_of(context, model).items()}
    inputs.pop("item_ids")
    made_by: dict[str, Any] = {"recipe": recipe(config, model), "inputs": inputs}
    if needs := config.needs_of(model):
        made_by["needs"] = [artifact_key(context, name, cutoff) for name in needs]
    key = digest(made_by)
    return storage.join(storage.absolute(config.paths.artifacts), model, f"{cutoff:%Y-%m-%d}", key)


def artifact_key(context: RunContext, model: str, cutoff: datetime) -> str:
    """Return cutoff/key of the artifact that this run has of a model; StageOrderError without one."""
    return folder_of(context, model, cutoff).split("/", 1)[1]


def vectors_key(context: RunContext, encoder: str, cutoff: datetime) -> str:
    """Return what an encoder's vectors in `item_vectors` are kept under: that of its artifact, or of its
    recipe alone where it learns nothing from data.
    """
    key = artifact_key(context, encoder, cutoff)
    spec = spec_of(encoder, context.config.settings_of(encoder))
    return key if spec.load().learns else recipe(context.config, encoder)


def why_not_fitted(context: RunContext, model: str, cutoff: datetime) -> str | None:
    """Return why `train` of this run has no model of a cutoff: too little to fit it on; else None."""
    row = context.runlog.find("train", model)
    why: str | None = (
        None if row is None else row.detail.get(NOT_FITTED, {}).get(f"{cutoff:%Y-%m-%d}")
    )
    return why


def folder_of(context: RunContext, model: str, cutoff: datetime) -> str:
    """Return model/cutoff/key of the artifact that this run has; StageOrderError without one."""
    row = context.runlog.find("train", model)
    kept: str | None = None if row is None else row.detail.get(f"{cutoff:%Y-%m-%d}")
    if why := why_not_fitted(context, model, cutoff):
        raise EmptyDataError(f"model '{model}' as of {cutoff:%Y-%m-%d}: {why}")
    same = row is not None and row.detail.get(RECIPE) == recipe(context.config, model)
    if kept is None or not same or not storage.is_complete(_folder(context, kept)):
        raise StageOrderError(
            f"no artifact of model '{model}' as of {cutoff:%Y-%m-%d} for run {context.run_id}; run stage "
            f"train for it first (the code or the settings may have changed since)"
        )
    return kept


def cutoffs_of(context: RunContext, model: str) -> tuple[datetime, ...]:
    """Return the cutoffs that tonight fits a model at, that of the published lists last.

    What a ranker is built on is fitted at the cutoffs of its examples, too.
    """
    config = context.config
    rankers = models_of(config, "ranker")
    if model in config.with_needs(rankers) and model not in rankers:
        return context.cutoffs
    return context.backtest_cutoff, context.cutoff


def sources_of(context: RunContext, ranker: str) -> tuple[str, ...]:
    """Return the retrievers whose candidates a ranker scores."""
    return models_of(context.config, "retriever", among=context.config.needs_of(ranker))


def artifact_name(folder: str) -> str:
    """Return model/cutoff/key of an artifact's folder: its name below any root."""
    return "/".join(folder.rsplit("/", 3)[1:])


def _made_of(context: RunContext, model: str) -> dict[str, Any]:
    """Return version and commit of what a model is fitted on, and of the dictionary of its items."""
    config = context.config
    training = make(model, config.settings_of(model)).training_tables
    versions = {
        table: context.version(table)
        for table in ("histories", "item_features", "items", *training, "item_ids")
    }
    if kind_of_model(config, model) == "ranker" and (row := context.runlog.find("examples", model)):
        versions["examples"] = row.outputs["examples"]
    return {table: context.catalog.identity(table, v) for table, v in versions.items()}


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


def kept_artifact(context: RunContext, model: str, cutoff: datetime) -> Kept:
    """Return the artifact of a cutoff before tonight's: as fitted on the night of that cutoff, or kept
    by a night since, where that was by the same recipe, and the integers of items are the same; else
    one that is made tonight.

    What was fitted that night is what was published then, without what came late. One small job a
    process and cutoff.
    """
    night = cutoff.date() - timedelta(days=1)
    day = f"{cutoff:%Y-%m-%d}"
    made_by = recipe(context.config, model)
    nights = (night, night)
    if cutoff != context.backtest_cutoff:
        oldest = min(context.cutoffs).date()
        nights = (oldest - timedelta(days=1), context.run_date - timedelta(days=1))
    for row in context.runlog.trained(*nights, model):
        kept = row.detail.get(day)
        if row.detail.get(RECIPE) != made_by or kept is None:
            continue
        folder = _folder(context, kept)
        if storage.is_complete(folder) and _has_items_of(context, folder):
            return Kept(folder, row.run_id)
    return Kept(artifact_folder(context, model, cutoff), None)


def _has_items_of(context: RunContext, folder: str) -> bool:
    """Return whether the integers of a model's items stand for the same items now."""
    try:
        then = artifacts.made_of(folder).get("item_ids")
    except ArtifactError:
        return False
    now = context.version("item_ids")
    return then is not None and context.catalog.extends("item_ids", now, then)


def artifacts_of(context: RunContext, row: RunRow) -> list[str]:
    """Return the folders of the artifacts that a row of `train` names, that of tonight last."""
    days = [f"{cutoff:%Y-%m-%d}" for cutoff in context.cutoffs]
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


def backtest_model(context: RunContext, model: str) -> FittedModel | None:
    """Return the model fitted for the backtest; None where `train` found too little to fit it on."""
    cutoff = context.backtest_cutoff
    return None if why_not_fitted(context, model, cutoff) else load_model(context, model, cutoff)


def load_model(context: RunContext, model: str, cutoff: datetime) -> FittedModel:
    """Return the fitted model of this run; StageOrderError where it was not trained, EmptyDataError
    where `train` found too little to fit it on.
    """
    spec = spec_of(model, context.config.settings_of(model))
    return artifacts.load(_folder(context, folder_of(context, model, cutoff)), spec)


def load_retriever(context: RunContext, model: str, cutoff: datetime) -> RetrieverModel:
    """Return `load_model` of a model that is a retriever."""
    fitted = load_model(context, model, cutoff)
    assert isinstance(fitted, RetrieverModel), model
    return fitted


def with_what_it_reads(context: RunContext, fitted: FittedModel, asked: DataFrame) -> DataFrame:
    """Return the queries `asked`, with their users' features as of the model's cutoff where it reads
    them.
    """
    if fitted.user_encoding is None:  # then the tables are not looked at
        return asked
    features, _ = features_as_of(context, fitted.cutoff)
    return with_features(asked, features, fitted.user_encoding)


def not_compared(context: RunContext) -> dict[str, str]:
    """Return model -> why it has no lists of the backtest, of this night's models without."""
    out = {}
    for model in models_of(context.config, "retriever", "ranker"):  # those that give lists
        rows = [context.runlog.find(stage, model) for stage in ("train", "recommend")]
        failed = [row for row in rows if row is not None and row.status != OK]
        if failed:
            out[model] = f"{failed[0].stage} failed, {failed[0].detail.get('error')}"
        elif None in rows:
            out[model] = f"{'recommend' if rows[0] else 'train'} has not ended in this run"
        elif why := why_not_fitted(context, model, context.backtest_cutoff):
            out[model] = why
    return out

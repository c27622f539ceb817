"""Fitted models of a night: their data, where their artifacts lie, how they are loaded again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.config import Config, digest
from recspark.data import features
from recspark.data.content import content_as_of
from recspark.data.dataset import Dataset, Examples
from recspark.data.feature_encoding import Encoding, with_features
from recspark.data.interactions import before
from recspark.errors import ArtifactError, EmptyDataError, StageOrderError
from recspark.models import artifacts
from recspark.models.base import FitOptions, FittedModel, RetrieverModel
from recspark.models.registry import make, spec_of
from recspark.pipeline.code_digest import algorithm_code, code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import kind_of_model, learning_rankers, models_of
from recspark.pipeline.runlog import OK, RunRow
from recspark.pipeline.training_sets import features_as_of, training_set
from recspark.train.curve import Curve

# The code that makes the data that every model is fitted on.
_DATA_MODULES = ("recspark.data.features", "recspark.data.interactions")
# The code that makes the examples of a ranker.
_EXAMPLES_MODULES = ("recspark.pipeline.pairs", "recspark.pipeline.stages.examples")
# Keys in the detail of a `runs` row of stage train. Beside them it has cutoff -> artifact's folder.
RECIPE = "recipe"  # the recipe of the artifacts
# The run whose artifact the backtest uses, where it is another run than this one.
BACKTEST_OF = "backtest_of_run"
# Keys in the detail of a `runs` row of stage examples: the cutoffs that have examples, the encoding
# that rankers read, and cutoff -> what is known of its slice. A slice has an encoding of its own,
# under the key `ENCODING` too.
EXAMPLE_CUTOFFS, ENCODING, SLICES = "made", "encoding", "slices"
# Key in the detail of a `runs` row of stage train: cutoff -> why there is no model of that cutoff.
NOT_FITTED = "not_fitted"


def fit(context: RunContext, model: str, cutoff: datetime) -> str:
    """Fit one model on everything before `cutoff`, or find it fitted already; return its artifact's
    folder.

    An artifact that was made from the same inputs by the same code is used as it is, unless the run
    was started with `force`.
    """
    algorithm = make(model, context.config.settings_of(model))
    folder = artifact_folder(context, model, cutoff)
    input_commits = _input_commits(context, model)
    if not context.force and _is_made_of(folder, input_commits):
        context.progress(f"  {model} as of {cutoff:%Y-%m-%d}: artifact of the same inputs and code")
        return folder
    data = dataset(context, cutoff, model)
    needed_models = {
        name: load_model(context, name, cutoff) for name in context.config.needs_of(model)
    }
    curves: list[Curve] = []
    previous = previous_artifact(context, model, cutoff)
    options = FitOptions(
        previous=None
        if previous is None
        else artifacts.load(previous, spec_of(model, context.config.settings_of(model))),
        train=context.config.train,
        scratch=checkpoint_folder(context, model, cutoff),
        progress=context.progress,
        record=curves.append,
    )
    fitted = algorithm.fit(data, options, needed_models)
    artifacts.save(fitted, folder, curves[0].to_dict() if curves else None, input_commits)
    storage.remove(options.scratch)
    return folder


def dataset(context: RunContext, cutoff: datetime, model: str) -> Dataset:
    """Return everything before `cutoff` that a model is fitted on, at the versions that this run
    reads.
    """
    config = context.config
    is_of_cutoff = F.col("cutoff") == F.lit(cutoff)
    items = features.items_as_of(context.read("items"), cutoff)
    item_features = context.read("item_features").where(is_of_cutoff).drop("cutoff")
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
        user_features=context.read("user_features").where(is_of_cutoff).drop("cutoff"),
        item_features=item_features,
        training=training,
        vectors={name: item_vectors(context, name, cutoff) for name in encoders},
        examples=examples_of(context, model, cutoff) if model in learning_rankers(config) else None,
        catalogue=items.select(*schema.CONTENT.names),
    )


def item_vectors(context: RunContext, encoder: str, cutoff: datetime) -> DataFrame:
    """Return `item_idx, vector` by one encoder: of the items as they were described before
    `cutoff`.

    The encoder is the one that was fitted at `cutoff`. Items that it has no vector for are left
    out. Raises StageOrderError where stage encode of this run has not ended for the encoder.
    """
    row = context.runlog.find("encode", encoder)
    if row is None:
        raise StageOrderError(
            f"encoder '{encoder}' has no vectors in run {context.run_id}; encode first"
        )
    stored = context.catalog.read("item_vectors", row.outputs["item_vectors"])
    is_vector_of_encoder = (F.col("encoder") == F.lit(encoder)) & F.col("vector").isNotNull()
    is_of_artifact = F.col("artifact") == F.lit(vectors_key(context, encoder, cutoff))
    current_content = content_as_of(context.read("items"), cutoff).select("item_idx", "content")
    return (
        stored.where(is_vector_of_encoder & is_of_artifact)
        .join(current_content, on=["item_idx", "content"], how="left_semi")
        .select("item_idx", "vector")
    )


def examples_of(context: RunContext, ranker: str, cutoff: datetime) -> Examples:
    """Return the examples that a ranker of `cutoff` learns from.

    Each slice was encoded with the vocabularies of its own cutoff. Here all of them get the codes of
    one encoding, that of the oldest cutoff, so no vocabulary holds anything that happened after one
    of the cutoffs.

    Raises StageOrderError where stage examples of this run has not ended for the ranker,
    EmptyDataError where no examples lie before `cutoff`.
    """
    row = context.runlog.find("examples", ranker)
    if row is None:
        raise StageOrderError(
            f"ranker '{ranker}' has no examples in run {context.run_id}; make them first"
        )
    cutoffs_made = [datetime.fromisoformat(day) for day in row.detail[EXAMPLE_CUTOFFS]]
    cutoffs = [c for c in context.cutoffs.examples_before(cutoff) if c in cutoffs_made]
    if not cutoffs:
        raise EmptyDataError(
            f"{ranker}: no examples end before {cutoff:%Y-%m-%d}: the shop is too young for a ranker, or "
            "its retrievers propose nothing to the users who came back"
        )
    encoding = Encoding.of_text(row.detail[ENCODING])
    rows = context.catalog.read("examples", row.outputs["examples"]).where(
        (F.col("model") == F.lit(ranker)) & F.col("cutoff").isin(cutoffs)
    )
    fields = F.col("fields")
    for made_at in cutoffs:
        own_encoding = Encoding.of_text(row.detail[SLICES][made_at.isoformat()][ENCODING])
        is_of_slice = F.col("cutoff") == F.lit(made_at)
        recoded_fields = own_encoding.recoded(F.col("fields"), encoding)
        fields = F.when(is_of_slice, recoded_fields).otherwise(fields)
    return Examples(rows.drop("model", "sources").withColumn("fields", fields), encoding)


def recipe(config: Config, model: str) -> str:
    """Return the digest of everything that decides a model except its data.

    This is its settings, the seed, the code of the algorithm, the settings and the code that prepare
    its data, and the recipes of the models that it needs; for a ranker that learns also what decides
    its examples. A change of other code or settings does not cause the model to be trained again.

    Every model that learns depends on all of `data_settings`: the settings of sessions decide which
    events are impressions, which no history has, and which events make an order.
    """
    settings = config.settings_of(model)
    spec = spec_of(model, settings)
    learns_from = None
    if model in learning_rankers(config):
        grid = config.examples.model_dump(mode="json", include={"every_days", "n_cutoffs"})
        learns_from = [grid, slice_recipe(config)]
    training = config.train.arithmetic() if spec.depends_on_ranks else {"seed": config.train.seed}
    if spec.depends_on_threads:
        training["threads"] = config.train.threads
    return digest(
        {
            "settings": settings,
            "data": data_settings(config) if spec.load().learns else None,
            "training": training,
            "code": [algorithm_code(config, model), code_digest(*_DATA_MODULES)],
            "needs": [recipe(config, name) for name in config.needs_of(model)],
            "examples": learns_from,
        }
    )


def data_settings(config: Config) -> dict[str, Any]:
    """Return the settings that decide what models learn from, where the events are the same.

    These are all that `build_features` reads, but for those that only say which cutoffs there are
    and in how many files a training set lies.
    """
    return {
        "features": config.features.model_dump(mode="json"),
        "sessions": config.sessions.model_dump(mode="json"),
    }


def slice_recipe(config: Config) -> list[Any]:
    """Return everything that decides the examples of one cutoff except the fitted retrievers and
    the data.

    How many cutoffs there are, and on which grid they lie, changes no example of a cutoff.
    """
    return [
        config.examples.model_dump(mode="json", exclude={"every_days", "n_cutoffs"}),
        data_settings(config),
        config.evaluate.horizon_days,
        config.n_candidates,
        config.train.seed,
        code_digest(*_EXAMPLES_MODULES),
    ]


def artifact_folder(context: RunContext, model: str, cutoff: datetime) -> str:
    """Return the folder of the model of this cutoff, fitted on the data that this run reads.

    The folder's name follows from the recipe, the versions of the tables, and the artifacts of the
    models that this one needs. The folder need not exist yet.
    """
    config = context.config
    inputs = {table: version for table, (version, _) in _input_commits(context, model).items()}
    inputs.pop("item_ids")  # not part of the name; `_is_made_of` compares its commit
    key_parts: dict[str, Any] = {"recipe": recipe(config, model), "inputs": inputs}
    if previous := previous_artifact(context, model, cutoff):
        key_parts["previous"] = artifact_name(previous)
    if needs := config.needs_of(model):
        key_parts["needs"] = [artifact_key(context, name, cutoff) for name in needs]
    key = digest(key_parts)
    return storage.join(storage.absolute(config.paths.artifacts), model, f"{cutoff:%Y-%m-%d}", key)


def previous_artifact(context: RunContext, model: str, cutoff: datetime) -> str | None:
    """Return the folder of the artifact of an earlier night that a fit at `cutoff` may go on from.

    It is the one with the newest cutoff of the last `Algorithm.carried_days` days, of the same
    recipe and the same item integers. None where the algorithm never goes on from another model,
    where there is none, and where the run was started with `force`.
    """
    carried_days = make(model, context.config.settings_of(model)).carried_days
    if not carried_days or context.force:
        return None
    oldest, newest = cutoff - timedelta(days=carried_days), cutoff - timedelta(days=1)
    names = _artifacts_of_days(context, model, oldest, newest, newest.date() - timedelta(days=1))
    of_newest_run = {day_of_artifact(name): name for name in reversed(names)}
    return _first_usable(context, reversed(of_newest_run.values()))


def serving_artifact(context: RunContext, encoder: str, cutoff: datetime) -> str | None:
    """Return the folder of an encoder of an earlier night that is used at `cutoff` too.

    It is the newest one that is less than `Algorithm.refit_days` days older than `cutoff`, of the
    same recipe and the same item integers. None where there is none, and where the run was started
    with `force`.

    Example: with `refit_days` = 7, an encoder that was fitted at the cutoff 2024-05-01 is used at
    all cutoffs until 2024-05-07.
    """
    refit_days = encoder_days(context.config, encoder)
    if refit_days == 1 or context.force:
        return None
    oldest = cutoff - timedelta(days=refit_days - 1)
    last_night = context.run_date - timedelta(days=1)
    return _first_usable(context, _artifacts_of_days(context, encoder, oldest, cutoff, last_night))


def _artifacts_of_days(
    context: RunContext, model: str, oldest: datetime, newest: datetime, last_night: date
) -> list[str]:
    """Return the names of a model's artifacts of the same recipe, of the cutoffs `oldest` to `newest`.

    Those that the runs until `last_night` name. The newest cutoff comes first, and of each cutoff
    the artifact of the newest run.
    """
    first_night = oldest.date() - timedelta(days=1)  # its own cutoff is the day after
    recipe_now, days = recipe(context.config, model), (f"{oldest:%Y-%m-%d}", f"{newest:%Y-%m-%d}")
    names = [
        name
        for row in context.runlog.ended("train", first_night, last_night, model)
        if row.detail.get(RECIPE) == recipe_now
        for name in row.detail.values()
        if isinstance(name, str) and name.startswith(f"{model}/")
        if days[0] <= day_of_artifact(name) <= days[1]
    ]
    return sorted(names, key=day_of_artifact, reverse=True)


def encoder_days(config: Config, model: str) -> int:
    """Return `Algorithm.refit_days` of an encoder; 1 for every other model."""
    is_encoder = kind_of_model(config, model) == "encoder"
    return make(model, config.settings_of(model)).refit_days if is_encoder else 1


def day_of_artifact(name: str) -> str:
    """Return the day of the cutoff that an artifact was fitted at.

    `name` : `model/cutoff/key`, or the folder that ends so.
    """
    return name.rsplit("/", 2)[1]


def artifact_key(context: RunContext, model: str, cutoff: datetime) -> str:
    """Return `cutoff/key` of the artifact that this run has of a model. Raises as `folder_of`."""
    return folder_of(context, model, cutoff).split("/", 1)[1]


def vectors_key(context: RunContext, encoder: str, cutoff: datetime) -> str:
    """Return the value of column `artifact` for an encoder's rows in `item_vectors`.

    This is the key of its artifact, or its recipe alone where the vectors of earlier nights stay
    valid (`Algorithm.keeps_vectors`).
    """
    key = artifact_key(context, encoder, cutoff)
    keeps_vectors = make(encoder, context.config.settings_of(encoder)).keeps_vectors
    return recipe(context.config, encoder) if keeps_vectors else key


def why_not_fitted(context: RunContext, model: str, cutoff: datetime) -> str | None:
    """Return why stage train of this run has no model of a cutoff: there was too little data before
    it.

    Return None where it has one, or where the stage has not ended.
    """
    row = context.runlog.find("train", model)
    reason: str | None = (
        None if row is None else row.detail.get(NOT_FITTED, {}).get(f"{cutoff:%Y-%m-%d}")
    )
    return reason


def folder_of(context: RunContext, model: str, cutoff: datetime) -> str:
    """Return `model/cutoff/key` of the artifact that this run has of a model.

    Raises EmptyDataError where there was too little data to fit it, StageOrderError where the model
    has not been trained in this run, was trained by another recipe, or has lost its folder.
    """
    row = context.runlog.find("train", model)
    name: str | None = None if row is None else row.detail.get(f"{cutoff:%Y-%m-%d}")
    if reason := why_not_fitted(context, model, cutoff):
        raise EmptyDataError(f"model '{model}' as of {cutoff:%Y-%m-%d}: {reason}")
    has_same_recipe = row is not None and row.detail.get(RECIPE) == recipe(context.config, model)
    if (
        name is None
        or not has_same_recipe
        or not storage.is_complete(_path_of_artifact(context, name))
    ):
        raise StageOrderError(
            f"no artifact of model '{model}' as of {cutoff:%Y-%m-%d} for run {context.run_id}; run stage "
            f"train for it first (the code or the settings may have changed since)"
        )
    return name


def cutoffs_of(context: RunContext, model: str) -> tuple[datetime, ...]:
    """Return the cutoffs at which a model is fitted tonight; that of the published lists comes
    last.

    A model that a ranker needs is also fitted at the cutoffs of the ranker's examples, if the
    ranker learns from examples.
    """
    config = context.config
    rankers = learning_rankers(config)
    if model in config.with_needs(rankers) and model not in rankers:
        return context.cutoffs.all
    return context.cutoffs.backtest, context.cutoffs.tonight


def sources_of(context: RunContext, ranker: str) -> tuple[str, ...]:
    """Return the retrievers whose candidates a ranker scores."""
    return models_of(context.config, "retriever", among=context.config.needs_of(ranker))


def artifact_name(folder: str) -> str:
    """Return `model/cutoff/key` of an artifact's folder: its name below the artifacts' root."""
    return "/".join(folder.rsplit("/", 3)[1:])


def _input_commits(context: RunContext, model: str) -> dict[str, Any]:
    """Return table -> [version, id of the commit] of the tables that a model is fitted on.

    The dictionary of items is among them.
    """
    config = context.config
    training_tables = make(model, config.settings_of(model)).training_tables
    versions = {
        table: context.version(table)
        for table in ("histories", "item_features", "items", *training_tables, "item_ids")
    }
    if model in learning_rankers(config) and (row := context.runlog.find("examples", model)):
        versions["examples"] = row.outputs.get("examples")  # None: the shop has no examples yet
    return {table: context.catalog.identity(table, version) for table, version in versions.items()}


def _is_made_of(folder: str, input_commits: Mapping[str, Any]) -> bool:
    """Return whether the folder holds a complete artifact that was made from exactly these commits.

    Versions alone do not suffice: a table that was put back from a backup has other commits under
    the same numbers.
    """
    try:
        return storage.is_complete(folder) and artifacts.made_of(folder) == input_commits
    except ArtifactError:  # the artifact is damaged, so it is made again
        return False


@dataclass(frozen=True)
class KeptArtifact:
    """A fitted model of an earlier cutoff than tonight's: that of the backtest, or of examples.

    Parameters
    ----------
    folder : the folder of its artifact
    run_id : the run that fitted it; None where this run has to fit it
    """

    folder: str
    run_id: str | None


def kept_artifact(context: RunContext, model: str, cutoff: datetime) -> KeptArtifact:
    """Return the artifact of a cutoff before tonight's.

    For the backtest, this is the model that was fitted on the night of that cutoff: it is what was
    published then, without events that arrived later. For a cutoff of examples, a later night may
    have fitted it as well. An artifact is used only if it has the same recipe and if item integers
    still stand for the same items. Otherwise the result names the folder of an artifact that
    tonight has to make.

    Example: the night 2024-05-31 has its cutoff at 2024-06-01. With a horizon of 7 days, and a
    backtest cutoff on every day, the backtest's cutoff is 2024-05-25. The night 2024-05-24 had that
    cutoff as its own, so its runs are looked at.

    Cost: one small job per process and cutoff.
    """
    night = cutoff.date() - timedelta(days=1)
    day = f"{cutoff:%Y-%m-%d}"
    recipe_now = recipe(context.config, model)
    # The first and the last night whose runs may have fitted the model.
    nights = (night, night)
    if cutoff != context.cutoffs.backtest:
        oldest = min(context.cutoffs.all).date()
        nights = (oldest - timedelta(days=1), context.run_date - timedelta(days=1))
    for row in context.runlog.ended("train", *nights, model):
        name = row.detail.get(day)
        if row.detail.get(RECIPE) != recipe_now or name is None:
            continue
        if folder := _first_usable(context, [name]):
            return KeptArtifact(folder, row.run_id)
    return KeptArtifact(artifact_folder(context, model, cutoff), None)


def _first_usable(context: RunContext, names: Iterable[str]) -> str | None:
    """Return the folder of the first artifact that is complete and whose item integers still stand
    for the same items; None where there is none.
    """
    for name in names:
        folder = _path_of_artifact(context, name)
        if storage.is_complete(folder) and _has_same_items(context, folder):
            return folder
    return None


def _has_same_items(context: RunContext, folder: str) -> bool:
    """Return whether the item integers of the model in `folder` stand for the same items now."""
    try:
        identity_then = artifacts.made_of(folder).get("item_ids")
    except ArtifactError:
        return False
    version_now = context.version("item_ids")
    return identity_then is not None and context.catalog.extends(
        "item_ids", version_now, identity_then
    )


def artifacts_of(context: RunContext, row: RunRow) -> list[str]:
    """Return the folders of the artifacts that a row of stage train names; tonight's cutoff comes
    last.
    """
    days = [f"{cutoff:%Y-%m-%d}" for cutoff in context.cutoffs.all]
    return [_path_of_artifact(context, row.detail[day]) for day in days if day in row.detail]


def _path_of_artifact(context: RunContext, name: str) -> str:
    return storage.join(storage.absolute(context.config.paths.artifacts), name)


def checkpoint_folder(context: RunContext, model: str, cutoff: datetime) -> str:
    """Return where this run's training of a model keeps its checkpoints.

    The folder's name holds a digest of the code, so that other code does not continue from them.
    """
    run = f"{context.run_date}/{context.run_id}/{algorithm_code(context.config, model)}"
    root = storage.absolute(context.config.paths.checkpoints)
    return storage.join(root, run, model, f"{cutoff:%Y-%m-%d}")


def backtest_model(context: RunContext, model: str) -> FittedModel | None:
    """Return the model that is tested by the backtest; None where there was too little data to fit
    it.
    """
    cutoff = context.cutoffs.backtest
    return None if why_not_fitted(context, model, cutoff) else load_model(context, model, cutoff)


def load_model(context: RunContext, model: str, cutoff: datetime) -> FittedModel:
    """Return the fitted model of this run.

    A task loads and checks it once: the check reads every array.

    Raises StageOrderError where it was not trained, EmptyDataError where there was too little data
    to fit it.
    """
    spec = spec_of(model, context.config.settings_of(model))
    folder = _path_of_artifact(context, folder_of(context, model, cutoff))
    if context.stage is None:  # outside of tasks, the folder may be written again meanwhile
        return artifacts.load(folder, spec)
    if folder not in context.loaded:
        context.loaded[folder] = artifacts.load(folder, spec)
    return context.loaded[folder]


def load_retriever(context: RunContext, model: str, cutoff: datetime) -> RetrieverModel:
    """Return `load_model` of a model that is a retriever."""
    fitted = load_model(context, model, cutoff)
    assert isinstance(fitted, RetrieverModel), model
    return fitted


def with_user_features(
    context: RunContext, fitted: FittedModel, user_queries: DataFrame
) -> DataFrame:
    """Return `user_queries` with the users' features as of the model's cutoff, if the model reads
    them.

    Otherwise the queries are returned as they are, and the feature tables are not read.
    """
    if fitted.user_encoding is None:  # the model reads no user features
        return user_queries
    user_features, _ = features_as_of(context, fitted.cutoff)
    return with_features(user_queries, user_features, fitted.user_encoding)


def not_compared(context: RunContext) -> dict[str, str]:
    """Return model -> reason, for the models of this night that have no lists in the backtest."""
    reasons = {}
    for model in models_of(context.config, "retriever", "ranker"):  # an encoder has no lists
        rows = [context.runlog.find(stage, model) for stage in ("train", "recommend")]
        failed_rows = [row for row in rows if row is not None and row.status != OK]
        if failed_rows:
            reasons[model] = f"{failed_rows[0].stage} failed, {failed_rows[0].detail.get('error')}"
        elif None in rows:
            reasons[model] = f"{'recommend' if rows[0] else 'train'} has not ended in this run"
        elif reason := why_not_fitted(context, model, context.cutoffs.backtest):
            reasons[model] = reason
    return reasons

"""Stage train: fit one model on all events before each cutoff, and save each fit as an artifact."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.errors import EmptyDataError, FeedError, ModelError
from recspark.models import artifacts
from recspark.models.base import RetrieverModel
from recspark.models.registry import spec_of
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    BACKTEST_OF,
    NOT_FITTED,
    RECIPE,
    artifact_name,
    cutoffs_of,
    day_of_artifact,
    fit,
    kept_artifact,
    recipe,
    serving_artifact,
)
from recspark.pipeline.plan import kind_of_model
from recspark.pipeline.runlog import StageResult
from recspark.train.curve import Curve
from recspark.train.curve_picture import draw

# What a fit raises where there is too little data.
_TOO_LITTLE = (EmptyDataError, FeedError, ModelError)


def train(context: RunContext, model: str) -> StageResult:
    """Fit one model at each cutoff that needs it, each time on all events before that cutoff.

    The cutoffs are that of the published lists, that of the backtest, and for models that a ranker
    needs also those of the examples.

    The backtest uses the model that was fitted on the night of the backtest's own cutoff, if it was
    made by the same recipe. Otherwise (on a first night, after other settings or code) the model is
    fitted here for that cutoff, and kept.

    A shop may have nothing before an earlier cutoff, or too little for this model. Then the model
    has no backtest, `detail` says so under `not_fitted`, and the published lists are made all the
    same. Too little data before the published lists' cutoff is an error, which is raised; but a
    ranker then has no lists tonight, and the ladder fills the lists in its place.
    """
    is_ranker = kind_of_model(context.config, model) == "ranker"
    detail: dict[str, Any] = {RECIPE: recipe(context.config, model)}
    curves: dict[str, Curve] = {}
    outputs: dict[str, int] = {}
    n_models = 0
    for cutoff in cutoffs_of(context, model):
        day = f"{cutoff:%Y-%m-%d}"
        try:
            folder = _kept_or_fitted(context, model, cutoff, detail)
        except _TOO_LITTLE as error:
            is_young = is_ranker and isinstance(error, EmptyDataError)
            if cutoff == context.cutoffs.tonight and not is_young:
                raise
            detail.setdefault(NOT_FITTED, {})[day] = str(error)
            context.progress(f"  {model} as of {day}: not fitted, {error}")
            continue
        if saved_curve := artifacts.training(folder):
            curves[folder] = Curve.from_dict(saved_curve)
        detail[day] = artifact_name(folder)
        n_models += 1
        if cutoff == context.cutoffs.tonight:
            outputs |= write_user_states(context, model, folder)
    if curves:
        outputs |= write_curves(context, model, curves)
    return StageResult(outputs, context.count("histories"), n_models, detail)


def _kept_or_fitted(
    context: RunContext, model: str, cutoff: datetime, detail: dict[str, Any]
) -> str:
    """Return the artifact's folder of the model of one cutoff.

    For an earlier cutoff this is the artifact of an earlier run, where a usable one is kept. An
    encoder may be one of an earlier cutoff (`serving_artifact`). Otherwise the model is fitted now.
    Where the backtest uses the artifact of an earlier run, `detail` gets that run's id.
    """
    if cutoff != context.cutoffs.tonight and not context.force:
        kept = kept_artifact(context, model, cutoff)
        if kept.run_id is not None:
            context.progress(f"  {model} as of {cutoff:%Y-%m-%d}: as run {kept.run_id} fitted it")
            if cutoff == context.cutoffs.backtest:
                detail[BACKTEST_OF] = kept.run_id
            return kept.folder
    if served := serving_artifact(context, model, cutoff):
        day = day_of_artifact(served)
        context.progress(f"  {model} as of {cutoff:%Y-%m-%d}: as fitted for {day}")
        return served
    return fit(context, model, cutoff)


def write_user_states(context: RunContext, model: str, folder: str) -> dict[str, int]:
    """Write what the model in `folder` keeps of each user as of tonight to `user_states`.

    Returns table -> version; {} for a model that keeps nothing, as most.
    """
    spec = spec_of(model, context.config.settings_of(model))
    model_class = spec.load_model()
    keeps_states = (
        issubclass(model_class, RetrieverModel)
        and model_class.user_states is not RetrieverModel.user_states
    )
    if not keeps_states:
        return {}
    fitted = artifacts.load(folder, spec)
    assert isinstance(fitted, RetrieverModel), model
    states = fitted.user_states()
    assert states is not None, model
    cutoff = fitted.cutoff
    rows = states.select(
        F.lit(cutoff).alias("cutoff"), F.lit(model).alias("model"), *states.columns
    )
    written = context.catalog.replace_slice("user_states", rows, {"cutoff": cutoff, "model": model})
    return {"user_states": written.version}


def write_curves(context: RunContext, model: str, curves: dict[str, Curve]) -> dict[str, int]:
    """Write one model's learning curves to `training_curves`, and draw each beside its artifact.

    `curves` : folder of the artifact -> its curve. Returns table -> version.
    """
    rows = [
        (
            context.run_date,
            model,
            _cutoff_of(folder),
            epoch.epoch,
            epoch.loss,
            epoch.validation,
            epoch.epoch == curve.best,
            epoch.rows_per_s,
            epoch.seconds,
        )
        for folder, curve in curves.items()
        for epoch in curve.epochs
    ]
    curve_rows = context.spark.createDataFrame(rows, schema.TRAINING_CURVES)
    written = context.catalog.replace_slice(
        "training_curves", curve_rows, {"run_date": context.run_date, "model": model}
    )
    for folder, curve in curves.items():
        uri = storage.join(folder, "training.png")
        if not storage.exists(uri):  # the artifact of an earlier run has its picture already
            draw(curve, f"{model} as of {_cutoff_of(folder):%Y-%m-%d}", uri)
    return {"training_curves": written.version}


def _cutoff_of(folder: str) -> datetime:
    return datetime.fromisoformat(day_of_artifact(folder)).replace(tzinfo=UTC)

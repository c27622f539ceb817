"""Stage train: one model fitted on everything before each cutoff, kept as an artifact."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from recspark import schema, storage
from recspark.errors import EmptyDataError, FeedError, ModelError
from recspark.models import artifacts
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    BACKTEST_OF,
    NOT_FITTED,
    RECIPE,
    artifact_name,
    cutoffs_of,
    fit,
    kept_artifact,
    recipe,
)
from recspark.pipeline.runlog import StageResult
from recspark.train.curve import Curve
from recspark.train.draw import draw

_TOO_LITTLE = (EmptyDataError, FeedError, ModelError)  # what a fit says where data are too few


def train(context: RunContext, model: str) -> StageResult:
    """Fit one model on everything before the published lists' cutoff, and before each cutoff of the
    backtest and of examples that need it.

    The backtest takes the model that was fitted on the night of its own cutoff, by the same recipe;
    where there is none (a first night, other settings or code), it is fitted here, and kept. A shop
    may have nothing, or not enough for this model, before that cutoff: then there is no backtest of
    it, which `detail` says, and the published lists are made all the same.
    """
    detail: dict[str, Any] = {RECIPE: recipe(context.config, model)}
    curves: dict[str, Curve] = {}
    n_models = 0
    for cutoff in cutoffs_of(context, model):
        day = f"{cutoff:%Y-%m-%d}"
        try:
            folder = _fitted(context, model, cutoff, detail)
        except _TOO_LITTLE as error:
            if cutoff == context.cutoff:
                raise
            detail.setdefault(NOT_FITTED, {})[day] = str(error)
            context.progress(f"  {model} as of {day}: not fitted, {error}")
            continue
        if about := artifacts.training(folder):
            curves[folder] = Curve.from_dict(about)
        detail[day] = artifact_name(folder)
        n_models += 1
    outputs = write_curves(context, model, curves) if curves else {}
    return StageResult(outputs, context.count("histories"), n_models, detail)


def _fitted(context: RunContext, model: str, cutoff: datetime, detail: dict[str, Any]) -> str:
    """Return the folder of the model of one cutoff, fitted now or on the night of that cutoff."""
    if cutoff != context.cutoff and not context.force:
        kept = kept_artifact(context, model, cutoff)
        if kept.run_id is not None:
            context.progress(f"  {model} as of {cutoff:%Y-%m-%d}: as run {kept.run_id} fitted it")
            if cutoff == context.backtest_cutoff:
                detail[BACKTEST_OF] = kept.run_id
            return kept.folder
    return fit(context, model, cutoff)


def write_curves(context: RunContext, model: str, curves: dict[str, Curve]) -> dict[str, int]:
    """Write one model's curves to `training_curves` and draw them beside its artifacts.

    `curves` : folder of the artifact -> its curve.
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
    frame = context.spark.createDataFrame(rows, schema.TRAINING_CURVES)
    written = context.catalog.replace_slice(
        "training_curves", frame, {"run_date": context.run_date, "model": model}
    )
    for folder, curve in curves.items():
        uri = storage.join(folder, "training.png")
        if not storage.exists(uri):  # the artifact of an earlier run has its picture
            draw(curve, f"{model} as of {_cutoff_of(folder):%Y-%m-%d}", uri)
    return {"training_curves": written.version}


def _cutoff_of(folder: str) -> datetime:
    return datetime.fromisoformat(folder.rsplit("/", 2)[1]).replace(tzinfo=UTC)

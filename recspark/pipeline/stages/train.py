"""Stage train: one model fitted on everything before each cutoff, kept as an artifact."""

from __future__ import annotations

from datetime import datetime

from recspark import schema, storage
from recspark.errors import EmptyDataError, FeedError, ModelError
from recspark.models import artifacts
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import NOT_FITTED, artifact_folder, fit
from recspark.pipeline.runlog import StageResult
from recspark.train.curve import Curve
from recspark.train.draw import draw

_TOO_LITTLE = (EmptyDataError, FeedError, ModelError)  # what a fit says where data are too few


def train(context: RunContext, model: str) -> StageResult:
    """Fit one model twice: on everything before the backtest's cutoff, and before the published
    one.

    A shop may have nothing, or not enough for this model, before the backtest's cutoff: then there
    is no backtest of it, which `detail` says, and the published lists are made all the same.
    """
    kept: dict[str, str] = {}
    not_fitted: dict[str, str] = {}
    curves: dict[datetime, Curve] = {}
    for cutoff in (context.backtest_cutoff, context.cutoff):
        day = f"{cutoff:%Y-%m-%d}"
        try:
            folder = fit(context, model, cutoff)
        except _TOO_LITTLE as error:
            if cutoff == context.cutoff:
                raise
            not_fitted[day] = str(error)
            context.progress(f"  {model} as of {day}: no backtest of it, {error}")
            continue
        if about := artifacts.training(folder):
            curves[cutoff] = Curve.from_dict(about)
        kept[day] = storage.join(model, *folder.rsplit("/", 2)[1:])
    outputs = write_curves(context, model, curves) if curves else {}
    detail = {**kept, NOT_FITTED: not_fitted} if not_fitted else dict(kept)
    return StageResult(outputs, context.count("histories"), len(kept), detail)


def write_curves(context: RunContext, model: str, curves: dict[datetime, Curve]) -> dict[str, int]:
    """Write one model's curves to `training_curves` and draw them beside its artifacts."""
    rows = [
        (
            context.run_date,
            model,
            cutoff,
            epoch.epoch,
            epoch.loss,
            epoch.validation,
            epoch.epoch == curve.best,
            epoch.rows_per_s,
            epoch.seconds,
        )
        for cutoff, curve in curves.items()
        for epoch in curve.epochs
    ]
    frame = context.spark.createDataFrame(rows, schema.TRAINING_CURVES)
    written = context.catalog.replace_slice(
        "training_curves", frame, {"run_date": context.run_date, "model": model}
    )
    for cutoff, curve in curves.items():
        uri = storage.join(artifact_folder(context, model, cutoff), "training.png")
        if not storage.exists(uri):  # the artifact of an earlier run has its picture
            draw(curve, f"{model} as of {cutoff:%Y-%m-%d}", uri)
    return {"training_curves": written.version}

"""Which function runs each stage, and which tables it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recspark import storage
from recspark.errors import StageOrderError
from recspark.pipeline.run import PUBLISHED, STAGES, RunContext, Stage, StageResult
from recspark.pipeline.runlog import RunRow
from recspark.pipeline.stages.build_features import TRAINING, build_features
from recspark.pipeline.stages.evaluate import evaluate
from recspark.pipeline.stages.ingest import ingest
from recspark.pipeline.stages.publish import publish
from recspark.pipeline.stages.recommend import recommend
from recspark.pipeline.stages.sessionize import sessionize
from recspark.pipeline.stages.train import NOT_FITTED, artifact_folder, train
from recspark.sources import landing_digest
from recspark.tables.specs import SPECS


def check_order(context: RunContext, stage: Stage) -> None:
    """Raise StageOrderError where a stage before `stage` has left no result in this run.

    A model that nothing published needs may be without: `evaluate` leaves it out, and says so.
    """
    for earlier in STAGES:
        if earlier.name == stage.name:
            return
        for model in earlier.models(context.config.models):
            if stage.per_model and earlier.per_model:
                continue  # a model's own stages are checked by its artifact
            if model and model not in context.config.publish.needed_models:
                continue
            if not context.runlog.ended_well(earlier.name, model):
                row = context.runlog.find(earlier.name, model)
                state = "has not ended yet" if row is None else f"failed: {row.detail.get('error')}"
                raise StageOrderError(
                    f"stage '{stage.name}' of {context.run_date}, run {context.run_id}: stage "
                    f"'{earlier.name}' {model} {state}; run it first, with the same settings"
                )


def still_holds(context: RunContext, stage: Stage, model: str, done: RunRow) -> bool:
    """Return whether what a recorded stage left, in the tables and beside them, is still there."""
    if stage.name == "ingest":
        now = landing_digest(context.config.source, context.run_date)
        if now is not None and now != done.detail["landing"]:
            context.progress(
                f"ingest: the landing of {context.run_date} has changed since run {context.run_id} read it; "
                "use --repin to take it in"
            )
    if stage.name == "train" and not all(
        storage.is_complete(artifact_folder(context, model, cutoff))
        for cutoff in (context.backtest_cutoff, context.cutoff)
        if f"{cutoff:%Y-%m-%d}" not in done.detail.get(NOT_FITTED, {})
    ):
        return False
    if what := lost(context, stage, model, done):
        context.progress(f"{stage.name} {model}".strip() + f": {what}; made again")
        return False
    return True


# stage -> the table that holds its rows: a slice of it without a file has lost them
_ROWS = {"recommend": "candidates", "evaluate": "metrics", "publish": "recommendations"}


def lost(context: RunContext, stage: Stage, model: str, done: RunRow) -> str | None:
    """Return what is no longer there of what a recorded stage left in the tables; None where all is.

    Its own slice where the table has one for it, else the whole table as of the recorded version.
    Cost: a job over the log for each table, a look at each file; no data is read.
    """
    known: dict[str, Any] = {
        "run_date": context.run_date,
        "ingest_date": context.run_date,
        "model": model or PUBLISHED,
        "cutoff": (context.backtest_cutoff, context.cutoff),
    }
    for table, version in sorted(done.outputs.items()):
        partition = SPECS[table].partition
        slice_ = {c: known[c] for c in partition} if known.keys() >= set(partition) else {}
        some = done.rows_out > 0 and _ROWS.get(stage.name) == table
        if what := context.catalog.lost(table, version, slice_, some=some):
            return what
    return None


Function = Callable[..., StageResult]
# stage -> its function, and the tables whose versions identify its input
FUNCTIONS: dict[str, tuple[Function, tuple[str, ...]]] = {
    "ingest": (ingest, ("events",)),
    "sessionize": (sessionize, ("events",)),
    "build_features": (build_features, ("events", "sessions", "user_ids", "item_ids", "items")),
    "train": (train, ("histories", "items", "item_features", *TRAINING)),
    "recommend": (
        recommend,
        ("histories", "items", "item_features", "user_ids", "item_ids", "recommendations"),
    ),
    "evaluate": (
        evaluate,
        (
            "candidates",
            "histories",
            "interactions",
            "user_features",
            "item_features",
            "user_ids",
            "item_ids",
            "recommendations",
        ),
    ),
    "publish": (
        publish,
        (
            "candidates",
            "metrics",
            "histories",
            "user_features",
            "item_features",
            "user_ids",
            "item_ids",
            "items",
            "recommendations",
        ),
    ),
}

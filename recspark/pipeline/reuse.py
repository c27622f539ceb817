"""When a stage need not run again: its result is recorded, and would be the same.

The same: the settings that the stage reads, the versions of the tables that it reads, and the code
that it runs; and what it left is still there. Such a result is taken from this run's own row, or from
the row of another run of the night.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recspark import storage
from recspark.config import Config, digest
from recspark.errors import EmptyDataError
from recspark.pipeline.code import algorithm_code, code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    artifact_folder,
    artifact_name,
    artifacts_of,
    cutoffs_of,
    kept_artifact,
    sources_of,
)
from recspark.pipeline.plan import PUBLISHED, STAGES, Stage, kind_of_model, models_of
from recspark.pipeline.runlog import RunRow
from recspark.pipeline.training_sets import TRAINING, training_tables
from recspark.sources import landing_digest
from recspark.tables.specs import SPECS

# stage -> the tables whose versions identify its input
TABLES_READ: dict[str, tuple[str, ...]] = {
    "ingest": ("events",),
    "sessionize": ("events",),
    "build_features": ("events", "sessions", "user_ids", "item_ids", "items"),
    "train": ("histories", "items", "item_features", *TRAINING),
    "encode": ("items",),
    "examples": ("histories", "items", "user_features", "item_features"),
    "recommend": (
        "histories", "items", "user_features", "item_features", "user_ids", "item_ids",
        "recommendations",
    ),
    "evaluate": (
        "candidates", "histories", "user_features", "item_features", "user_ids",
        "item_ids", "recommendations",
    ),
    "publish": (
        "candidates", "metrics", "histories", "user_features", "item_features", "user_ids",
        "item_ids", "items", "recommendations",
    ),
}  # fmt: skip
# stage -> the settings that it reads: sections, or single ones; a stage that is not here reads all.
# Paths and what the machine decides are no part of a result.
SETTINGS_READ: dict[str, tuple[str, ...]] = {
    "ingest": ("source", "ingest", "sessions", "features"),
    "sessionize": ("sessions",),
    "build_features": (
        "features",
        "sessions",
        "evaluate.horizon_days",
        "evaluate.every_days",
        "train.ranks",
    ),
    "train": ("features", "evaluate.horizon_days", "evaluate.every_days"),
    "encode": ("evaluate.horizon_days", "evaluate.every_days"),
    "examples": (
        "features",
        "evaluate.horizon_days",
        "evaluate.every_days",
        "examples",
        "publish.mode",
        "n_candidates",
        "train.seed",
    ),
    "recommend": ("features", "evaluate", "publish", "n_candidates"),
}
# In the detail of a row:
IDENTITY = "identity"  # as in `Work`
COMMITS = "commits"  # table -> the commit that the stage left it at
_MODULE = "recspark.pipeline.stages."
# stage -> the table that holds its rows: a slice of it without a file has lost them
_ROWS = {
    "encode": "item_vectors",
    "examples": "examples",
    "recommend": "candidates",
    "evaluate": "metrics",
    "publish": "recommendations",
}


@dataclass(frozen=True)
class Work:
    """A stage of this run, for one model where it runs per model, and all that its result follows
    from.

    Parameters
    ----------
    inputs : table -> version
    code : digest of the modules that it runs
    identity : digest of the settings that it reads, and of the commits of its inputs: a table put
        back from a backup has other commits of the same numbers. None where it reads all settings
    """

    stage: Stage
    model: str
    inputs: dict[str, int]
    code: str
    identity: str | None

    @classmethod
    def of(cls, context: RunContext, stage: Stage, model: str) -> Work:
        """Return the work of one stage; `context` is that of the stage."""
        versions = {t: context.version(t) for t in tables_read(context.config, stage)}
        versions.update(_written_for(context, stage, model))
        inputs = {table: version for table, version in versions.items() if version is not None}
        identity = settings_identity(context, stage, model)
        if identity is not None and stage is not STAGES[0]:
            identity = digest([identity, commits_of(context, inputs)])
        code = stage_code(context.config, stage, model)
        return cls(stage, model, inputs, code, identity)

    @property
    def label(self) -> str:
        """The stage and its model, for a person."""
        return f"{self.stage.name} {self.model}".strip()


def recorded(context: RunContext, work: Work) -> RunRow | None:
    """Return the row whose result does for this work: this run's own, or that of another run of the
    night; None where the stage has to run.

    With a model more, or another number of ranks, a day is not ingested again.
    """
    own = context.runlog.find(work.stage.name, work.model)
    rows = [own] if own else _of_other_runs(context, work)
    return next((row for row in rows if _does(context, work, row)), None)


def _does(context: RunContext, work: Work, row: RunRow) -> bool:
    # Ingest writes what it reads: see `_of_other_runs`.
    same = work.identity is None or work.stage is STAGES[0]
    same = same or row.detail.get(IDENTITY) == work.identity
    return same and row.reusable(work.inputs, work.code) and still_holds(context, work, row)


def _of_other_runs(context: RunContext, work: Work) -> Iterator[RunRow]:
    """Give the rows of the same stage, with the same settings, of the night's other runs."""
    for row in context.runlog.elsewhere(work.stage.name, work.model):
        if work.identity is None or row.detail.get(IDENTITY) != work.identity:
            continue
        if work.stage is STAGES[0]:
            # Ingest writes what it reads: it would write nothing again where all is as it left it.
            if any(
                (context.pins[t] if t in context.pins else context.catalog.version(t)) != v
                for t, v in row.outputs.items()
            ):
                continue
            if landing_digest(context.config.source, context.run_date) != row.detail["landing"]:
                continue
            row = replace(row, inputs=work.inputs)
        if row.detail.get(COMMITS) == commits_of(context, row.outputs):
            yield row


def commits_of(context: RunContext, versions: Mapping[str, int]) -> dict[str, Any]:
    """Return table -> id of the commit of its version; None where its log does not have that."""
    return {table: context.catalog.identity(table, v)[1] for table, v in versions.items()}


def tables_read(config: Config, stage: Stage) -> tuple[str, ...]:
    """Return the tables whose versions identify the input of a stage, with these settings."""
    tables = TABLES_READ[stage.name]
    if stage.name == "recommend" and config.publish.rescore_days is None:
        return tuple(table for table in tables if table != "recommendations")  # nobody keeps a list
    return tables


def _written_for(context: RunContext, stage: Stage, model: str) -> dict[str, int]:
    """Return the versions of tables that a model's own tasks, or those of models that it needs, left
    for this one: their tables have a slice for each model, and others write there, too.
    """
    config, find = context.config, context.runlog.find
    if not model:
        return {}
    out: dict[str, int] = {}
    rows = []
    if kind_of_model(config, model) == "ranker" and stage.name == "train":
        rows.append(("examples", find("examples", model)))
    if kind_of_model(config, model) == "ranker" and stage.name == "recommend":
        rows += [("candidates", find("recommend", name)) for name in sources_of(context, model)]
    if stage.name in ("train", "examples"):
        encoders = models_of(config, "encoder", among=config.needs_of(model))
        rows += [("item_vectors", find("encode", name)) for name in encoders]
    for table, row in rows:
        if row is not None and table in row.outputs:
            out[table] = max(row.outputs[table], out.get(table, 0))
    return out


def settings_identity(context: RunContext, stage: Stage, model: str) -> str | None:
    """Return the digest of the settings that one stage reads; None where it reads all of them.

    For a model's stages the artifacts are among them: they are named by all that makes a model.
    """
    names = SETTINGS_READ.get(stage.name)
    if names is None:
        return None
    settings = context.config.comparable()
    read: dict[str, Any] = {}
    for name in names:
        section, _, setting = name.partition(".")
        read[name] = settings[section][setting] if setting else settings[section]
    if stage.name == "build_features":
        read["training"] = sorted(training_tables(context.config))
        read["cutoffs"] = context.cutoffs
    read["artifacts"] = [artifact_name(folder) for folder in _artifacts_read(context, stage, model)]
    return digest(read)


def _artifacts_read(context: RunContext, stage: Stage, model: str) -> list[str]:
    """Return the folders of the artifacts that a stage makes or reads, as far as they are known."""
    if stage.trains:
        folders = []
        for cutoff in cutoffs_of(context, model):
            try:
                is_kept = cutoff != context.cutoff
                kept = kept_artifact(context, model, cutoff).folder if is_kept else None
                folders.append(kept or artifact_folder(context, model, cutoff))
            except EmptyDataError:  # a model that it needs has too little before this cutoff
                continue
        return folders
    if not stage.per_model:
        return []
    models = context.config.with_needs([model])
    if stage.name == "examples":
        models = tuple(name for name in models if name != model)
    rows = [context.runlog.find("train", name) for name in models]
    return [folder for row in rows if row is not None for folder in artifacts_of(context, row)]


def stage_code(config: Config, stage: Stage, model: str) -> str:
    """Return the digest of the code that a stage runs: its own, and that of the models it loads."""
    own = code_digest(_MODULE + stage.name)
    if stage.per_model:
        return digest([own, algorithm_code(config, *config.with_needs([model]))])
    if "candidates" in TABLES_READ[stage.name]:  # it reads what the models made
        return digest([own, algorithm_code(config, *config.models)])
    return own


def still_holds(context: RunContext, work: Work, done: RunRow) -> bool:
    """Return whether what a recorded stage left, in the tables and beside them, is still there."""
    if work.stage.name == "ingest":
        now = landing_digest(context.config.source, context.run_date)
        if now is not None and now != done.detail["landing"]:
            context.progress(
                f"ingest: the landing of {context.run_date} has changed since run {context.run_id} read it; "
                "use --repin to take it in"
            )
    if work.stage.trains:
        folders = artifacts_of(context, done)
        if not folders or not all(map(storage.is_complete, folders)):
            return False
    if what := lost(context, work, done):
        context.progress(f"{work.label}: {what}; made again")
        return False
    return True


def lost(context: RunContext, work: Work, done: RunRow) -> str | None:
    """Return what is no longer there of what a recorded stage left in the tables; None where all is.

    Its own slice where the table has one for it, else the whole table as of the recorded version.
    Cost: a job over the log for each table, a look at each file; no data is read.
    """
    known: dict[str, Any] = {
        "run_date": context.run_date,
        "ingest_date": context.run_date,
        "model": work.model or PUBLISHED,
        "encoder": work.model,
        "cutoff": context.cutoffs,
    }
    for table, version in sorted(done.outputs.items()):
        partition = SPECS[table].partition
        slice_ = {c: known[c] for c in partition} if known.keys() >= set(partition) else {}
        some = done.rows_out > 0 and _ROWS.get(work.stage.name) == table
        if what := context.catalog.lost(table, version, slice_, some=some):
            return what
    return None

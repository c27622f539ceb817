"""When a stage need not run again, because its recorded result would be the same.

The result is the same where the settings that the stage reads, the versions of the tables that it
reads, and the code that it runs are the same, and where everything that the stage left is still in
place. Such a result is taken from this run's own row in `runs`, or from the row of another run of
the same night.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recspark import storage
from recspark.config import Config, digest
from recspark.errors import EmptyDataError
from recspark.pipeline.code_digest import algorithm_code, code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import (
    artifact_folder,
    artifact_name,
    artifacts_of,
    cutoffs_of,
    kept_artifact,
    sources_of,
)
from recspark.pipeline.plan import (
    STAGES,
    Stage,
    kind_of_model,
    learning_rankers,
    models_of,
)
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
        "item_ids", "items", "recommendations",
    ),
    "publish": (
        "candidates", "metrics", "histories", "user_features", "item_features", "user_ids",
        "item_ids", "items", "recommendations",
    ),
}  # fmt: skip
# stage -> the settings that it reads: whole sections, or single settings. A stage that is not in
# here reads all settings. Paths and settings of the machine do not change a result, and do not
# count.
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
    "train": ("features", "sessions", "evaluate.horizon_days", "evaluate.every_days"),
    "encode": ("evaluate.horizon_days", "evaluate.every_days"),
    "examples": (
        "features",
        "sessions",
        "evaluate.horizon_days",
        "evaluate.every_days",
        "examples",
        "n_candidates",
        "train.seed",
    ),
    "recommend": ("features", "sessions", "evaluate", "publish", "rules", "n_candidates"),
}
# Keys in the detail of a row of `runs`:
IDENTITY = "identity"  # `Execution.identity`
COMMITS = "commits"  # table -> id of the commit at which the stage left the table
_STAGE_MODULES = "recspark.pipeline.stages."
# stage -> the table that holds its rows. Where the stage wrote rows, a slice without files lost
# them.
_TABLE_OF_ROWS = {
    "encode": "item_vectors",
    "examples": "examples",
    "recommend": "candidates",
    "evaluate": "metrics",
    "publish": "recommendations",
}


@dataclass(frozen=True)
class Execution:
    """A stage that is to be executed in this run, and everything that decides its result.

    Parameters
    ----------
    model : the model that it runs for, "" for a stage that runs once
    inputs : table -> version
    code : digest of the modules that it runs
    identity : digest of the settings that it reads, and of the commits of its inputs. A table that
        was put back from a backup has other commits under the same version numbers. None where the
        stage reads all settings
    """

    stage: Stage
    model: str
    inputs: dict[str, int]
    code: str
    identity: str | None

    @classmethod
    def of(cls, context: RunContext, stage: Stage, model: str) -> Execution:
        """Return the execution of one stage; `context` must be the context of that stage."""
        versions = {table: context.version(table) for table in tables_read(context.config, stage)}
        versions.update(_versions_written_for(context, stage, model))
        inputs = {table: version for table, version in versions.items() if version is not None}
        identity = settings_identity(context, stage, model)
        if identity is not None and stage is not STAGES[0]:
            identity = digest([identity, commits_of(context, inputs)])
        code = stage_code(context.config, stage, model)
        return cls(stage, model, inputs, code, identity)

    @property
    def label(self) -> str:
        """The stage and its model, for a person to read."""
        return f"{self.stage.name} {self.model}".strip()


def recorded(context: RunContext, execution: Execution) -> RunRow | None:
    """Return the row of `runs` whose result can be used instead of running the stage, or None.

    The row is this run's own, or where this run has none, that of another run of the night. So a
    day is not ingested again where the settings only add a model, or change the number of ranks.
    """
    row_of_this_run = context.runlog.find(execution.stage.name, execution.model)
    rows = [row_of_this_run] if row_of_this_run else _rows_of_other_runs(context, execution)
    return next((row for row in rows if _can_use(context, execution, row)), None)


def _can_use(context: RunContext, execution: Execution, row: RunRow) -> bool:
    # The identity of ingest is not compared: it writes the tables that it reads
    # (`_rows_of_other_runs`).
    has_same_identity = execution.identity is None or execution.stage is STAGES[0]
    has_same_identity = has_same_identity or row.detail.get(IDENTITY) == execution.identity
    return (
        has_same_identity
        and row.reusable(execution.inputs, execution.code)
        and still_holds(context, execution, row)
    )


def _rows_of_other_runs(context: RunContext, execution: Execution) -> Iterator[RunRow]:
    """Yield the rows of the same stage, with the same identity, of the night's other runs.

    Ingest is a special case, since it writes the tables that it reads. Its row is yielded only
    where the tables and the landing are still as that row left them: ingest would then write
    nothing. The yielded row has tonight's `inputs`: the versions that it read itself are older than
    those that it wrote.
    """
    for row in context.runlog.elsewhere(execution.stage.name, execution.model):
        if execution.identity is None or row.detail.get(IDENTITY) != execution.identity:
            continue
        if execution.stage is STAGES[0]:
            if any(
                (context.pins[table] if table in context.pins else context.catalog.version(table))
                != version
                for table, version in row.outputs.items()
            ):
                continue
            if landing_digest(context.config.source, context.run_date) != row.detail["landing"]:
                continue
            row = replace(row, inputs=execution.inputs)
        if row.detail.get(COMMITS) == commits_of(context, row.outputs):
            yield row


def commits_of(context: RunContext, versions: Mapping[str, int]) -> dict[str, Any]:
    """Return table -> id of the commit that made the version; None where the log was cleaned."""
    return {
        table: context.catalog.identity(table, version)[1] for table, version in versions.items()
    }


def tables_read(config: Config, stage: Stage) -> tuple[str, ...]:
    """Return the tables whose versions identify the input of a stage, with these settings."""
    tables = TABLES_READ[stage.name]
    if stage.name == "recommend" and config.publish.rescore_days is None:
        # No list of an earlier night is kept.
        return tuple(table for table in tables if table != "recommendations")
    return tables


def _versions_written_for(context: RunContext, stage: Stage, model: str) -> dict[str, int]:
    """Return table -> version of what other tasks of this run wrote for this stage and model.

    Some tables have a slice for each model, and other models' tasks write to them as well. So the
    version that counts is not the newest one, but the one that the tasks of this model, or of the
    models that it needs, left.
    """
    config, find = context.config, context.runlog.find
    if not model:
        return {}
    newest_versions: dict[str, int] = {}
    tables_and_rows = []
    if model in learning_rankers(config) and stage.name == "train":
        tables_and_rows.append(("examples", find("examples", model)))
    if kind_of_model(config, model) == "ranker" and stage.name == "recommend":
        tables_and_rows += [
            ("candidates", find("recommend", name)) for name in sources_of(context, model)
        ]
    if stage.name in ("train", "examples"):
        encoders = models_of(config, "encoder", among=config.needs_of(model))
        tables_and_rows += [("item_vectors", find("encode", name)) for name in encoders]
    for table, row in tables_and_rows:
        if row is not None and table in row.outputs:
            newest_versions[table] = max(row.outputs[table], newest_versions.get(table, 0))
    return newest_versions


def settings_identity(context: RunContext, stage: Stage, model: str) -> str | None:
    """Return the digest of the settings that one stage reads; None where it reads all of them.

    For a stage that runs per model, the digest covers the names of the artifacts that the stage
    makes or reads: an artifact's name follows from everything that decides the model.
    """
    setting_names = SETTINGS_READ.get(stage.name)
    if setting_names is None:
        return None
    settings = context.config.comparable()
    settings_read: dict[str, Any] = {}
    if stage.name == "recommend" and context.config.publish.rescore_days is None:
        # Rules decide nothing here then: no list of an earlier night is kept.
        settings["rules"] = {}
        settings["publish"] = {**settings["publish"], "rules": (), "pool": 0}
    for name in setting_names:
        section, _, setting = name.partition(".")
        settings_read[name] = settings[section][setting] if setting else settings[section]
    if stage.name == "build_features":
        settings_read["training"] = sorted(training_tables(context.config))
        settings_read["cutoffs"] = context.cutoffs.all
    settings_read["artifacts"] = [
        artifact_name(folder) for folder in _artifacts_read(context, stage, model)
    ]
    return digest(settings_read)


def _artifacts_read(context: RunContext, stage: Stage, model: str) -> list[str]:
    """Return the folders of the artifacts that a stage makes or reads, as far as they are known
    yet.
    """
    if stage.trains:
        folders = []
        for cutoff in cutoffs_of(context, model):
            try:
                is_kept = cutoff != context.cutoffs.tonight
                kept = kept_artifact(context, model, cutoff).folder if is_kept else None
                folders.append(kept or artifact_folder(context, model, cutoff))
            except EmptyDataError:  # a model that it needs had too little data before this cutoff
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
    """Return the digest of the code that a stage runs: its own and that of the models it uses."""
    code_of_stage = code_digest(_STAGE_MODULES + stage.name)
    if stage.per_model:
        return digest([code_of_stage, algorithm_code(config, *config.with_needs([model]))])
    if "candidates" in TABLES_READ[stage.name]:  # the stage reads the lists of all models
        return digest([code_of_stage, algorithm_code(config, *config.models)])
    return code_of_stage


def still_holds(context: RunContext, execution: Execution, recorded_row: RunRow) -> bool:
    """Return whether everything that a recorded stage left, in tables and in folders, is still in
    place.

    Says so where it is not, and where the landing has changed since ingest read it.
    """
    if execution.stage.name == "ingest":
        landing_now = landing_digest(context.config.source, context.run_date)
        if landing_now is not None and landing_now != recorded_row.detail["landing"]:
            context.progress(
                f"ingest: the landing of {context.run_date} has changed since run {context.run_id} read it; "
                "use --repin to take it in"
            )
    if execution.stage.trains:
        folders = artifacts_of(context, recorded_row)
        if not folders or not all(map(storage.is_complete, folders)):
            return False
    if missing := missing_output(context, execution, recorded_row):
        context.progress(f"{execution.label}: {missing}; made again")
        return False
    return True


def missing_output(context: RunContext, execution: Execution, recorded_row: RunRow) -> str | None:
    """Return what is missing of the rows that a recorded stage wrote, as a text; None where nothing
    is.

    Looks at the stage's own slice where the table has one for it, otherwise at the table, as of the
    recorded version.
    Cost: a job over the log for each table, and a look at each file; no data is read.
    """
    partition_values: dict[str, Any] = {
        "run_date": context.run_date,
        "ingest_date": context.run_date,
        "model": execution.model or context.config.publish.backtest_models,
        "encoder": execution.model,
        "cutoff": context.cutoffs.all,
    }
    for table, version in sorted(recorded_row.outputs.items()):
        partition = SPECS[table].partition
        slice_ = (
            {column: partition_values[column] for column in partition}
            if partition_values.keys() >= set(partition)
            else {}
        )
        must_have_rows = (
            recorded_row.rows_out > 0 and _TABLE_OF_ROWS.get(execution.stage.name) == table
        )
        if missing := context.catalog.lost(table, version, slice_, must_have_rows=must_have_rows):
            return missing
    return None

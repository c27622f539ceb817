"""The activity budget: who is scored tonight, and who keeps the list of the night before."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import digest
from recspark.data.interactions import before
from recspark.errors import VersionNotFoundError
from recspark.pipeline.code import algorithm_code, code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import published_row
from recspark.tables.snapshot import changed_rows

LISTS_CODE = "lists_code"  # in the detail of publish's row: `lists_code` of that night
_LIST_MODULES = (
    "recspark.pipeline.stages.recommend", "recspark.pipeline.stages.examples",
    "recspark.pipeline.stages.encode", "recspark.hybrid.ladder",
)  # fmt: skip


def active(mine: DataFrame, cutoff: datetime, active_days: int) -> DataFrame:
    """Return the rows of `histories` (sliced at `cutoff`) with an event in the `active_days` before
    it.
    """
    since = F.lit(cutoff - timedelta(days=active_days))
    return mine.where(F.element_at("history", -1)["event_at"] >= since)


def to_score(context: RunContext) -> DataFrame:
    """Return `user_idx, history, seen` of the active users that models score tonight.

    All of them, unless `publish.rescore_days` is set: then those that `kept_lists` does not answer.
    """
    mine = before(
        context.read("histories"), context.cutoff, ratings=context.config.features.explicit
    )
    answered = active(mine, context.cutoff, context.config.publish.active_days)
    kept = kept_lists(context)
    if kept is None:
        return answered
    return answered.join(kept.select("user_idx").distinct(), on="user_idx", how="left_anti")


def kept_lists(context: RunContext) -> DataFrame | None:
    """Return `user_idx, item_idx, rank, score, model` of the newest earlier night for users whose
    list still holds; None where everyone is scored. An impression counts as a change: it may join
    two of the user's sessions.

    A list still holds if the user's history is what it was then, has no event in the last
    `publish.rescore_days`, and all its items may still be listed. Nobody's list holds where code or
    settings of the lists have changed since, or what has changed is no longer known. A model that was
    only trained again on new data is the same model. An impression counts as a change: it may join two
    sessions.

    Cost: reads that night's lists and the event files that came since; a shuffle by user of both; no
    job but the look-up of the night.
    """
    config, catalog = context.config, context.catalog
    if config.publish.rescore_days is None or context.version("recommendations") is None:
        return None
    lists = context.read("recommendations")
    night = lists.where(F.col("run_date") < F.lit(context.run_date)).agg(F.max("run_date"))
    run_date = night.collect()[0][0]
    if run_date is None:
        return None
    done = published_row(catalog, run_date)
    if done is None or json.loads(done["detail"]).get(LISTS_CODE) != lists_code(context):
        return None
    if _of_lists(json.loads(done["config"])) != _of_lists(json.loads(config.resolved())):
        return None
    read, now = done["inputs"].get("histories"), context.version("histories")
    old, new = (catalog.note("histories", version) for version in (read, now))
    if old.get("settings") != new.get("settings") or old.get("events") is None:
        return None
    try:
        changed = changed_rows(catalog, "events", old["events"], new["events"])
    except VersionNotFoundError:
        return None
    users, items = context.read("user_ids"), context.read("item_ids")
    listable = context.read("item_features").where(F.col("cutoff") == F.lit(context.cutoff))
    last = (
        lists.where(F.col("run_date") == F.lit(run_date))
        .join(users.select("user_id", "user_idx"), on="user_id", how="inner")
        .join(F.broadcast(items.select("item_id", "item_idx")), on="item_id", how="inner")
        .select("user_idx", "item_idx", "rank", "score", "model")
    )
    gone = last.join(F.broadcast(listable.select("item_idx")), on="item_idx", how="left_anti")
    mine = before(context.read("histories"), context.cutoff)
    stale = (
        active(mine, context.cutoff, config.publish.rescore_days)
        .select("user_idx")
        .unionByName(gone.select("user_idx"))
        .unionByName(
            changed.join(users.select("user_id", "user_idx"), on="user_id", how="inner").select(
                "user_idx"
            )
        )
    )
    return last.join(stale.distinct(), on="user_idx", how="left_anti")


def lists_code(context: RunContext) -> str:
    """Return the digest of the code that makes tonight's lists: of the stages, and of the models of
    the ladder.
    """
    config = context.config
    algorithms = algorithm_code(config, *config.with_needs(config.publish.steps))
    return digest([algorithms, code_digest(*_LIST_MODULES)])


def _of_lists(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a list, of a resolved configuration."""
    publish, settings = config["publish"], config["model_settings"]
    models = [publish["model"], *publish["ladder"]]
    for name in models:  # and what they are built on
        needs = (settings.get(name) or {}).get("needs", ())
        models += [need for need in needs if need not in models]
    return {
        "publish": {name: publish[name] for name in ("model", "ladder", "mode", "k")},
        "models": {name: settings.get(name) for name in models},
        "examples": [config.get("examples"), config["evaluate"]["horizon_days"]],
        "features": config["features"],
        "seed": config["train"]["seed"],
        "n_candidates": config["n_candidates"],
    }

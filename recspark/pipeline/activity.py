"""The activity budget: which users are scored tonight, and which keep the list of
an earlier night.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import digest, lists_of
from recspark.data.interactions import before
from recspark.errors import VersionNotFoundError
from recspark.pipeline.availability import listable_items, unavailable_items
from recspark.pipeline.code_digest import algorithm_code, code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.rules import refused_tonight
from recspark.pipeline.runlog import published_row
from recspark.tables.snapshot import changed_rows

# Key in the detail of the `runs` row of publish: what `lists_code` returned that night.
LISTS_CODE = "lists_code"
# The modules that make lists, beside those of the models.
_LIST_MODULES = (
    "recspark.pipeline.stages.recommend", "recspark.pipeline.stages.examples",
    "recspark.pipeline.stages.encode", "recspark.hybrid.ladder", "recspark.pipeline.rules",
)  # fmt: skip


def active(histories: DataFrame, cutoff: datetime, active_days: int) -> DataFrame:
    """Return the rows of `histories` with an event in the `active_days` before `cutoff`.

    `histories` must be cut at `cutoff`.
    """
    since = F.lit(cutoff - timedelta(days=active_days))
    return histories.where(F.element_at("history", -1)["event_at"] >= since)


def to_score(context: RunContext) -> DataFrame:
    """Return `user_idx, history, seen` of the active users that models score tonight.

    These are all active users, unless `publish.rescore_days` is set: then those without a list from
    `kept_lists`.
    """
    histories = before(
        context.read("histories"), context.cutoffs.tonight, ratings=context.config.features.explicit
    )
    active_users = active(histories, context.cutoffs.tonight, context.config.publish.active_days)
    kept = kept_lists(context)
    if kept is None:
        return active_users
    return active_users.join(kept.select("user_idx").distinct(), on="user_idx", how="left_anti")


def kept_lists(context: RunContext) -> DataFrame | None:
    """Return the lists of the newest earlier night that still hold, or None where everyone is
    scored.

    Columns: `list, user_idx, item_idx, rank, score, model, because, rules`.

    A user's lists still hold, all or none of them, where

    - the user's events are the same as then,
    - the user has no event in the last `publish.rescore_days`,
    - the user had each of the lists, and
    - all their items may still be listed: they are available, and no rule of their list leaves them
      out.

    An impression counts as a changed event: it may join two of the user's sessions.

    No list holds where the code or the settings that decide lists have changed since, or where
    it is no longer known which events changed. A model that was only trained again on new data
    counts as the same model.

    Cost: reads the lists of that night and the event files that came since; one shuffle of both
    by user. The only job here is the one that finds the night.
    """
    config, catalog = context.config, context.catalog
    if config.publish.rescore_days is None or context.version("recommendations") is None:
        return None
    lists = context.read("recommendations")
    newest_night = lists.where(F.col("run_date") < F.lit(context.run_date)).agg(F.max("run_date"))
    last_night = newest_night.collect()[0][0]
    if last_night is None:
        return None
    publish_row = published_row(catalog, last_night)
    if publish_row is None or json.loads(publish_row["detail"]).get(LISTS_CODE) != lists_code(
        context
    ):
        return None
    if _list_settings(json.loads(publish_row["config"])) != _list_settings(
        json.loads(config.resolved())
    ):
        return None
    # The notes of `histories` of both nights say which version of `events` each of them reflects.
    version_then, version_tonight = (
        publish_row["inputs"].get("histories"),
        context.version("histories"),
    )
    note_then, note_tonight = (
        catalog.note("histories", version) for version in (version_then, version_tonight)
    )
    if note_then.get("settings") != note_tonight.get("settings") or note_then.get("events") is None:
        return None
    try:
        changed_events = changed_rows(
            catalog, "events", note_then["events"], note_tonight["events"]
        )
    except VersionNotFoundError:
        return None
    users, items = context.read("user_ids"), context.read("item_ids")
    listable = listable_items(context, unavailable_items(context))
    last_lists = (
        lists.where(F.col("run_date") == F.lit(last_night))
        .join(users.select("user_id", "user_idx"), on="user_id", how="inner")
        .join(context.item_sized(items.select("item_id", "item_idx")), on="item_id", how="inner")
        .select("list", "user_idx", "item_idx", "rank", "score", "model", "because", "rules")
    )
    # Whoever has an item that may no longer be listed, a recent event or a changed event is scored.
    rows_of_gone_items = last_lists.join(
        context.item_sized(listable), on="item_idx", how="left_anti"
    )
    if (refused := refused_tonight(context)) is not None:
        rows_of_refused_items = last_lists.join(
            context.item_sized(refused), on=["list", "item_idx"], how="left_semi"
        )
        rows_of_gone_items = rows_of_gone_items.unionByName(
            rows_of_refused_items.select(rows_of_gone_items.columns)
        )
    histories = before(context.read("histories"), context.cutoffs.tonight)
    users_to_score = (
        active(histories, context.cutoffs.tonight, config.publish.rescore_days)
        .select("user_idx")
        .unionByName(rows_of_gone_items.select("user_idx"))
        .unionByName(
            changed_events.join(
                users.select("user_id", "user_idx"), on="user_id", how="inner"
            ).select("user_idx")
        )
    )
    if (n_lists := len(config.publish.published_lists)) > 1:
        lists_of_users = last_lists.groupBy("user_idx").agg(F.count_distinct("list").alias("n"))
        users_to_score = users_to_score.unionByName(
            lists_of_users.where(F.col("n") < n_lists).select("user_idx")
        )
    return last_lists.join(users_to_score.distinct(), on="user_idx", how="left_anti")


def lists_code(context: RunContext) -> str:
    """Return the digest of the code that makes tonight's lists: of the stages, and of the models of
    their ladders.
    """
    config = context.config
    algorithms = algorithm_code(config, *config.with_needs(config.publish.steps))
    return digest([algorithms, code_digest(*_LIST_MODULES)])


def _list_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the lists, from the settings of a run (`config.resolved()`)."""
    settings, published_lists = config["model_settings"], lists_of(config["publish"])
    models = list(dict.fromkeys(step for one in published_lists for step in one.steps))
    for name in models:  # the list grows while it is read: also by the models that these need
        needs = (settings.get(name) or {}).get("needs", ())
        models += [need for need in needs if need not in models]
    return {
        # A night of an older version of recspark had no rules and no reasons.
        "publish": {one.name: [one.model, one.ladder, one.mode, one.k] for one in published_lists},
        "because": config["publish"].get("because"),
        "pool": config["publish"].get("pool"),
        "rules": {
            one.name: [[name, config.get("rules", {}).get(name)] for name in one.rules]
            for one in published_lists
        },
        "models": {name: settings.get(name) for name in models},
        "examples": [config.get("examples"), config["evaluate"]["horizon_days"]],
        "features": config["features"],
        "seed": config["train"]["seed"],
        "n_candidates": config["n_candidates"],
    }

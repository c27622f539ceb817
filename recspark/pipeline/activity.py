"""The activity budget: which users are scored tonight, and which keep the list of
an earlier night.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark.config import digest
from recspark.data.interactions import before
from recspark.errors import VersionNotFoundError
from recspark.pipeline.code_digest import algorithm_code, code_digest
from recspark.pipeline.context import RunContext
from recspark.pipeline.runlog import published_row
from recspark.tables.snapshot import changed_rows

# Key in the detail of the `runs` row of publish: what `lists_code` returned that night.
LISTS_CODE = "lists_code"
# The modules that make lists, beside those of the models.
_LIST_MODULES = (
    "recspark.pipeline.stages.recommend", "recspark.pipeline.stages.examples",
    "recspark.pipeline.stages.encode", "recspark.hybrid.ladder",
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

    Columns: `user_idx, item_idx, rank, score, model, because`.

    A user's list still holds where

    - the user's events are the same as then,
    - the user has no event in the last `publish.rescore_days`, and
    - all items of the list may still be listed.

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
    listable = context.read("item_features").where(
        F.col("cutoff") == F.lit(context.cutoffs.tonight)
    )
    last_lists = (
        lists.where(F.col("run_date") == F.lit(last_night))
        .join(users.select("user_id", "user_idx"), on="user_id", how="inner")
        .join(context.item_sized(items.select("item_id", "item_idx")), on="item_id", how="inner")
        .select("user_idx", "item_idx", "rank", "score", "model", "because")
    )
    # Whoever has an item that may no longer be listed, a recent event or a changed event is scored.
    rows_of_gone_items = last_lists.join(
        context.item_sized(listable.select("item_idx")), on="item_idx", how="left_anti"
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
    return last_lists.join(users_to_score.distinct(), on="user_idx", how="left_anti")


def lists_code(context: RunContext) -> str:
    """Return the digest of the code that makes tonight's lists: of the stages, and of the models of
    the ladder.
    """
    config = context.config
    algorithms = algorithm_code(config, *config.with_needs(config.publish.steps))
    return digest([algorithms, code_digest(*_LIST_MODULES)])


def _list_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that decide a list, from the settings of a run (`config.resolved()`)."""
    publish, settings = config["publish"], config["model_settings"]
    models = [publish["model"], *publish["ladder"]]
    for name in models:  # the list grows while it is read: also by the models that these need
        needs = (settings.get(name) or {}).get("needs", ())
        models += [need for need in needs if need not in models]
    return {
        "publish": {name: publish[name] for name in ("model", "ladder", "mode", "k")},
        "because": publish.get("because"),  # an earlier version of recspark had no reasons
        "models": {name: settings.get(name) for name in models},
        "examples": [config.get("examples"), config["evaluate"]["horizon_days"]],
        "features": config["features"],
        "seed": config["train"]["seed"],
        "n_candidates": config["n_candidates"],
    }

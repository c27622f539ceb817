"""Why an item is in a user's list of a night, or the first thing that kept it out.

Everything here is read from the tables of the night, through a `Reader`: no Spark is needed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from pydantic import ValidationError

from recspark.config import MAIN, Config, PublishedList, cutoff_of
from recspark.errors import ConfigError, UnknownUserError, suggest
from recspark.models.registry import kind_of
from recspark.pipeline.plan import STAGES, listed_tonight, models_of
from recspark.report.answers import names_before
from recspark.tables.reader import Reader


@dataclass(frozen=True)
class PublishedNight:
    """The run that published the lists of a night.

    Parameters
    ----------
    run_date, run_id : the night, and its run
    config : the settings of that run; secrets and paths are those of the text in `runs`
    published_list : the list that an item is looked for in
    """

    run_date: date
    run_id: str
    config: Config
    published_list: PublishedList

    @property
    def cutoff(self) -> datetime:
        """The first instant that was not in training, UTC, without a zone."""
        return cutoff_of(self.run_date).replace(tzinfo=None)

    def ranks(self, model: str, proposed_by: Collection[str]) -> bool:
        """Return whether `model` is a ranker, and one of the models that it ranks proposed an item.

        `proposed_by` : the models that proposed the item
        """
        is_ranker = kind_of(model, self.config.settings_of(model)) == "ranker"
        sources = {*self.config.with_needs([model])} - {model}
        return is_ranker and not sources.isdisjoint(proposed_by)


def published_night(tables: Reader, night: date, list_name: str | None = None) -> PublishedNight:
    """Return the run that published the lists of `night` last.

    `list_name` : the list that items are looked for in; None = `main`, or the first by name of a
    night without one. Raises ConfigError where the night published nothing, or no such list, or
    where its settings are those of another version of recspark.
    """
    rows = tables.rows(
        "runs",
        [("run_date", "=", night), ("stage", "=", STAGES[-1].name), ("status", "=", "ok")],
        ["run_id", "config", "ended_at"],
    )
    if not rows:
        raise ConfigError(f"--run-date {night}: no run of that night has published lists")
    newest = max(rows, key=lambda row: row["ended_at"])
    try:
        config = Config(**json.loads(newest["config"]))
    except ValidationError:
        raise ConfigError(
            f"night {night}: its settings in table 'runs' are those of another version of "
            "recspark; explain a newer night, or run this one again"
        ) from None
    lists = {one.name: one for one in config.publish.published_lists}
    name = list_name or (MAIN if MAIN in lists else min(lists))
    if name not in lists:
        raise ConfigError(
            f"night {night} has no list '{name}', but {', '.join(lists)}.{suggest(name, lists)}"
        )
    return PublishedNight(night, newest["run_id"], config, lists[name])


def explain(tables: Reader, user: str, item: str, night: PublishedNight) -> dict[str, Any]:
    """Return why `item` is in the list of `user`, or the first thing that kept it out.

    Returns
    -------
    user_id, item_id, item_name, run_date : what is explained; the name of that time
    listed : whether the item is in a list of the user
    candidates : model, rank, score of each model that proposed the item to the user, the best rank
        first; [] where the candidates of the night are no longer kept
    ranker : the ranker whose features can say more: that of the row, or the champion that did not
        put the item into the list; null = none
    list, rank, score, model, source, because, rules : of the row, where the item is listed
    stopped_by, reason : where it is not listed: one of `STOPS`, and the same as a sentence

    Raises UnknownUserError, with a suggestion, for a user or an item that is in no table. Raises
    ConfigError for an item that is not listed on a night whose candidates are no longer kept.

    Cost: one user's rows of `recommendations`, `candidates` and `events`; for an unknown item
    all ids of items.
    """
    user_idx = _index_of(tables, "user", user)
    item_idx = _index_of(tables, "item", item)
    rows = tables.rows(
        "recommendations",
        [
            ("run_date", "=", night.run_date),
            ("list", "=", night.published_list.name),
            ("user_id", "=", user),
        ],
    )
    has_candidates = night.run_date in tables.nights("candidates")
    candidates = _candidates(tables, night, user_idx) if has_candidates else []
    of_item = [row for row in candidates if row["item_idx"] == item_idx]
    proposed_by = {row["model"] for row in of_item}
    about = {
        "user_id": user,
        "item_id": item,
        "item_name": names_before(tables, [item], cutoff_of(night.run_date)).get(item),
        "run_date": night.run_date,
        "candidates": [
            {name: row[name] for name in ("model", "rank", "score")}
            for row in sorted(of_item, key=lambda row: (row["rank"], row["model"]))
        ],
    }
    for row in sorted(rows, key=lambda row: row["rank"]):
        if row["item_id"] == item:
            ranker = row["model"] if night.ranks(row["model"], proposed_by) else None
            return {**about, "listed": True, "ranker": ranker, **_of_row(row)}
    stopped_by, reason = _first_stop(
        tables, night, user, item, item_idx, rows, candidates, has_candidates
    )
    champion = night.published_list.model
    is_ranked = stopped_by in ("outranked", "rule") and night.ranks(champion, proposed_by)
    return {
        **about,
        "listed": False,
        "ranker": champion if is_ranked else None,
        "stopped_by": stopped_by,
        "reason": reason,
    }


# What keeps an item out of a list, in the order in which it is looked at.
STOPS = {
    "no_events": "the user has no event before the cutoff: such users get the default list",
    "not_active": "the user is not active: such users get the default list",
    "not_in_vocabulary": "the item has no event before the cutoff, so no model knows it",
    "not_available": "the item is not available",
    "seen": "the user acted on the item before, and the lists are of mode novel",
    "kept_list": "the user was not scored: the list of an earlier night still held, and was kept",
    "no_candidate": "no model proposed the item to the user",
    "outranked": "other items rank higher",
    "rule": "it ranks high enough, so a rule took its place",
}


def _first_stop(
    tables: Reader,
    night: PublishedNight,
    user: str,
    item: str,
    item_idx: int,
    rows: Sequence[dict[str, Any]],
    candidates: Sequence[dict[str, Any]],
    has_candidates: bool,
) -> tuple[str, str]:
    """Return the first of `STOPS` that holds, and a sentence with its figures.

    `rows` : the user's list; `candidates` : all that models proposed to the user
    """
    active_days = night.config.publish.active_days
    events = tables.rows(
        "events",
        [("user_id", "=", user), ("event_at", "<", cutoff_of(night.run_date))],
        ["item_id", "event_type", "event_at"],
    )
    impressions = night.config.sessions.impression_types
    acts = [row for row in events if row["event_type"] not in impressions]
    if not acts:
        return "no_events", STOPS["no_events"]
    last_event = max(row["event_at"] for row in acts)
    if last_event < night.cutoff - timedelta(days=active_days):
        return "not_active", (
            f"{STOPS['not_active']} (last event {last_event:%Y-%m-%d}, publish.active_days = "
            f"{active_days})"
        )
    if not has_candidates:
        raise ConfigError(
            f"night {night.run_date}: its candidates are no longer kept (keep_nights = "
            f"{night.config.keep_nights}), so nobody knows why the item is not listed; explain a "
            "newer night"
        )
    known = tables.rows(
        "item_features",
        [("cutoff", "=", cutoff_of(night.run_date)), ("item_idx", "=", item_idx)],
        ["item_idx"],
    )
    if not known:
        return "not_in_vocabulary", STOPS["not_in_vocabulary"]
    if not _is_available(tables, item, night.run_date):
        return "not_available", STOPS["not_available"]
    acts_on_item = [row["event_at"] for row in acts if row["item_id"] == item]
    if night.published_list.mode == "novel" and acts_on_item:
        return "seen", f"{STOPS['seen']} (last on {max(acts_on_item):%Y-%m-%d})"
    if any(row["source"] == "unchanged" for row in rows):
        return "kept_list", f"{STOPS['kept_list']}; explain that night"
    of_item = {row["model"]: row for row in candidates if row["item_idx"] == item_idx}
    sources = models_of(night.config, "retriever", "ranker", among=_asked(night))
    if not of_item:
        return "no_candidate", (
            f"{STOPS['no_candidate']}: it is not among the first {night.config.n_candidates} of "
            f"{', '.join(sources)}"
        )
    return _outranked(night, rows, of_item)


def _is_available(tables: Reader, item: str, night: date) -> bool:
    """Return whether an item could be listed on a night; the rule is that of
    `features.items_as_of`.
    """
    cutoff = cutoff_of(night)
    rows = tables.rows(
        "items",
        [("item_id", "=", item), ("valid_from", "<", cutoff)],
        ["valid_from", "ingest_date", "available", "available_from", "available_until"],
    )
    rows = [row for row in rows if row["available"] is not None]
    if not rows:
        return True
    latest = max(rows, key=lambda row: (row["valid_from"], row["ingest_date"]))
    begin, end = latest["available_from"], latest["available_until"]
    at = cutoff.replace(tzinfo=None)
    return (
        bool(latest["available"]) and (begin is None or begin <= at) and (end is None or end > at)
    )


def _outranked(
    night: PublishedNight, rows: Sequence[dict[str, Any]], of_item: dict[str, dict[str, Any]]
) -> tuple[str, str]:
    """Return the stop of an item that some models proposed: see `_first_stop`.

    `of_item` : model -> its candidate row of the item
    """
    published_list = night.published_list
    step = next((model for model in published_list.steps if model in of_item), None)
    last = max(rows, key=lambda row: row["rank"], default=None)
    end = (
        "the list is empty"
        if last is None
        else f"the last listed item, on rank {last['rank']}, has {last['score']:.6g} by "
        f"{last['model']}"
    )
    if step is None:
        best = min(of_item.values(), key=lambda row: row["rank"])
        return "outranked", (
            f"{STOPS['outranked']}: {best['model']} proposed it on rank {best['rank']}, but it is "
            f"not among the first {night.config.n_candidates} of {published_list.model}; {end}"
        )
    row = of_item[step]
    text = f"rank {row['rank']} of {step}, score {row['score']:.6g}"
    is_within = step == published_list.model and row["rank"] <= published_list.k
    if is_within:
        return "rule", f"{STOPS['rule']}: {text}; the list has {published_list.k} items"
    return "outranked", f"{STOPS['outranked']}: {text}; {end}"


def _asked(night: PublishedNight) -> Sequence[str]:
    """Return the models whose lists of that night were read, in the order of `models`."""
    asked = listed_tonight(night.config)
    return [model for model in night.config.models if model in asked]


def _index_of(tables: Reader, kind: str, name: str) -> int:
    """Return the integer of a user or item; `kind` is `user` or `item`.

    Raises UnknownUserError: for an item, with the most similar id.
    """
    table, column = f"{kind}_ids", f"{kind}_id"
    rows = tables.rows(table, [(column, "=", name)], [f"{kind}_idx"])
    if rows:
        return int(rows[0][f"{kind}_idx"])
    if kind == "user":
        raise UnknownUserError(
            f"user '{name}' has no events in any landing; everyone without a list gets "
            "default_recommendations"
        )
    known = [row["item_id"] for row in tables.rows("item_ids", [], ["item_id"])]
    raise UnknownUserError(f"no item is called '{name}'.{suggest(name, known)}")


def _candidates(tables: Reader, night: PublishedNight, user_idx: int) -> list[dict[str, Any]]:
    """Return item_idx, model, rank, score: everything that models proposed to the user."""
    rows = tables.rows(
        "candidates",
        [
            ("run_date", "=", night.run_date),
            ("cutoff", "=", cutoff_of(night.run_date)),
            ("mode", "=", night.published_list.mode),
            ("user_idx", "=", user_idx),
        ],
        ["item_idx", "model", "rank", "score"],
    )
    asked = _asked(night)
    return [row for row in rows if row["model"] in asked]


def _of_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the explanation says of a row of `recommendations`."""
    columns = ("list", "rank", "score", "model", "source", "because", "rules")
    about = {name: row[name] for name in columns}
    reasons = about.get("because")
    names = ("item_id", "item_name", "share")
    about["because"] = reasons and [{name: reason[name] for name in names} for reason in reasons]
    return about

"""Why an item is listed or not: a planted night, worked by hand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from recspark.config.load import load_config
from recspark.errors import ConfigError, UnknownUserError
from recspark.report.explanation import STOPS, explain, published_night
from recspark.tables.reader import Condition

NIGHT = date(2024, 5, 31)
CUTOFF = datetime(2024, 6, 1)
SETTINGS = (
    "models=[popular, ease, als, lambdamart, gru4rec]",
    "models.lambdamart.needs=[ease, als]",
    "publish={model: lambdamart, ladder: [popular], k: 2, active_days: 100, neighbours_model: ease}",
    "evaluate={ks: [2], baseline: popular}",
    "n_candidates=4",
)
USERS = {"ann": 0, "new": 1, "gone": 2, "quiet": 3}
ITEMS = {name: n for n, name in enumerate(["bag", "cup", "hat", "pen", "rug", "tie", "toy", "kit"])}


class Tables:
    """A `Reader` of rows in memory."""

    def __init__(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        self._rows = rows

    def nights(self, table: str) -> list[date]:
        return sorted({row["run_date"] for row in self._rows[table]})

    def rows(
        self, table: str, where: Sequence[Condition], columns: Sequence[str] = ()
    ) -> list[dict[str, Any]]:
        def holds(row: dict[str, Any], condition: Condition) -> bool:
            column, operator, value = condition
            cell = row[column]
            if isinstance(value, datetime):
                value = value.astimezone(UTC).replace(tzinfo=None)
            return bool(
                cell in value
                if operator == "in"
                else cell < value
                if operator == "<"
                else cell == value
            )

        kept = [row for row in self._rows[table] if all(holds(row, c) for c in where)]
        return [{name: row[name] for name in columns or row} for row in kept]

    def sizes(self) -> list[dict[str, Any]]:
        return []


def event(user: str, item: str, days_ago: float, event_type: str = "purchase") -> dict[str, Any]:
    at = CUTOFF - timedelta(days=days_ago)
    return {"user_id": user, "item_id": item, "event_at": at, "event_type": event_type}


def candidate(model: str, rank: int, item: str, user: str = "ann", **more: Any) -> dict[str, Any]:
    row = {"run_date": NIGHT, "cutoff": CUTOFF, "mode": "novel", "user_idx": USERS[user]}
    return {
        **row,
        "model": model,
        "rank": rank,
        "item_idx": ITEMS[item],
        "score": 10.0 - rank,
    } | more


def listed(rank: int, item: str, model: str, source: str, user: str = "ann") -> dict[str, Any]:
    because = [{"item_id": "bag", "item_name": "a bag", "share": 0.75}] if model == "ease" else None
    return {
        "run_date": NIGHT, "list": "main", "user_id": user, "rank": rank, "item_id": item, "item_name": f"a {item}",
        "score": 10.0 - rank, "model": model, "source": source, "because": because,
        "rules": [],
    }  # fmt: skip


@pytest.fixture
def rows() -> dict[str, list[dict[str, Any]]]:
    config = load_config("test", [*SETTINGS])
    run = {"run_date": NIGHT, "stage": "publish", "status": "ok", "config": config.resolved()}
    return {
        "runs": [
            {**run, "run_id": "first", "ended_at": CUTOFF, "config": "{}"},
            {**run, "run_id": "second", "ended_at": CUTOFF + timedelta(hours=1)},
            {**run, "run_id": "third", "ended_at": CUTOFF + timedelta(hours=2), "status": "failed"},
        ],
        "user_ids": [{"user_id": name, "user_idx": n} for name, n in USERS.items()],
        "item_ids": [{"item_id": name, "item_idx": n} for name, n in ITEMS.items()],
        "items": [
            {
                "item_id": name,
                "item_name": f"a {name}",
                "valid_from": CUTOFF - timedelta(days=9),
                "ingest_date": NIGHT,
                "available": None,
                "available_from": None,
                "available_until": None,
            }
            for name in ITEMS
        ],
        "events": [
            event("ann", "bag", 30),
            event("ann", "cup", 2),
            event("ann", "tie", 1, "impression"),
            # What came on the cutoff or after it does not count.
            event("ann", "kit", 0),
            event("new", "bag", -1),
            event("gone", "bag", 101),
            event("quiet", "bag", 50),
        ],
        "item_features": [
            {"cutoff": CUTOFF, "item_idx": n} for name, n in ITEMS.items() if name != "kit"
        ],
        "candidates": [
            candidate("ease", 1, "hat"),
            candidate("als", 1, "pen"),
            candidate("als", 2, "hat"),
            candidate("als", 3, "tie"),
            candidate("lambdamart", 1, "hat"),
            candidate("lambdamart", 2, "rug"),  # without a row of a source: as if it were gone
            candidate("lambdamart", 3, "pen"),
            candidate("popular", 4, "toy"),
            # What nobody reads: another mode, another cutoff, a model that is only compared.
            candidate("als", 1, "bag", mode="repeat"),
            candidate("als", 1, "tie", mode="repeat"),
            candidate("als", 1, "tie", cutoff=CUTOFF - timedelta(days=7)),
            candidate("gru4rec", 1, "tie"),
        ],
        "recommendations": [
            listed(1, "hat", "lambdamart", "champion"),
            listed(2, "pen", "lambdamart", "champion"),
            listed(1, "hat", "ease", "unchanged", "quiet"),
        ],
    }


def answer(rows: dict[str, list[dict[str, Any]]], user: str, item: str) -> dict[str, Any]:
    tables = Tables(rows)
    return explain(tables, user, item, published_night(tables, NIGHT))


def test_the_run_that_published_last_is_explained(rows: dict[str, list[dict[str, Any]]]) -> None:
    night = published_night(Tables(rows), NIGHT)
    assert (night.run_id, night.config.publish.k) == ("second", 2)
    with pytest.raises(ConfigError, match="no run of that night has published"):
        published_night(Tables(rows), NIGHT + timedelta(days=1))
    rows["runs"][1]["config"] = "{}"
    with pytest.raises(ConfigError, match="another version of recspark"):
        published_night(Tables(rows), NIGHT)


def test_a_listed_item(rows: dict[str, list[dict[str, Any]]]) -> None:
    about = answer(rows, "ann", "hat")
    assert about["listed"]
    assert {name: about[name] for name in ("list", "rank", "score", "model", "source")} == {
        "list": "main", "rank": 1, "score": 9.0, "model": "lambdamart", "source": "champion",
    }  # fmt: skip
    assert (about["item_name"], about["ranker"], about["because"]) == ("a hat", "lambdamart", None)
    assert [(row["model"], row["rank"]) for row in about["candidates"]] == [
        ("ease", 1), ("lambdamart", 1), ("als", 2),
    ]  # fmt: skip
    kept = answer(rows, "quiet", "hat")
    assert (kept["source"], kept["ranker"]) == ("unchanged", None)
    assert kept["because"] == [{"item_id": "bag", "item_name": "a bag", "share": 0.75}]


@pytest.mark.parametrize(
    ("user", "item", "stop", "words"),
    [
        ("new", "hat", "no_events", ""),
        ("gone", "hat", "not_active", "last event 2024-02-21, publish.active_days = 100"),
        ("ann", "kit", "not_in_vocabulary", ""),  # its only event is on the cutoff
        ("ann", "cup", "seen", "last on 2024-05-30"),
        ("quiet", "pen", "kept_list", ""),
        # Proposed in another mode, at another cutoff and by a model that nobody reads.
        ("ann", "toy", "outranked", "rank 4 of popular, score 6; the last listed item, on rank 2"),
        ("ann", "tie", "outranked", "als proposed it on rank 3, but it is not among the first 4"),
        ("ann", "rug", "rule", "rank 2 of lambdamart, score 8; the list has 2 items"),
    ],
)
def test_what_kept_an_item_out(
    rows: dict[str, list[dict[str, Any]]], user: str, item: str, stop: str, words: str
) -> None:
    about = answer(rows, user, item)
    assert not about["listed"]
    assert about["stopped_by"] == stop
    assert about["reason"].startswith(STOPS[stop])
    assert words in about["reason"]
    # Of what its sources proposed, the ranker can say more; of `toy`, only `popular` knows.
    assert about["ranker"] == ("lambdamart" if item == "tie" else None)


def test_an_item_that_nobody_proposed(rows: dict[str, list[dict[str, Any]]]) -> None:
    rows["candidates"] = [row for row in rows["candidates"] if row["item_idx"] != ITEMS["toy"]]
    about = answer(rows, "ann", "toy")
    assert about["stopped_by"] == "no_candidate"
    assert "the first 4 of popular, ease, als, lambdamart" in about["reason"]
    assert about["candidates"] == []


def test_mode_repeat_lets_seen_items_in(rows: dict[str, list[dict[str, Any]]]) -> None:
    config = load_config("test", [*SETTINGS, "publish.mode=repeat"])
    rows["runs"][1]["config"] = config.resolved()
    about = answer(rows, "ann", "bag")
    assert about["stopped_by"] == "outranked"
    assert [(row["model"], row["rank"]) for row in about["candidates"]] == [("als", 1)]
    assert answer(rows, "ann", "cup")["stopped_by"] == "no_candidate"


def test_an_item_that_is_not_available(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The latest row that says anything counts, as in `features.items_as_of`."""

    def stop(*said: dict[str, Any]) -> str:
        rows["items"] = rows["items"][: len(ITEMS)]
        for days, about in enumerate(said):
            row = {"valid_from": CUTOFF - timedelta(days=5 - days), "ingest_date": NIGHT}
            unsaid = dict.fromkeys(("available", "available_from", "available_until"))
            rows["items"].append({"item_id": "toy", "item_name": None, **row, **unsaid, **about})
        return str(answer(rows, "ann", "toy")["stopped_by"])

    yes, no = {"available": True}, {"available": False}
    assert stop(no) == stop(yes, no) == stop(no, {}) == "not_available"
    assert stop(no, yes) == stop({}) == "outranked"
    later = CUTOFF + timedelta(seconds=1)
    assert stop({**yes, "available_until": CUTOFF}) == "not_available"
    assert stop({**yes, "available_from": later}) == "not_available"
    assert stop({**yes, "available_from": CUTOFF, "available_until": later}) == "outranked"


def test_another_list_is_looked_in_by_its_name(rows: dict[str, list[dict[str, Any]]]) -> None:
    config = load_config("test", [*SETTINGS, "publish.lists={main: {}, again: {mode: repeat}}"])
    rows["runs"][1]["config"] = config.resolved()
    rows["recommendations"].append({**listed(1, "cup", "als", "champion"), "list": "again"})
    tables = Tables(rows)
    again = published_night(tables, NIGHT, "again")
    assert explain(tables, "ann", "cup", again)["list"] == "again"
    assert explain(tables, "ann", "hat", again)["stopped_by"] == "no_candidate"
    assert answer(rows, "ann", "cup")["stopped_by"] == "seen"
    with pytest.raises(ConfigError, match="no list 'once', but "):
        published_night(tables, NIGHT, "once")


def test_who_is_not_there(rows: dict[str, list[dict[str, Any]]]) -> None:
    with pytest.raises(UnknownUserError, match="user 'nobody' has no events"):
        answer(rows, "nobody", "hat")
    with pytest.raises(UnknownUserError, match="no item is called 'haat'. Did you mean 'hat'?"):
        answer(rows, "ann", "haat")


def test_a_night_whose_candidates_are_gone(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Listed items are still explained, and so is what needs no candidates."""
    for row in rows["candidates"]:
        row["run_date"] = NIGHT + timedelta(days=40)
    about = answer(rows, "ann", "hat")
    assert about["listed"]
    assert (about["candidates"], about["ranker"]) == ([], None)
    assert answer(rows, "new", "hat")["stopped_by"] == "no_events"
    with pytest.raises(ConfigError, match="no longer kept"):
        answer(rows, "ann", "tie")

"""A night of a shop with a complete catalogue and rules: what is not available is in no list, and
the rules show in the lists, the metrics and the report.
"""

from __future__ import annotations

import csv
import io
import random
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import functions as F
from rich.console import Console

from recspark.errors import ConfigError
from recspark.pipeline.context import RunContext
from recspark.pipeline.run import night, open_night
from recspark.report.night import print_night

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]

BEFORE_RULES = "published_before_rules"  # the list main, before its rules
FIRST, SECOND = date(2024, 5, 1), date(2024, 5, 20)
# item -> (name, category): bottles are one family of names, and half of all sales.
CATALOGUE = {
    **{f"b{n}": (f"hot water bottle {n}", "warm") for n in range(8)},
    **{
        f"t{n}": (f"{word} pot", "tea")
        for n, word in enumerate(["oak", "elm", "ash", "fir", "yew"])
    },
    **{f"c{n}": (f"{word} candle", "light") for n, word in enumerate(["red", "sky", "sea", "sun"])},
    "gone": ("old lamp", "light"),
    "off": ("new lamp", "light"),
    "ends": ("last lamp", "light"),
}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def sales(day: date, n_days: int) -> list[dict[str, Any]]:
    """Sales of the days up to `day`; the items that are not available later sell best."""
    random_items = random.Random(day.toordinal())
    items = [*CATALOGUE, *["gone", "off", "ends"] * 5, *[f"b{n}" for n in range(8)]]
    return [
        {
            "user": f"u{random_items.randrange(30)}",
            "item": random_items.choice(items),
            "at": datetime.combine(day, datetime.min.time()) - timedelta(days=d, minutes=-n),
        }
        for d in range(n_days)
        for n in range(12)
    ]


def catalogue(day: date) -> list[dict[str, Any]]:
    """The complete catalogue of a night: on the second, `gone` is not in it, `off` is not in stock,
    and `ends` ended that day."""
    return [
        {
            "item": item,
            "name": name,
            "category": category,
            "price": 2,
            "stock": "no" if (item, day) == ("off", SECOND) else "yes",
            "until": "2024-05-20" if item == "ends" else "",
        }
        for item, (name, category) in CATALOGUE.items()
        if (item, day) != ("gone", SECOND)
    ]


def opened(root: Path, day: date, *more: str) -> RunContext:
    source = (
        f"source={{name: shop, kind: mapping, path: '{root}/inbox/{{run_date}}/events.csv', "
        f"archive: false, format: csv, items_path: '{root}/inbox/{{run_date}}/items.csv', "
        "items_complete: true, items_columns: {item_id: item, item_name: name, category: category, "
        "price: price, available: stock, available_until: until}, "
        "columns: {user_id: user, item_id: item, event_at: at}, constants: {event_type: purchase}}"
    )
    settings = [
        source,
        f"paths.root={root}/lake",
        "models=[popular, ease]",
        "publish={model: ease, ladder: [popular], neighbours_model: ease, mode: repeat, k: 5}",
        "evaluate={horizon_days: 5, ks: [5], n_bootstrap: 20}",
        "ingest.max_late_days=30",
        "rules.family={kind: cap, by: name, at_most: 2, similarity: 0.3}",
        "rules.tea={kind: pin, categories: [tea], places: 1}",
        "rules.no_red={kind: leave_out, words: [Red], segments: [light, regular, heavy]}",
        "publish.rules=[tea, family, no_red]",
        "n_candidates=20",
    ]
    return open_night("test", day, [*settings, *more])


def rows(context: RunContext, table: str) -> list[Any]:
    frame = context.catalog.read(table, context.catalog.version(table))
    return frame.where(F.col("run_date") == F.lit(context.run_date)).collect()


@pytest.fixture(scope="module")
def second_night(spark: object, tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    root = tmp_path_factory.mktemp("rules")
    for day, n_days in ((FIRST, 40), (SECOND, 19)):
        write(root / "inbox" / str(day) / "events.csv", sales(day, n_days))
        write(root / "inbox" / str(day) / "items.csv", catalogue(day))
    first = opened(root, FIRST, "publish.rules=[]")
    night(first)
    # Without rules, what sells best is in the lists, and so are many bottles.
    lists = rows(first, "recommendations")
    assert {"gone", "off", "ends"} <= {row["item_id"] for row in lists}
    assert all(row["rules"] == [] for row in lists)
    second = opened(root, SECOND)
    night(second)
    return second


def test_what_is_not_available_is_in_no_list(second_night: RunContext) -> None:
    listed: dict[str, set[str]] = {
        "recommendations": {r["item_id"] for r in rows(second_night, "recommendations")},
        "default_recommendations": {
            r["item_id"] for r in rows(second_night, "default_recommendations")
        },
        "item_neighbours": {r["neighbour_id"] for r in rows(second_night, "item_neighbours")},
    }
    for table, items in listed.items():
        assert items, table
        assert items.isdisjoint({"gone", "off", "ends"}), table
    names = {r["neighbour_id"] for r in rows(second_night, "item_neighbours")}
    assert {"b0", "t0"} <= names
    assert {r["item_id"] for r in rows(second_night, "item_neighbours")} >= {"gone"}


def test_the_lists_obey_the_rules(second_night: RunContext) -> None:
    lists: dict[str, list[Any]] = {}
    for row in sorted(rows(second_night, "recommendations"), key=lambda row: row["rank"]):
        lists.setdefault(row["user_id"], []).append(row)
    assert len(lists) == 30
    reasons = set()
    for listed in lists.values():
        assert [row["rank"] for row in listed] == [1, 2, 3, 4, 5]
        families = [CATALOGUE[row["item_id"]][0].split()[-1] for row in listed]
        is_bottle = ["bottle" in CATALOGUE[row["item_id"]][0] for row in listed]
        assert sum(is_bottle) <= 2
        assert families[0] == "pot"
        assert "c0" not in {row["item_id"] for row in listed}
        reasons |= {name for row in listed for name in row["rules"]}
        assert all({*row["rules"]} <= {"tea", "family", "no_red"} for row in listed)
    assert {"tea", "family"} <= reasons


def test_the_metrics_say_what_the_rules_cost(second_night: RunContext) -> None:
    figures = {
        (row["model"], row["metric"]): row["value"]
        for row in rows(second_night, "metrics")
        if row["kind"] == "backtest" and row["mode"] == "repeat" and row["segment"] == "all"
    }
    assert {(BEFORE_RULES, "ndcg"), ("published", "ndcg")} <= set(figures)
    assert figures["ease", "ndcg"] == pytest.approx(figures[BEFORE_RULES, "ndcg"])
    assert figures["published", "ndcg"] != figures[BEFORE_RULES, "ndcg"]


def test_a_rule_that_names_what_no_item_has_stops_before_anything_is_written(
    second_night: RunContext,
) -> None:
    root = Path(second_night.catalog.root).parents[1]
    versions = second_night.catalog.versions()
    context = opened(root, SECOND, "rules.tea={kind: pin, categories: [tae], places: 1}")
    with pytest.raises(ConfigError, match=r"rules\.tea\.categories .* 'tae'\. Did you mean 'tea'"):
        night(context)
    after = second_night.catalog.versions()
    published = ("recommendations", "staged_recommendations", "default_recommendations", "gates")
    assert {t: after[t] for t in published} == {t: versions[t] for t in published}


def test_the_report_shows_the_lists_before_and_after(second_night: RunContext) -> None:
    text = io.StringIO()
    print_night(second_night, Console(file=text, width=200))
    assert BEFORE_RULES in text.getvalue()

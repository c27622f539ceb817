"""A night of a shop whose catalogue has items that nobody bought yet: models that know their content
list them, a rule brings them to the top of the published lists, and the metrics say how well.
"""

from __future__ import annotations

import csv
import random
from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark.pipeline.context import RunContext
from recspark.pipeline.run import night, open_night
from tests.contract.documented import documented

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]

NIGHT = date(2024, 5, 31)
BACKTEST = datetime(2024, 5, 25)  # a horizon of 7 days before the night's end
GROUPS = ("rose", "pine", "lime", "plum")
N_USERS, N_SOLD, N_LATE, N_UNSOLD = 48, 6, 3, 4  # of each group but for the users


def catalogue() -> list[dict[str, Any]]:
    """Of each group: items of the archive, items first sold in the last week, and unsold ones.

    One unsold item of each group is described in the last week only.
    """
    kinds = {"sold": N_SOLD, "late": N_LATE, "unsold": N_UNSOLD}
    return [
        {
            "item": f"{group}-{kind}{n}",
            "name": f"{group} {word}",
            "since": "2024-05-28" if (kind, n) == ("unsold", 0) else "2024-01-01",
        }
        for group in GROUPS
        for kind, n_items in kinds.items()
        for n, word in enumerate(("soap", "cream", "oil", "balm", "salt", "milk")[:n_items])
    ]


def sales() -> list[dict[str, Any]]:
    """User u buys of the group u % 4; late items from the backtest's cutoff on only."""
    draw = random.Random(7)
    rows = []
    for user in range(N_USERS):
        group = GROUPS[user % len(GROUPS)]
        for n, item in enumerate(draw.sample(range(N_SOLD), 4)):
            at = BACKTEST - timedelta(days=1 + 5 * n, minutes=user)
            rows.append({"user": f"u{user}", "item": f"{group}-sold{item}", "at": at})
        at = BACKTEST + timedelta(days=1 + user % 5, minutes=user)
        rows.append({"user": f"u{user}", "item": f"{group}-late{draw.randrange(N_LATE)}", "at": at})
    return rows


@pytest.fixture(scope="module")
def shop(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    words = documented(spark, tmp_path_factory.mktemp("cold"), "words")
    root = tmp_path_factory.mktemp("shop")
    for name, rows in (("items", catalogue()), ("events", sales())):
        path = root / "inbox" / f"{NIGHT}" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as lines:
            writer = csv.DictWriter(lines, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    inbox = f"{root}/inbox/{{run_date}}"
    settings = [
        f"source={{name: shop, kind: mapping, path: '{inbox}/events.csv', archive: false, "
        f"format: csv, items_path: '{inbox}/items.csv', "
        "items_columns: {item_id: item, item_name: name, valid_from: since}, "
        "columns: {user_id: user, item_id: item, event_at: at}, "
        "constants: {event_type: purchase}}",
        f"paths.root={root}/lake",
        "models=[popular, als, words, alike, new]",
        f"models.words={{algorithm: '{words}', kind: encoder}}",
        "models.als={embedding_size: 8, iterations: 4, n_blocks: 2}",
        "models.alike={algorithm: content_knn, needs: [words], n_neighbours: 4}",
        "models.new={algorithm: content_factors, needs: [als, words], fields: [], items: cold}",
        "publish={model: als, ladder: [new, popular], rules: [news], k: 5, neighbours_model: alike}",
        "rules={news: {kind: freshness, days: 0, places: 2}}",
        "evaluate={horizon_days: 7, ks: [3], n_bootstrap: 20}",
    ]
    context = open_night("test", NIGHT, settings)
    night(context)
    return context


def table(shop: RunContext, name: str) -> pd.DataFrame:
    return shop.catalog.read(name, shop.catalog.version(name)).toPandas()


def test_new_items_are_on_top_of_every_list_and_say_where_they_come_from(shop: RunContext) -> None:
    rows = table(shop, "recommendations")
    rows["is_new"] = rows["item_id"].str.contains("unsold")
    assert rows.groupby("user_id").size().eq(5).all()
    assert (
        rows[rows["is_new"]].groupby("user_id")["rank"].apply(list).map(sorted).tolist()
        == [[1, 2]] * N_USERS
    )
    assert set(rows[rows["is_new"]]["source"]) == {"fallback:new"}
    assert set(rows[~rows["is_new"]]["source"]) == {"champion"}
    assert {tuple(rules) for rules in rows[rows["is_new"]]["rules"]} == {("news",)}
    group = rows["user_id"].str[1:].astype(int).mod(4).map(dict(enumerate(GROUPS)))
    of_group = rows["item_id"].str.split("-").str[0] == group
    assert of_group[rows["is_new"]].mean() > 0.9
    gates = table(shop, "gates").set_index("gate")
    assert gates.loc["unknown_items", "passed"]


def test_the_metrics_have_rows_of_items_without_events(shop: RunContext) -> None:
    rows = table(shop, "metrics").query("kind == 'backtest' and mode == 'novel'")
    n_cold = len(GROUPS) * (N_LATE + N_UNSOLD - 1)  # as of the backtest's cutoff
    for segment in ("cold_items", "among_cold_items"):
        of_segment = rows[rows["segment"] == segment]
        value = of_segment.set_index(["model", "metric"])["value"]
        assert value["population", "n_items"] == n_cold
        assert value["population", "n_users"] == N_USERS
    value = rows[rows["segment"] == "cold_items"].set_index(["model", "metric"])["value"]
    assert value["als", "hit_rate"] == value["popular", "hit_rate"] == 0
    assert value["published", "hit_rate"] > 0  # `new` is in its ladder
    among = rows[rows["segment"] == "among_cold_items"].set_index(["model", "metric"])["value"]
    assert {model for model, _ in among.index} == {"alike", "new", "population"}
    # Of the six items of the user's group, three are listed; by chance 3 of 24 would be a hit.
    for model in ("alike", "new"):
        assert among[model, "hit_rate"] > 0.35
    known = rows[~rows["segment"].isin(["cold_items", "among_cold_items"])]
    assert (known["model"] == "als").sum() > 0


def test_nothing_is_listed_that_was_not_described_yet(shop: RunContext) -> None:
    """Rule 10: an item described between the two cutoffs is in tonight's lists only."""
    lists = table(shop, "candidates").merge(table(shop, "item_ids"), on="item_idx")
    backtest = lists["cutoff"] == pd.Timestamp(shop.cutoffs.backtest).tz_localize(None)
    of_week = lists["item_id"].str.contains("unsold0")
    assert not (backtest & of_week).any()
    assert (~backtest & of_week & (lists["model"] == "new")).any()
    events = shop.catalog.read("events", shop.catalog.version("events"))
    sold = {row[0] for row in events.select("item_id").distinct().collect()}
    tonight = set(lists[~backtest & (lists["model"] == "new")]["item_id"])
    assert tonight == {f"{g}-unsold{n}" for g in GROUPS for n in range(N_UNSOLD)}
    assert not tonight & sold
    assert events.where(F.col("item_id").contains("late")).count() == N_USERS


def test_neighbours_of_items_without_events_are_there(shop: RunContext) -> None:
    rows = table(shop, "item_neighbours")
    of_unsold = rows[rows["item_id"].str.contains("unsold") & (rows["rank"] == 1)]
    assert len(of_unsold) == 0 or np.isfinite(of_unsold["score"]).all()

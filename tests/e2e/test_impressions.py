"""Impressions through the stages: a click-through model learns from them, and they count for nothing."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import functions as F

from recspark.eval.evaluate import truth
from recspark.pipeline.context import RunContext
from recspark.pipeline.plan import STAGES, find_stage
from recspark.pipeline.run import execute, open_night

pytestmark = [pytest.mark.spark, pytest.mark.torch, pytest.mark.timeout(600)]
FIRST, NIGHT = datetime(2020, 3, 1), date(2020, 3, 3)
GROUPS, ITEMS = (
    3,
    12,
)  # item i belongs to group i % GROUPS; item "never" is shown, nobody acts on it
COLUMNS = {name: name for name in ("user_id", "item_id", "event_type", "event_at")}


def shop() -> pd.DataFrame:
    """Sessions of 40 users on three days: of what is shown, the next group of the last item is
    clicked eight times in ten, the rest one time in fifty."""
    rng = np.random.default_rng(1)
    events: list[tuple[str, str, str, datetime]] = []
    for user in range(40):
        for day in range(3):
            at = FIRST + timedelta(days=day, hours=8, minutes=int(rng.integers(600)))
            last = int(rng.integers(ITEMS))
            events.append((f"u{user}", f"i{last}", "click", at))
            for _ in range(6):
                at += timedelta(minutes=2)
                shown = [int(item) for item in rng.choice(ITEMS, 3, replace=False)]
                events += [(f"u{user}", f"i{item}", "impression", at) for item in shown]
                events.append((f"u{user}", "never", "impression", at))
                follows = (last + 1) % GROUPS
                for item in shown:
                    if rng.random() < (0.8 if item % GROUPS == follows else 0.02):
                        at += timedelta(seconds=9)
                        events.append((f"u{user}", f"i{item}", "click", at))
                        last = item
    events.append(("looker", "i1", "impression", FIRST))  # acts on nothing
    return pd.DataFrame(events, columns=[*COLUMNS])


@pytest.fixture(scope="module")
def context(spark: object, tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    """The stages up to the lists of gru4rec with the click-through head."""
    root = tmp_path_factory.mktemp("shop")
    shop().to_parquet(root / "events.parquet", coerce_timestamps="us")
    settings = [
        f"paths.root={root}",
        "source.kind=mapping",
        f"source.path={root / 'events.parquet'}",
        f"source.columns={COLUMNS}",
        "models=[popular, item_knn, gru4rec]",
        "models.gru4rec={head: click_through, train_on: session, context: session, hidden_size: 16, "
        "epochs: 12, batch_size: 16, learning_rate: 0.02, dropout: 0.0}",
        "publish={model: popular, ladder: [], neighbours_model: item_knn}",
        "evaluate.horizon_days=1",
        "n_candidates=20",
        "train.ranks=1",
    ]
    context = open_night("test", NIGHT, settings)
    for stage in STAGES[:3]:
        execute(context, stage)
    for name in ("train", "recommend"):
        execute(context, find_stage(name), "gru4rec")
    return context


def rows(context: RunContext, table: str) -> Any:
    return context.catalog.read(table, context.catalog.version(table))


def idx(context: RunContext) -> dict[str, int]:
    return {r["item_id"]: r["item_idx"] for r in rows(context, "item_ids").collect()}


def test_what_was_only_shown_counts_for_nothing(context: RunContext) -> None:
    events = shop()
    acts = events[events["event_type"] == "click"]
    numbers = idx(context)
    users = {r["user_id"]: r["user_idx"] for r in rows(context, "user_ids").collect()}
    histories = rows(context, "histories")
    seen = {r["user_idx"]: set(r["seen"]) for r in histories.collect()}
    by_user = acts.groupby("user_id")["item_id"].agg(set)
    assert seen == {users[u]: {numbers[i] for i in items} for u, items in by_user.items()}
    types = histories.select(F.explode("history.event_type")).distinct().collect()
    assert [r[0] for r in types] == ["click"]
    night = rows(context, "item_features").where(F.col("cutoff") == F.lit(context.cutoffs.tonight))
    counts = {r["item_idx"]: r["n_events"] for r in night.collect()}
    assert counts == {numbers[i]: n for i, n in acts["item_id"].value_counts().items()}
    assert numbers["never"] not in counts
    truths = truth(histories, context.cutoffs.backtest, 1).collect()
    last_day = acts[acts["event_at"] >= FIRST + timedelta(days=2)]
    by_user = last_day.groupby("user_id")["item_id"].agg(set)
    found = {r["user_idx"]: set(r["items"]) for r in truths}
    assert found == {users[u]: {numbers[i] for i in items} for u, items in by_user.items()}
    in_sessions = {
        i for r in rows(context, "sessions").select("items").collect() for i in r["items"]
    }
    assert in_sessions == set(acts["item_id"])


def test_the_training_table_holds_them_and_is_the_only_one(context: RunContext) -> None:
    made = {name for name in context.catalog.versions() if name.startswith("training_")}
    assert made == {"training_session_impressions", "training_curves"}
    table = rows(context, "training_session_impressions").where(
        F.col("cutoff") == F.lit(context.cutoffs.tonight)
    )
    numbers = idx(context)
    shown: list[tuple[int, int]] = []
    for row in table.collect():
        n = sum(item >= 0 for item in row["shown"])
        shown += zip(row["shown"][:n], row["clicked"][:n], strict=True)
    events = shop()
    impressions = events[(events["event_type"] == "impression") & (events["user_id"] != "looker")]
    assert len(shown) == len(impressions)
    of_never = [clicked for item, clicked in shown if item == numbers["never"]]
    assert len(of_never) > 500
    assert not any(of_never)
    assert sum(clicked for _, clicked in shown) > 200


def test_lists_follow_the_planted_clicks(context: RunContext) -> None:
    """The first four items are those of the group after the last item's."""
    numbers = idx(context)
    names = {index: name for name, index in numbers.items()}
    lists = rows(context, "candidates").where(
        (F.col("cutoff") == F.lit(context.cutoffs.backtest)) & (F.col("mode") == "repeat")
    )
    ended = {
        r["user_idx"]: r["last"]
        for r in rows(context, "histories")
        .select(
            "user_idx",
            F.element_at(
                F.filter("history", lambda e: e["event_at"] < F.lit(context.cutoffs.backtest)), -1
            )["item_idx"].alias("last"),
        )
        .collect()
    }
    right = []
    for row in lists.where("rank <= 4").collect():
        item, last = (int(names[i][1:]) for i in (row["item_idx"], ended[row["user_idx"]]))
        right.append(item % GROUPS == (last + 1) % GROUPS)
    assert len(right) == 160
    assert np.mean(right) > 0.9
    assert lists.where(F.col("item_idx") == numbers["never"]).isEmpty()

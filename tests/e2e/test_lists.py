"""Several lists a night: each in its own mode, by its own champion, judged by gates of its own, and
published in one commit. The night before was one of an installation that knew one list only.
"""

from __future__ import annotations

from datetime import date, timedelta

import pandas as pd
import pytest
from pyspark.sql import functions as F

from recspark.errors import GateRefusedError
from recspark.pipeline.context import RunContext
from recspark.pipeline.run import night
from recspark.pipeline.stages.evaluate import published_lists
from recspark.report.answers import user_lists
from recspark.report.night import user_panel
from recspark.tables.reader import TableReader
from tests.e2e.test_odd_nights import FIRST, LAST, Open, opener

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]
SECOND = FIRST + timedelta(days=1)
ONE_LIST = (
    "models=[popular, item_knn, own]",
    "models.own.algorithm=own_items",
    "evaluate.baseline=own",  # the list `again` is no worse: in this shop nobody buys again
    "publish.k=4",
)
TWO_LISTS = (
    *ONE_LIST,
    "publish.lists={main: {}, again: {model: own, mode: repeat, ladder: [item_knn], k: 3}}",
)
HAVE_A_LIST = ("recommendations", "staged_recommendations", "gates")


def forget_lists(context: RunContext) -> None:
    """Write the tables as recspark had them before it knew several lists."""
    for table in HAVE_A_LIST:
        rows = context.catalog.read(table, context.catalog.version(table)).drop("list")
        writer = rows.write.format("delta").mode("overwrite").option("overwriteSchema", "true")
        writer.partitionBy("run_date").save(context.catalog.path(table))


@pytest.fixture(scope="module")
def opened(spark: object, tmp_path_factory: pytest.TempPathFactory) -> Open:
    return opener(tmp_path_factory.mktemp("lists"))


@pytest.fixture(scope="module")
def second_night(opened: Open) -> RunContext:
    """The context of the first night with two lists, after a night with one."""
    first = opened(FIRST, *ONE_LIST)
    night(first)
    forget_lists(first)
    context = opened(SECOND, *TWO_LISTS)
    night(context)
    return context


def rows_of(context: RunContext, table: str, day: date = SECOND) -> pd.DataFrame:
    rows = context.catalog.read(table, context.catalog.version(table))
    return rows.where(F.col("run_date") == F.lit(day)).toPandas()


def test_every_user_has_each_list_in_its_own_mode(second_night: RunContext) -> None:
    lists = rows_of(second_night, "recommendations")
    assert lists.groupby(["list", "user_id"]).size().unstack("list").shape == (40, 2)
    assert lists.groupby("list")["rank"].max().to_dict() == {"main": 4, "again": 3}
    catalog = second_night.catalog
    events = catalog.read("events", catalog.version("events")).toPandas()
    bought = set(zip(events["user_id"], events["item_id"]))
    is_bought = [pair in bought for pair in zip(lists["user_id"], lists["item_id"])]
    assert lists.assign(is_bought=is_bought).groupby("list")["is_bought"].agg(
        ["min", "max"]
    ).to_dict("index") == {
        "main": {"min": False, "max": False},
        "again": {"min": True, "max": True},
    }
    assert set(lists.loc[lists["list"] == "again", "model"]) == {"own"}


def test_models_list_in_the_modes_that_a_list_reads(second_night: RunContext) -> None:
    candidates = rows_of(second_night, "candidates")
    is_tonight = candidates["cutoff"] == second_night.cutoffs.tonight.replace(tzinfo=None)
    tonight = candidates[is_tonight].groupby("model")["mode"].unique().map(set).to_dict()
    assert tonight == {"popular": {"novel"}, "own": {"repeat"}, "item_knn": {"repeat"}}
    backtest = candidates[~is_tonight]
    modes = {"novel", "repeat"}
    assert set(backtest.loc[backtest["model"] == "published_again", "mode"]) <= modes
    of_own = backtest[(backtest["model"] == "own") & (backtest["rank"] <= 3)]
    of_list = backtest[(backtest["model"] == "published_again") & (backtest["mode"] == "repeat")]
    keys = ["user_idx", "rank", "item_idx"]
    assert len(of_own) > 40
    assert set(map(tuple, of_own[keys].values)) <= set(map(tuple, of_list[keys].values))


def test_gates_and_metrics_are_of_each_list(second_night: RunContext) -> None:
    gates = rows_of(second_night, "gates")
    assert gates["passed"].all()
    gates_of_main = set(gates.loc[gates["list"] == "main", "gate"])
    assert gates_of_main - set(gates.loc[gates["list"] == "again", "gate"]) == {"seen_items"}
    detail = gates.set_index(["list", "gate"])["detail"]
    assert detail["again", "backtest_ndcg"].startswith("published_again is")
    metrics = rows_of(second_night, "metrics")
    models = metrics.groupby("kind")["model"].unique().map(set)
    assert {"published", "published_again"} <= models["backtest"]
    # The night before had one list, and its rows did not say which.
    followup = metrics[(metrics["kind"] == "followup") & (metrics["model"] != "population")]
    assert set(zip(followup["model"], followup["mode"])) == {("published", "novel")}
    assert followup.loc[followup["metric"] == "coverage", "value"].max() > 0


def test_a_follow_up_has_each_list_of_that_night(opened: Open, second_night: RunContext) -> None:
    third = opened(LAST, *ONE_LIST)  # by now there is one list again
    third.stage = "evaluate"
    found = published_lists(third)
    assert found is not None
    models_of_modes, lists = found
    assert models_of_modes == {"novel": ["published"], "repeat": ["published_again"]}
    counts = lists.groupBy("model", "mode").count().collect()
    rows = rows_of(second_night, "recommendations")["list"].value_counts()
    assert {(r["model"], r["mode"]): r["count"] for r in counts} == {
        ("published", "novel"): rows["main"],
        ("published_again", "repeat"): rows["again"],
    }


def test_lists_are_shown_by_name(second_night: RunContext) -> None:
    tables = TableReader(second_night.catalog.root)
    lists = user_lists(tables, "u3", SECOND)
    assert {name: [row["rank"] for row in rows] for name, rows in lists.items()} == {
        "main": [1, 2, 3, 4],
        "again": [1, 2, 3],
    }
    assert [*user_lists(tables, "u3", FIRST)] == ["main"]
    assert user_lists(tables, "nobody", SECOND) == {}
    titles = [str(table.title) for table in user_panel(second_night, tables, "u3").renderables]
    assert titles[:2] == ["user u3: main", "user u3: again"]


def test_one_refused_list_keeps_all_lists_of_the_night_before(
    opened: Open, second_night: RunContext
) -> None:
    """Own items alone list nothing new: nobody has the list `again`."""
    before = second_night.catalog.version("recommendations")
    assert before == 2  # the first night, the older form, and both lists in one commit
    context = opened(
        SECOND, *ONE_LIST, "publish.lists={main: {}, again: {model: own, ladder: []}}", repin=True
    )
    with pytest.raises(GateRefusedError, match=r"list again, active_coverage: 0 of 40") as refused:
        night(context)
    assert "list main" not in str(refused.value)
    assert context.catalog.version("recommendations") == before
    gates = context.catalog.read("gates", context.catalog.version("gates"))
    of_run = gates.where((F.col("run_id") == context.run_id) & ~F.col("passed"))
    assert {(row["list"], row["gate"]) for row in of_run.collect()} >= {
        ("again", "active_coverage")
    }

"""With `publish.rescore_days`, who did not act keeps the lists of the night before."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import functions as F

from recspark.pipeline.activity import kept_lists
from recspark.pipeline.context import RunContext
from recspark.pipeline.run import night, open_night
from tests.e2e.test_nights_in_turn import settings_of

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]
DAYS = (date(2010, 12, 5), date(2010, 12, 6))
SETTINGS = (
    "source.archive=false",
    "publish.rescore_days=1",
    "ingest.max_late_days=7",
    "publish.lists={main: {}, again: {mode: repeat}}",
    "rules.family={kind: cap, by: name, at_most: 1}",
    "publish.rules=[family]",
)


def published(context: RunContext) -> pd.DataFrame:
    lists = context.catalog.read("recommendations", context.catalog.version("recommendations"))
    rows = lists.where(F.col("run_date") == F.lit(context.run_date)).drop("run_date")
    return rows.toPandas().sort_values(["user_id", "list", "rank"]).set_index("user_id")


def test_only_who_acted_or_changed_is_scored(
    spark: object, retail_slice: Path, tmp_path: Path
) -> None:
    rows = pd.read_parquet(retail_slice)
    first = rows[rows["InvoiceDate"] < "2010-12-06"]
    second = rows[rows["InvoiceDate"].str.startswith(str(DAYS[1]))]
    acted = set(second.loc[second["Quantity"] > 0, "Customer ID"].dropna())
    sold = first[first["Customer ID"].notna() & (first["Quantity"] > 0)]
    quiet = sold[~sold["Customer ID"].isin(acted)].iloc[[0]]
    late = quiet.assign(Invoice="599999", InvoiceDate="2010-12-02 10:00:00")
    others = sold.loc[sold["Customer ID"] != late["Customer ID"].iloc[0], "StockCode"]
    late["StockCode"] = others[others.str.fullmatch(r"\d{5}")].iloc[-1]
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    first.to_parquet(inbox / f"{DAYS[0]}.parquet")
    pd.concat([second, late]).to_parquet(inbox / f"{DAYS[1]}.parquet")
    settings = settings_of(tmp_path / "t", inbox / "{run_date}.parquet", *SETTINGS)

    context = open_night("test", DAYS[0], settings)
    night(context)
    before = published(context)
    assert not (before["source"] == "unchanged").any()  # there was no night before
    context = open_night("test", DAYS[1], settings)
    night(context)
    after = published(context)

    user = str(int(late["Customer ID"].iloc[0]))
    scored = {str(int(customer)) for customer in acted} | {user}
    assert set(after.index[after["source"] != "unchanged"]) == scored
    assert len(scored) > 3
    kept = after[after["source"] == "unchanged"].drop(columns="source")
    pd.testing.assert_frame_equal(
        kept, before.loc[before.index.isin(kept.index)].drop(columns="source")
    )
    assert kept.index.nunique() > 100
    assert kept["rules"].map(len).sum() > 0  # as the night before wrote them
    assert set(after.index) >= set(before.index)
    assert (after.groupby(["user_id", "list"]).size() == 10).all()
    assert (after.groupby("user_id").size() == 20).all()
    tonight = context.catalog.read("candidates", context.catalog.version("candidates")).where(
        (F.col("cutoff") == F.lit(context.cutoffs.tonight)) & (F.col("model") == "popular")
    )
    assert tonight.select("user_idx").distinct().count() == len(scored)

    # Another model or mode of one list: nobody's lists hold, though the inputs are the same.
    for changed, holds in (
        ("model_settings.ease.reg=77", False),
        ("rules.family.at_most=2", False),
        ("publish.min_coverage=0.5", True),
        ("publish.lists.again.mode=novel", False),
    ):
        again = open_night("test", DAYS[1], [*settings, changed], repin=True)
        again.stage = "publish"
        again.runlog = context.runlog
        assert (kept_lists(again) is not None) == holds

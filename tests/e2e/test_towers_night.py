"""User towers through the stages: two Horovod ranks, one table of timelines, vectors of another model."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest

from recspark.models.towers.tdssm import TdssmModel
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import backtest_model
from recspark.pipeline.plan import STAGES, find_stage
from recspark.pipeline.run import execute, open_night

pytestmark = [
    pytest.mark.spark,
    pytest.mark.torch,
    pytest.mark.horovod,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]
FIRST, NIGHT = datetime(2020, 3, 1), date(2020, 3, 6)
N_USERS, N_ITEMS = 40, 24
COLUMNS = {name: name for name in ("user_id", "item_id", "event_type", "event_at")}
ITEM_COLUMNS = {name: name for name in ("item_id", "item_name", "category")}
N_NEW_ITEMS = 2  # described, but nobody acts on them
SETTINGS = [
    "source.kind=mapping",
    f"source.columns={COLUMNS}",
    "models=[popular, item_knn, als, youtube_dnn, tdssm, mvdnn, odd_items]",
    "models.als={embedding_size: 6, iterations: 2, n_blocks: 2}",
    "models.youtube_dnn={embedding_size: 8, hidden_sizes: [16, 8], epochs: 2}",
    "models.tdssm={needs: [als], hidden_size: 8, epochs: 2}",
    "models.mvdnn={views: {even: [even], odd: []}, hidden_sizes: [8], n_buckets: 256, epochs: 2}",
    "models.odd_items={algorithm: mvdnn, needs: [mvdnn], list_view: odd}",
    "publish={model: popular, ladder: [], neighbours_model: item_knn}",
    "evaluate.horizon_days=1",
    "n_candidates=20",
    "train.ranks=2",
]


def shop() -> pd.DataFrame:
    """Each user acts on four items of one third of the catalogue on each of six days."""
    rng = np.random.default_rng(1)
    events = [
        (f"u{user}", f"i{item}", "click", FIRST + timedelta(days=day, minutes=int(minute)))
        for user in range(N_USERS)
        for day in range(6)
        for item, minute in zip(
            user % 3 + 3 * rng.integers(0, N_ITEMS // 3, 4), rng.integers(400, 900, 4), strict=True
        )
    ]
    return pd.DataFrame(events, columns=[*COLUMNS])


def catalogue() -> pd.DataFrame:
    """Items are even or odd; the last two have no events."""
    numbers = range(N_ITEMS + N_NEW_ITEMS)
    items = [(f"i{n}", f"thing number {n}", "odd" if n % 2 else "even") for n in numbers]
    return pd.DataFrame(items, columns=[*ITEM_COLUMNS])


def test_towers_in_a_night(spark: object, tmp_path: Any) -> None:
    shop().to_parquet(tmp_path / "events.parquet", coerce_timestamps="us")
    catalogue().to_parquet(tmp_path / "items.parquet")
    where = [
        f"paths.root={tmp_path}",
        f"source.path={tmp_path / 'events.parquet'}",
        f"source.items_path={tmp_path / 'items.parquet'}",
        f"source.items_columns={ITEM_COLUMNS}",
    ]
    context = open_night("test", NIGHT, [*where, *SETTINGS])
    for stage in STAGES[:3]:
        execute(context, stage)
    for name in ("als", "youtube_dnn", "tdssm", "mvdnn", "odd_items"):
        execute(context, find_stage("train"), name)
    for name in ("youtube_dnn", "tdssm", "mvdnn", "odd_items"):
        execute(context, find_stage("recommend"), name)
    timelines = rows(context, "training_timelines")
    assert len(timelines.select("cutoff").distinct().collect()) == 2  # backtest and published
    assert timelines.where("length < 2").isEmpty()
    candidates = rows(context, "candidates").groupBy("model", "mode").count().collect()
    found = {(row["model"], row["mode"]) for row in candidates}
    names = ("youtube_dnn", "tdssm", "mvdnn", "odd_items")
    assert {(name, mode) for name in names for mode in ("novel", "repeat")} <= found
    model = backtest_model(context, "tdssm")
    assert isinstance(model, TdssmModel)
    assert model.arrays()["items_in"].shape == (len(model.items), 6)  # the factors of als
    # Each of the two lists has the items of its view, with the one that nobody acted on.
    ids = rows(context, "item_ids").select("item_idx", "item_id")
    listed = rows(context, "candidates").join(ids, on="item_idx", how="inner")
    for name, parity in (("mvdnn", 0), ("odd_items", 1)):
        of_view = {row["item_id"] for row in listed.where(f"model = '{name}'").collect()}
        assert of_view == {f"i{n}" for n in range(N_ITEMS + N_NEW_ITEMS) if n % 2 == parity}


def rows(context: RunContext, table: str) -> Any:
    return context.catalog.read(table, context.catalog.version(table))

"""Examples hold nothing of what came after their cutoff, but for their labels; and the labels end
before the cutoff that is scored.

The raw landing is changed from a day on, and the nights are run again from the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from recspark.data import interactions
from recspark.data.examples import feature_names
from recspark.errors import LeakError
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import EXAMPLE_CUTOFFS, SLICES, load_model
from recspark.pipeline.plan import STAGES
from recspark.pipeline.run import execute, open_night
from recspark.pipeline.stages import examples as stage
from tests.conftest import NIGHT, small_settings

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]
RETRIEVERS = ("popular", "own_items", "user_knn", "item_knn", "ease", "als")
SETTINGS = (
    f"models=[{', '.join(RETRIEVERS)}, lambdamart]",
    f"models.lambdamart={{needs: [{', '.join(RETRIEVERS)}], n_trees: 5}}",
    "publish={model: lambdamart, ladder: [popular], neighbours_model: ease}",
    "examples={n_cutoffs: 1, n_negatives: 10000, vectors: [als]}",  # all candidates are examples
    "evaluate.horizon_days=14",
    "ingest.max_late_days=60",  # the night after the first one is a month later
)
CUTOFF = datetime(2010, 11, 11, tzinfo=UTC)  # of the older examples of the night
BACKTEST = datetime(2010, 11, 26, tzinfo=UTC)


@dataclass(frozen=True)
class Shop:
    """The night, and its examples of `CUTOFF`: (mode, user_id, item_id) -> what is known of it."""

    night: RunContext
    described: dict[tuple[str, str, str], Any]  # sources, numbers and fields, to the bit
    labels: dict[tuple[str, str, str], float]
    slice_: dict[str, Any]  # what `runs` says of the slice


def scrambled(rows: pd.DataFrame, begin: datetime) -> pd.DataFrame:
    """From `begin` on, items, texts, prices, quantities and users are others; a part of the items
    and users is new. The times and the invoices stay.
    """
    rng = np.random.default_rng(5)
    is_later = (pd.to_datetime(rows["InvoiceDate"]) >= begin.replace(tzinfo=None)).to_numpy()
    n_later, later = is_later.sum(), rows[is_later].copy()
    for column in ("StockCode", "Description", "Quantity", "Price", "Customer ID"):
        later[column] = later[column].to_numpy()[rng.permutation(n_later)]
    is_new = rng.random(n_later) < 0.1
    later.loc[is_new, "StockCode"] = [f"9{n % 50:04d}Z" for n in range(is_new.sum())]
    is_new = (rng.random(n_later) < 0.1) & later["Customer ID"].notna().to_numpy()
    later.loc[is_new, "Customer ID"] = [90_000.0 + n % 20 for n in range(is_new.sum())]
    later["Description"] = later["Description"] + " OF TOMORROW"
    later["Price"] = (later["Price"] * rng.uniform(0.5, 2, n_later)).round(2)
    return pd.concat([rows[~is_later], later]).sort_index()


def run(context: RunContext, *stages: str) -> None:
    for each in STAGES:
        if each.name in stages:
            for model in each.models(context.config):
                execute(context, each, model)


def shop(folder: Path, rows: pd.DataFrame) -> Shop:
    """The shop of these raw rows: the night before `CUTOFF` takes them in, then the night `NIGHT`.

    So the users and items from before the cutoff have their integers, as they have in a shop that
    runs every night, before any later row is read.
    """
    landing = folder / "retail.parquet"
    rows.to_parquet(landing)
    settings = [*small_settings(folder / "root", landing), *SETTINGS]
    run(open_night("test", date(2010, 11, 10), settings), "ingest")
    night = open_night("test", date.fromisoformat(NIGHT), settings)
    run(night, "ingest", "sessionize", "build_features")
    for model in RETRIEVERS:
        execute(night, next(s for s in STAGES if s.name == "train"), model)
    for name in ("examples", "train"):
        execute(night, next(s for s in STAGES if s.name == name), "lambdamart")
    row = night.runlog.find("examples", "lambdamart")
    assert row is not None
    assert row.detail[EXAMPLE_CUTOFFS][0] == CUTOFF.isoformat()
    table = night.catalog.read("examples", row.outputs["examples"])
    names = {
        name: night.catalog.read(f"{name}_ids", night.catalog.version(f"{name}_ids"))
        for name in ("user", "item")
    }
    of_cutoff = table.where(F.col("cutoff") == F.lit(CUTOFF))
    found = of_cutoff.join(names["user"], on="user_idx").join(names["item"], on="item_idx")
    described, labels = {}, {}
    for r in found.collect():
        key = r["mode"], r["user_id"], r["item_id"]
        numbers = np.array(r["numbers"], np.float32).tobytes()
        described[key] = (r["sources"], numbers, r["fields"])
        labels[key] = r["label"]
    return Shop(night, described, labels, row.detail[SLICES][CUTOFF.isoformat()])


@pytest.fixture(scope="module")
def raw_rows(retail_slice: Path) -> pd.DataFrame:
    return pd.read_parquet(retail_slice)


@pytest.fixture(scope="module")
def true_shop(
    spark: SparkSession, raw_rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory
) -> Shop:
    return shop(tmp_path_factory.mktemp("true"), raw_rows)


def test_examples_know_nothing_of_the_days_after_their_cutoff(
    true_shop: Shop, raw_rows: pd.DataFrame, tmp_path: Path
) -> None:
    """Only the labels differ, and who is among the users: those who came back."""
    other = shop(tmp_path, scrambled(raw_rows, CUTOFF))
    users = {user for _, user, _ in true_shop.described} & {user for _, user, _ in other.described}
    assert len(users) > 15
    of_users = [
        {key: known for key, known in each.described.items() if key[1] in users}
        for each in (true_shop, other)
    ]
    assert {*of_users[0]} == {*of_users[1]}
    assert len(of_users[0]) > 50 * len(users)
    assert of_users[0] == of_users[1]
    assert true_shop.slice_["encoding"] == other.slice_["encoding"]
    labels = [{key: each.labels[key] for key in of_users[0]} for each in (true_shop, other)]
    assert labels[0] != labels[1]
    assert min(sum(label > 0 for label in each.values()) for each in labels) > 10


@pytest.mark.slow  # test_three_kinds.py asks the same of the cutoffs alone
def test_labels_end_before_the_cutoff_that_is_scored(
    true_shop: Shop, raw_rows: pd.DataFrame, tmp_path: Path
) -> None:
    """Whatever comes from the backtest's cutoff on, its ranker learns the same, to the last bit."""
    other = shop(tmp_path, scrambled(raw_rows, BACKTEST))
    assert true_shop.night.cutoffs.backtest == BACKTEST
    assert true_shop.described == other.described
    assert true_shop.labels == other.labels
    trees = [
        load_model(each.night, "lambdamart", BACKTEST).arrays()["trees"].tobytes()
        for each in (true_shop, other)
    ]
    assert trees[0] == trees[1]


def leaking(histories: DataFrame, cutoff: datetime, **options: Any) -> DataFrame:
    """`before` with a fault: the history goes on to the end of the horizon; `seen` is honest."""
    later = interactions.before(histories, cutoff + timedelta(days=14), **options)
    honest = interactions.before(histories, cutoff, **options)
    return later.drop("seen").join(honest.select("user_idx", "seen"), on="user_idx")


def test_a_feature_that_saw_the_horizon_is_refused_before_the_commit(
    true_shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In mode novel, an item that is not seen and has an order was bought after the cutoff."""
    night = replace(true_shop.night, force=True)
    config = night.config
    novel = config.examples.model_copy(update={"modes": ("novel",)})
    night = replace(night, config=config.model_copy(update={"examples": novel}))
    night.stage, night.model = "examples", "lambdamart"
    before = night.catalog.version("examples")
    monkeypatch.setattr(stage, "before", leaking)
    with pytest.raises(LeakError, match=r"examples: .*pair_n_orders.* alone tells"):
        stage.examples(night, "lambdamart")
    assert night.catalog.version("examples") == before

    # Whoever says that these features are honest is believed.
    names = feature_names(RETRIEVERS, config.examples.features, config.examples.vectors)
    honest = novel.model_copy(update={"honest_features": names})
    night = replace(night, config=config.model_copy(update={"examples": honest}))
    night.stage, night.model = "examples", "lambdamart"
    result = stage.examples(night, "lambdamart")
    assert result.outputs["examples"] == (before or 0) + 1  # all cutoffs in one commit
    assert result.rows_out > 100

"""Reasons of a small night's lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import functions as F
from typer.testing import CliRunner

from recspark.cli import app
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import load_retriever
from recspark.pipeline.ranker_parts import score_parts
from tests.conftest import NIGHT, run_night

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]


def table(night: RunContext, name: str) -> pd.DataFrame:
    return night.catalog.read(name, night.catalog.version(name)).toPandas()


def test_published_rows_have_the_reasons_of_their_model(small_night: RunContext) -> None:
    """Weights and matrix written down again, from events and the artifact: `ease`, binary weights."""
    lists, events = table(small_night, "recommendations"), table(small_night, "events")
    assert lists.loc[lists["model"] == "popular", "because"].isna().all()
    rows = lists[lists["model"] == "ease"]
    assert rows["because"].notna().mean() > 0.95
    model = load_retriever(small_night, "ease", small_night.cutoffs.tonight)
    ids = table(small_night, "item_ids").set_index("item_id")["item_idx"]
    settings, cutoff = model.settings, pd.Timestamp(small_night.cutoffs.tonight).tz_localize(None)
    events = events[events["item_id"].isin(ids.index) & events["user_id"].notna()]
    sample = rows.sample(60, random_state=1)
    matrix = np.asarray(model.arrays()["matrix"], np.float64)
    for row in sample.itertuples():
        own = events[events["user_id"] == row.user_id]
        age = (cutoff - pd.to_datetime(own["event_at"]).dt.tz_localize(None)) / pd.Timedelta(days=1)
        assert settings.weighting == "last"  # type: ignore[attr-defined]
        half_life = settings.half_life_days  # type: ignore[attr-defined]
        weight = 0.5 ** (age / half_life) if half_life else age * 0 + 1.0
        heaviest = weight.groupby(own["item_id"]).max()
        local = {
            i: int(np.searchsorted(model.items, ids[i])) for i in (*heaviest.index, row.item_id)
        }
        adds = {i: heaviest[i] * matrix[local[i], local[row.item_id]] for i in heaviest.index}
        assert sum(adds.values()) == pytest.approx(row.score, rel=1e-4)
        best = sorted(adds, key=lambda i: -adds[i])[:3]
        assert [r["item_id"] for r in row.because] == [i for i in best if adds[i] > 0]
        total = sum(abs(value) for value in adds.values())
        expected = [adds[i] / total for i in best if adds[i] > 0]
        assert [r["share"] for r in row.because] == pytest.approx(expected, rel=1e-3)
        assert all(r["item_name"] for r in row.because)


def test_a_night_without_reasons(small_night: RunContext) -> None:
    """With `publish.because: 0` the column is null, and no model is loaded."""
    from dataclasses import replace

    from recspark.pipeline.reasons import with_because

    config = small_night.config.model_copy(
        update={"publish": small_night.config.publish.model_copy(update={"because": 0})}
    )
    lists = small_night.spark.range(1).select(
        F.col("id").alias("user_idx"), F.lit(1).alias("item_idx"), F.lit("ease").alias("model")
    )
    rows = with_because(replace(small_night, config=config), lists, lists, ("ease",)).collect()
    assert [row["because"] for row in rows] == [None]


def plain_stop(night: RunContext, tables: dict[str, pd.DataFrame], user: str, item: str) -> str:
    """What kept an item out, from the tables by pandas alone: `listed`, or one of the stops."""
    lists = tables["recommendations"]
    if ((lists["user_id"] == user) & (lists["item_id"] == item)).any():
        return "listed"
    events = tables["events"].assign(
        at=lambda frame: pd.to_datetime(frame["event_at"]).dt.tz_localize(None)
    )
    cutoff = pd.Timestamp(night.cutoffs.tonight).tz_localize(None)
    events = events[events["at"] < cutoff]
    if item not in set(events["item_id"]):
        return "not_in_vocabulary"
    if item in set(events.loc[events["user_id"] == user, "item_id"]):
        return "seen"
    candidates = tables["candidates"]
    candidates = candidates[
        (candidates["cutoff"] == cutoff) & candidates["model"].isin(["ease", "popular"])
    ]
    user_idx = tables["user_ids"].set_index("user_id")["user_idx"][user]
    item_idx = tables["item_ids"].set_index("item_id")["item_idx"][item]
    of_item = (candidates["user_idx"] == user_idx) & (candidates["item_idx"] == item_idx)
    return "outranked" if of_item.any() else "no_candidate"


def test_twenty_listed_and_twenty_unlisted_items(small_night: RunContext) -> None:
    """`recspark explain --json` against a plain look into the tables."""
    names = ("recommendations", "events", "candidates", "user_ids", "item_ids")
    tables = {name: table(small_night, name) for name in names}
    lists = tables["recommendations"]
    listed = lists.sample(20, random_state=3)
    rng = np.random.default_rng(4)
    users = rng.choice(lists["user_id"].unique(), 20)
    acted = tables["events"].dropna(subset=["user_id"])
    unlisted = []
    for n, user in enumerate(users):
        own = acted.loc[acted["user_id"] == user, "item_id"].to_numpy()
        others = tables["item_ids"]["item_id"].to_numpy()
        user_idx = tables["user_ids"].set_index("user_id")["user_idx"][user]
        rows = tables["candidates"]
        proposed = rows.loc[(rows["user_idx"] == user_idx) & (rows["rank"] > 12), "item_idx"]
        by_idx = tables["item_ids"].set_index("item_idx")["item_id"]
        choices = (own, others, by_idx[proposed].to_numpy())[n % 3]
        unlisted.append((user, rng.choice(choices if len(choices) else others)))
    place = ["--env", "test", "--set", f"paths.root={Path(small_night.catalog.root).parent}"]

    def explained(user: str, item: str) -> dict[str, Any]:
        result = CliRunner().invoke(app, ["explain", "--json", *place, "--", user, item])
        assert result.exit_code == 0, result.output
        return dict(json.loads(result.stdout.splitlines()[-1]))

    for row in listed.itertuples():
        about = explained(row.user_id, row.item_id)
        assert about["listed"]
        assert (about["rank"], about["model"], about["source"]) == (row.rank, row.model, row.source)
        assert about["score"] == pytest.approx(row.score)
        assert about["item_name"] == row.item_name
        shares = {r["item_id"]: r["share"] for r in about["because"] or []}
        assert shares == pytest.approx({r["item_id"]: r["share"] for r in _list(row.because)})
        assert row.model in {candidate["model"] for candidate in about["candidates"]}
    stops = [explained(user, item) for user, item in unlisted]
    expected = [plain_stop(small_night, tables, user, item) for user, item in unlisted]
    found = ["listed" if about["listed"] else about["stopped_by"] for about in stops]
    assert found == expected
    assert {"seen", "outranked", "no_candidate"} <= set(found)
    # The words for a person, of the same answers.
    for user, item, words in (
        (listed["user_id"].iloc[0], listed["item_id"].iloc[0], "listed: rank"),
        (*unlisted[0], "not listed: the user acted on the item before"),
    ):
        text = CliRunner().invoke(app, ["explain", *place, "--", user, item]).stdout
        assert words in text


def _list(cell: Any) -> Any:
    return [] if cell is None else cell


RANKED = (
    "models=[popular, ease, item_knn, lambdamart]",
    "models.lambdamart={needs: [popular, ease, item_knn], n_trees: 20}",
    "publish={model: lambdamart, ladder: [popular], neighbours_model: item_knn}",
    "examples.n_cutoffs=1",
    "evaluate.n_bootstrap=20",
)


@pytest.mark.slow
def test_a_ranker_says_which_features_moved_the_score(
    spark: object,
    retail_slice: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A night of `lambdamart`: reasons by its sources, and the features of listed and other items."""
    night = run_night(tmp_path, retail_slice, NIGHT, *RANKED)
    assert isinstance(night, RunContext)
    lists = table(night, "recommendations")
    rows = lists[lists["model"] == "lambdamart"]
    assert len(rows) > 1000
    assert rows["because"].notna().mean() > 0.9
    events = table(night, "events")
    own = set(zip(events["user_id"], events["item_id"], strict=True))
    pairs = [(row.user_id, r["item_id"]) for row in rows.itertuples() for r in _list(row.because)]
    assert own >= set(pairs)
    # The ranker has lists of 20, of which ten are published.
    candidates = table(night, "candidates").merge(table(night, "user_ids"), on="user_idx")
    candidates = candidates.merge(table(night, "item_ids"), on="item_idx")
    of_ranker = candidates[
        (candidates["model"] == "lambdamart")
        & (candidates["mode"] == "novel")
        & (candidates["cutoff"] == candidates["cutoff"].max())
    ]
    n_events = table(night, "item_features").merge(table(night, "item_ids"), on="item_idx")
    n_events = n_events[n_events["cutoff"] == n_events["cutoff"].max()]
    n_events = n_events.set_index("item_id")["n_events"]
    for rank in (1, 10, 11):
        row = of_ranker[of_ranker["rank"] == rank].iloc[5]
        parts = score_parts(night, "lambdamart", row["user_id"], row["item_id"])
        assert parts is not None
        assert parts.score == row["score"]  # computed again, to the bit
        adds = [part.adds for part in parts.parts]
        assert parts.rest + sum(adds) == pytest.approx(parts.score, abs=1e-5)
        assert [abs(a) for a in adds] == sorted((abs(a) for a in adds), reverse=True)
        value = {part.feature: part.value for part in parts.parts}
        assert value["item_n_events"] == n_events[row["item_id"]]
    monkeypatch.setattr(type(night.spark), "stop", lambda self: None)
    place = ["--env", "test", "--set", f"paths.root={tmp_path}"]
    command = ["explain", "--json", *place, "--", row["user_id"], row["item_id"]]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    about = json.loads(result.stdout.splitlines()[-1])
    assert (about["stopped_by"], about["ranker"]) == ("outranked", "lambdamart")
    assert about["ranker_score"]["score"] == row["score"]
    shown = [(part["feature"], part["adds"]) for part in about["ranker_score"]["features"]]
    assert shown == [(part.feature, part.adds) for part in parts.parts[:3]]

"""A night with the rankers that read only ranks and scores: two that learn nothing, one that does."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import SparkSession

from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import cutoffs_of, load_model
from recspark.pipeline.pairs import pairs_with_features
from recspark.pipeline.plan import plan
from tests.conftest import NIGHT, run_night

# A whole night; the plan, the stages and each ranker have quick tests of their own.
pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]

RANKERS = {"rrf": ("popular", "ease"), "fixed": ("popular", "ease"), "blend": ("ease",)}
SETTINGS = (
    "models=[popular, ease, rrf, fixed, blend]",
    "models.rrf.needs=[popular, ease]",
    "models.fixed={algorithm: switch, learns: false, needs: [popular, ease]}",
    "models.fixed.choices={light: [popular], regular: [ease], heavy: [ease]}",
    "models.blend.needs=[ease]",
    "publish={model: rrf, ladder: [popular], neighbours_model: ease}",
    "evaluate.n_bootstrap=0",
    "examples.n_cutoffs=1",
)


@pytest.fixture(scope="module")
def night(
    spark: SparkSession, retail_slice: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunContext:
    context = run_night(tmp_path_factory.mktemp("blends"), retail_slice, NIGHT, *SETTINGS)
    assert isinstance(context, RunContext)
    return context


@pytest.fixture(scope="module")
def lists(night: RunContext) -> pd.DataFrame:
    return night.catalog.read("candidates", night.catalog.version("candidates")).toPandas()


KEY = ["cutoff", "mode", "user_idx", "item_idx"]


@pytest.mark.parametrize("ranker", RANKERS)
def test_a_ranker_lists_only_what_its_retrievers_list(lists: pd.DataFrame, ranker: str) -> None:
    """Beside other rankers, too, of which one has another retriever."""
    listed = lists[lists["model"] == ranker]
    candidates = lists[lists["model"].isin(RANKERS[ranker])][KEY].drop_duplicates()
    assert set(listed["mode"]) == {"novel", "repeat"}
    assert len(listed.merge(candidates, on=KEY)) == len(listed)
    # As many of them as a list takes: none is lost.
    n_candidates = candidates.groupby(KEY[:3]).size().clip(upper=20)
    n_listed = listed.groupby(KEY[:3]).size()
    assert n_listed.to_dict() == {key: n_candidates[key] for key in n_listed.index}
    of_backtest = candidates["cutoff"] == candidates["cutoff"].min()
    assert len(listed[listed["cutoff"] == listed["cutoff"].min()].groupby(KEY[:3])) == len(
        candidates[of_backtest].groupby(KEY[:3])
    )


def test_rrf_ranks_as_computed_from_the_lists_by_hand(lists: pd.DataFrame) -> None:
    of_sources = lists[lists["model"].isin(RANKERS["rrf"])]
    terms = (1 / (10 + of_sources["rank"])).groupby([of_sources[name] for name in KEY]).sum()
    listed = lists[lists["model"] == "rrf"].set_index(KEY)
    expected = terms.loc[listed.index]
    assert listed["score"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-6)


def test_a_switch_gives_each_segment_the_list_that_is_chosen_for_it(
    night: RunContext, lists: pd.DataFrame
) -> None:
    features = night.catalog.read("user_features", night.version("user_features")).toPandas()
    activity = features.set_index(["cutoff", "user_idx"])["activity"]
    chosen = {"light": "popular", "regular": "ease", "heavy": "ease"}
    tops = lists[lists["rank"] <= 10].set_index(["model", *KEY[:3]]).sort_values("rank")
    items = tops.groupby(level=[0, 1, 2, 3])["item_idx"].agg(list).to_dict()
    seen = set()
    for (model, cutoff, mode, user), of_list in items.items():
        if model != "fixed":
            continue
        segment = activity.get((cutoff, user), "light")
        source = items.get((chosen[segment], cutoff, mode, user), [])
        assert of_list[: len(source)] == source, (segment, mode, user)
        seen.add(segment)
    assert {"light", "regular"} <= seen


def test_only_what_a_ranker_reads_is_computed(night: RunContext, lists: pd.DataFrame) -> None:
    """Nothing runs: the frames alone say what would be computed."""
    cutoff = night.cutoffs.backtest
    stored = night.catalog.read("candidates", night.catalog.version("candidates"))
    users = night.read("histories")

    def columns(ranker: str) -> set[str]:
        encoding = load_model(night, ranker, cutoff).encoding  # type: ignore[attr-defined]
        read = (*encoding.numbers, *encoding.fields)
        return {*pairs_with_features(night, ranker, cutoff, stored, users, read).columns}

    pair = {"mode", "user_idx", "item_idx", "sources", "n_sources"}
    assert columns("rrf") == {*pair, "popular_rank", "ease_rank"}
    assert columns("blend") == {*pair, "ease_rank", "ease_score", "ease_relative"}
    of_switch = columns("fixed")
    assert {*pair, "popular_rank", "ease_rank", "user_activity"} <= of_switch
    assert not {name for name in of_switch if name.startswith(("ease_score", "item_p", "pair_"))}


def test_only_the_ranker_that_learns_has_examples(night: RunContext) -> None:
    """So only its retriever is fitted at the cutoffs of the examples."""
    rows = night.runlog.rows()
    done = [f"{stage}.{model}" if model else stage for stage, model in rows if stage != "begin"]
    assert sorted(done) == sorted(task.name for task in plan(night.config))
    assert {model for stage, model in rows if stage == "examples"} == {"blend"}
    two = (night.cutoffs.backtest, night.cutoffs.tonight)
    assert cutoffs_of(night, "popular") == cutoffs_of(night, "rrf") == two
    assert cutoffs_of(night, "ease") == night.cutoffs.all
    assert len(night.cutoffs.all) > 2
    popular, ease = rows["train", "popular"], rows["train", "ease"]
    assert (popular.rows_out, ease.rows_out) == (2, len(night.cutoffs.all))


def test_all_of_them_are_in_the_evaluation(night: RunContext) -> None:
    metrics = night.catalog.read("metrics", night.catalog.version("metrics")).toPandas()
    ndcg = metrics.query(
        "metric == 'ndcg' and k == 10 and segment == 'warm' and kind == 'backtest'"
    )
    assert {*RANKERS, "popular", "ease", "published"} <= set(ndcg["model"])
    value = {(row.model, row.mode): row.value for row in ndcg.itertuples()}
    assert value["published", "novel"] == value["rrf", "novel"]
    published = night.catalog.read(
        "recommendations", night.catalog.version("recommendations")
    ).toPandas()
    assert (published["model"] == "rrf").mean() > 0.9

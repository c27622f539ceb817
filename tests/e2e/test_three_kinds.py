"""A night with a ranker on three retrievers, one of them built on an encoder: the models of
docs/add_a_model.md, as classes of another package.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark.data.feature_encoding import Encoding
from recspark.errors import ConfigError, ModelsFailedError
from recspark.models.base import FittedModel
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import ENCODING, EXAMPLE_CUTOFFS, load_model
from recspark.pipeline.plan import plan
from recspark.pipeline.run import open_night
from recspark.pipeline.stages import examples
from recspark.pipeline.stages.examples import MadeSlice
from tests.conftest import NIGHT, run_night, small_settings
from tests.contract.documented import documented

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]

RETRIEVERS = ("ease", "near", "segments")
SETTINGS = (
    "models=[popular, ease, words, near, segments, linear]",
    "models.words={algorithm: 'words_of_kinds0:Words', kind: encoder}",
    "models.near={algorithm: 'near_of_kinds0:Near', needs: [words]}",
    "models.segments={algorithm: 'segments_of_kinds0:Segments'}",
    "models.linear={algorithm: 'linear_of_kinds0:Linear', kind: ranker, needs: [ease, near, segments]}",
    "publish={model: linear, ladder: [popular], neighbours_model: ease}",
    "evaluate.n_bootstrap=20",
)


@pytest.fixture(scope="module")
def shop(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The four models of the page, each a module on the paths of driver and executors."""
    folder = tmp_path_factory.mktemp("kinds")
    for name in ("words", "near", "segments", "linear"):
        assert documented(spark, folder, name).startswith(f"{name}_of_kinds")


@pytest.fixture(scope="module")
def night(shop: None, retail_slice: Path, tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    context = run_night(tmp_path_factory.mktemp("night"), retail_slice, NIGHT, *SETTINGS)
    assert isinstance(context, RunContext)
    return context


def table(night: RunContext, name: str) -> pd.DataFrame:
    return night.catalog.read(name, night.catalog.version(name)).toPandas()


def test_every_task_of_the_plan_has_its_row(night: RunContext) -> None:
    rows = night.runlog.rows()
    done = [f"{stage}.{model}" if model else stage for stage, model in rows if stage != "begin"]
    assert sorted(done) == sorted(task.name for task in plan(night.config))
    assert {row.status for row in rows.values()} == {"ok"}


def test_the_ranker_is_published(night: RunContext) -> None:
    published = table(night, "recommendations")
    assert (published["model"] == "linear").mean() > 0.9
    assert published.groupby("user_id").size().eq(10).all()
    ndcg = table(night, "metrics").query("metric == 'ndcg' and k == 10 and segment == 'warm'")
    value = {(row.model, row.mode): row.value for row in ndcg.itertuples()}
    assert {model for model, _ in value} == {*night.config.models, "published"} - {"words"}
    # Where retrievers see all of a user's history and a ranker what they say, it is no worse.
    assert value["linear", "repeat"] > value["popular", "repeat"]


def test_a_ranker_lists_among_its_retrievers_lists_only(night: RunContext) -> None:
    lists = table(night, "candidates")
    key = ["cutoff", "mode", "user_idx", "item_idx"]
    of = lists[lists["model"].isin(RETRIEVERS)][key].drop_duplicates()
    mine = lists[lists["model"] == "linear"]
    assert len(mine) > 0
    assert len(mine.merge(of, on=key)) == len(mine)
    ordered = mine.sort_values(["cutoff", "mode", "user_idx", "rank"])
    in_list = ordered.groupby(["cutoff", "mode", "user_idx"])
    assert (in_list["score"].diff().fillna(0) <= 0).all()
    assert (in_list.cumcount() + 1 == ordered["rank"]).all()


def events_of(night: RunContext) -> pd.DataFrame:
    """Acts with their integers, read by the test itself."""
    events = table(night, "events")
    for name in ("user", "item"):
        events = events.merge(table(night, f"{name}_ids")[[f"{name}_id", f"{name}_idx"]])
    return events.assign(event_at=pd.to_datetime(events["event_at"]).dt.tz_localize(None))


def test_examples_are_labelled_by_what_came_after_and_described_by_what_came_before(
    night: RunContext,
) -> None:
    """Counted from the events by the test: labels lie in the horizon, features before the cutoff."""
    row = night.runlog.find("examples", "linear")
    assert row is not None
    cutoffs = [datetime.fromisoformat(day) for day in row.detail[EXAMPLE_CUTOFFS]]
    assert cutoffs == [datetime(2010, 11, day, tzinfo=UTC) for day in (4,)] or len(cutoffs) > 1
    assert all(cutoff.weekday() == 3 for cutoff in cutoffs)  # Thursdays
    encoding = Encoding.of_text(row.detail[ENCODING])
    events, rows = events_of(night), table(night, "examples")
    assert set(rows["model"]) == {"linear"}
    assert set(rows["mode"]) == {"novel", "repeat"}
    horizon = timedelta(days=night.config.evaluate.horizon_days)
    for cutoff in cutoffs:
        mine = rows[rows["cutoff"] == pd.Timestamp(cutoff).tz_localize(None)]
        begin = pd.Timestamp(cutoff).tz_localize(None)
        earlier = events[events["event_at"] < begin]
        later = events[(events["event_at"] >= begin) & (events["event_at"] < begin + horizon)]
        acted = set(zip(later["user_idx"], later["item_idx"], strict=True))
        pairs = list(zip(mine["user_idx"], mine["item_idx"], strict=True))
        assert [pair in acted for pair in pairs] == (mine["label"] > 0).tolist()
        assert 0 < (mine["label"] > 0).sum() < len(mine)
        n_events = earlier.groupby("item_idx").size()
        at = encoding.numbers.index("item_n_events")
        assert [n[at] for n in mine["numbers"]] == [n_events[i] for i in mine["item_idx"]]
        of_user = earlier.groupby("user_idx").size()
        at = encoding.numbers.index("user_n_events")
        assert [n[at] for n in mine["numbers"]] == [of_user[u] for u in mine["user_idx"]]
        at = encoding.numbers.index("n_sources")
        assert [n[at] for n in mine["numbers"]] == mine["sources"].map(len).tolist()


def test_a_ranker_learns_from_horizons_that_have_ended(night: RunContext) -> None:
    for cutoff in (night.cutoffs.backtest, night.cutoffs.tonight):
        horizon = timedelta(days=night.config.evaluate.horizon_days)
        assert all(c + horizon <= cutoff for c in night.cutoffs.examples_before(cutoff))
        assert night.cutoffs.examples_before(cutoff)[-1] + horizon > cutoff - timedelta(days=7)


def test_a_retriever_lists_what_nobody_bought_yet(night: RunContext) -> None:
    """Its items come from the encoder, which reads the catalogue."""
    near = load_model(night, "near", night.cutoffs.tonight)
    words = table(night, "item_vectors")
    assert set(near.items.tolist()) <= set(words["item_idx"])  # type: ignore[attr-defined]
    ease = load_model(night, "ease", night.cutoffs.tonight)
    assert set(ease.items.tolist()) <= set(near.items.tolist())  # type: ignore[attr-defined]


@pytest.mark.slow
def test_again_and_the_night_after(
    night: RunContext, retail_slice: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run takes all as recorded; the next night encodes new content only, and takes models
    of the examples' cutoffs as they were fitted.
    """
    root = Path(night.catalog.root).parent
    versions = night.catalog.versions()
    run_night(root, retail_slice, NIGHT, *SETTINGS)
    again = {table: v for table, v in night.catalog.versions().items() if table != "runs"}
    assert again == {table: v for table, v in versions.items() if table != "runs"}

    fitted: list[tuple[str, datetime]] = []
    from recspark.pipeline import fitted as fitting

    real = fitting.artifacts.save

    def save(model: FittedModel, folder: str, *more: object) -> None:
        fitted.append((folder.split("/")[-3], model.cutoff))
        real(model, folder, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(fitting.artifacts, "save", save)
    files_before = {cutoff: files_of_slice(night, cutoff) for cutoff in night.cutoffs.examples}
    following = run_night(root, retail_slice, "2010-12-10", *SETTINGS)
    assert isinstance(following, RunContext)
    row = following.runlog.find("encode", "words")
    assert row is not None
    known = len(table(night, "item_vectors"))
    assert row.detail["encoded"] < known / 20
    kept = {*night.cutoffs.examples} & {*following.cutoffs.examples}
    assert kept
    assert not [(model, c) for model, c in fitted if c in kept]
    assert {model for model, c in fitted if c == following.cutoffs.tonight} == set(
        night.config.models
    )
    check_kept_examples(following, {c: files_before[c] for c in kept})


def files_of_slice(night: RunContext, cutoff: datetime) -> list[str]:
    examples = night.catalog.read("examples", night.catalog.version("examples"))
    return sorted(examples.where(F.col("cutoff") == F.lit(cutoff)).inputFiles())


def check_kept_examples(night: RunContext, files_before: dict[datetime, list[str]]) -> None:
    """Slices of an earlier night stay; not under another key, after a run that left no row, forced."""
    row = night.runlog.find("examples", "linear")
    assert row is not None
    slices = row.detail["slices"]
    assert sum(made["rows"] for made in slices.values()) == row.rows_out
    assert files_before

    def kept(
        context: RunContext, cutoff: datetime, key: str, model: str = "linear"
    ) -> MadeSlice | None:
        version = context.catalog.version("examples")
        return examples._kept_slice(context, model, cutoff, key, version)

    for cutoff, files in files_before.items():
        assert files == files_of_slice(night, cutoff)
        made = slices[cutoff.isoformat()]
        kept_slice = kept(night, cutoff, made["key"])
        assert kept_slice is not None
        assert (kept_slice.to_dict(), kept_slice.files) == (made, files)
        assert made["rows"] > 0
        assert kept(night, cutoff, "other") is None
        assert kept(night, cutoff, made["key"], "other") is None
        assert kept(replace(night, force=True), cutoff, made["key"]) is None
    first, *_ = files_before
    where = (F.col("cutoff") == F.lit(first)) & (F.col("label") > 0)
    some = night.catalog.read("examples", row.outputs["examples"]).where(where)
    night.catalog.replace_slice("examples", some, {"cutoff": first, "model": "linear"})
    assert kept(night, first, slices[first.isoformat()]["key"]) is None


def test_needs_that_do_not_suit_are_told_at_the_start(shop: None, retail_slice: Path) -> None:
    wanted = [*small_settings(Path("/nowhere"), retail_slice), *SETTINGS]
    day = datetime.fromisoformat(NIGHT).date()
    for setting, message in (
        ("models.near.needs=[ease]", r"Near needs one encoder; needs = \['ease'\]"),
        ("models.linear.needs=[words]", "Linear needs a retriever"),
        ("models.ease.needs=[popular]", "Ease is built on no other model"),
        ("models.words.kind=retriever", "words_of_kinds0:Words is of kind encoder; say so"),
        ("publish.model=words", "publish.model = 'words' is an encoder"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_night("test", day, [*wanted, setting])


@pytest.mark.slow
def test_a_ranker_fails_alone_with_the_model_that_it_is_built_on(
    shop: None, retail_slice: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing published needs them: the night is published, and says so."""
    from recspark.models.items.ease import Ease

    def fit(*_: object) -> None:
        raise RuntimeError("ease cannot be fitted")

    monkeypatch.setattr(Ease, "fit", fit)
    alone = [
        "models=[popular, ease, segments, linear]",
        "models.linear.needs=[ease, popular]",
        "publish={model: segments, ladder: [popular], neighbours_model: null}",
    ]
    with pytest.raises(
        ModelsFailedError, match=r"ease in stage train.*linear, which is built on ease"
    ):
        run_night(tmp_path, retail_slice, NIGHT, *SETTINGS, *alone)


def test_columns_of_features_are_never_of_later(night: RunContext) -> None:
    """The feature tables have a slice for each cutoff of the night, and no other."""
    for name in ("user_features", "item_features"):
        rows = night.catalog.read(name, night.version(name))
        found = {r[0] for r in rows.select(F.unix_seconds("cutoff")).distinct().collect()}
        assert found == {int(cutoff.timestamp()) for cutoff in night.cutoffs.all}

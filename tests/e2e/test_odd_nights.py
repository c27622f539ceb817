"""What befalls an installation: clocks, crashes, late landings, changed settings, torn files."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import functions as F

from recspark import storage
from recspark.errors import MissingLandingError, ModelsFailedError, SourceError
from recspark.eval import evaluate as scoring
from recspark.pipeline import reuse
from recspark.pipeline import run as running
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import BACKTEST_OF
from recspark.pipeline.maintain import forget
from recspark.pipeline.plan import STAGES
from recspark.pipeline.run import execute, night, open_night
from recspark.pipeline.stages.recommend import backtest_users
from recspark.report.night import evaluation_table
from recspark.tables.catalog import TableCatalog
from tests.conftest import ROOT

pytestmark = pytest.mark.spark
FIRST = date(2024, 5, 29)
N_DAYS = 3
LAST = FIRST + timedelta(days=N_DAYS - 1)
Open = Callable[..., RunContext]


def rows(n_days: int = N_DAYS) -> pd.DataFrame:
    """Forty users, three events a day: at midnight, noon and 15:30 UTC."""
    midnight = datetime(2024, 5, 29)
    made = [
        (
            f"u{user}",
            f"i{(user * 7 + day * 3 + n) % 11}",
            midnight + timedelta(days=day, hours=hour, minutes=minute),
        )
        for user in range(40)
        for day in range(n_days)
        for n, (hour, minute) in enumerate([(0, 0), (12, user), (15, 30)])
    ]
    return pd.DataFrame(made, columns=["user", "item", "at"])


def settings_of(folder: Path) -> list[str]:
    """Settings of the installation in `folder`, two cheap models and its shop beside it."""
    source = (
        f"source={{name: shop, kind: mapping, path: '{folder}/shop.parquet', "
        "columns: {user_id: user, item_id: item, event_at: at}, constants: {event_type: purchase}}"
    )
    return [
        source,
        f"paths.root={folder / 'root'}",
        "models=[popular, item_knn]",
        "publish.model=popular",
        "publish.ladder=[popular]",
        "evaluate.horizon_days=1",
        "features.history_buckets=8",
    ]


def opener(folder: Path, n_days: int = N_DAYS) -> Open:
    """Return a function that opens a night of the installation in `folder`."""
    rows(n_days).to_parquet(folder / "shop.parquet", coerce_timestamps="us")
    settings = settings_of(folder)

    def of(day: date, *more: str, **options: bool) -> RunContext:
        return open_night("test", day, [*settings, *more], **options)

    return of


@pytest.fixture
def opened(spark: object, tmp_path: Path) -> Open:
    """A function that opens a night of an empty installation."""
    return opener(tmp_path)


@pytest.fixture(scope="module")
def made(spark: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation whose last day went through the stages up to the features."""
    folder = tmp_path_factory.mktemp("made")
    run(opener(folder)(LAST), "ingest", "sessionize", "build_features")
    return folder / "root"


@pytest.fixture
def grown(made: Path, tmp_path: Path) -> Open:
    """A function that opens a night of a copy of it."""
    shutil.copytree(made, tmp_path / "root")
    return opener(tmp_path)


def run(context: RunContext, *stages: str) -> RunContext:
    for stage in STAGES:
        if stage.name in stages:
            execute(context, stage)
    return context


def count(context: RunContext, table: str) -> int:
    return context.catalog.count(table, context.catalog.version(table))


def n_in_sessions(context: RunContext) -> int:
    made = context.catalog.read("sessions", context.catalog.version("sessions"))
    return int(made.agg(F.sum("n_events")).collect()[0][0])


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


def test_a_driver_east_of_greenwich_loses_no_event(opened: Open, tokyo: None) -> None:
    """The first anchor is 15:30 UTC of a day, already the next one in Tokyo."""
    late = rows()[lambda r: r["at"] >= datetime(2024, 5, 31, 15)]
    place = Path(opened(LAST).config.source.path)
    late.to_parquet(place, coerce_timestamps="us")
    context = run(opened(LAST), "ingest", "sessionize")
    assert count(context, "events") == n_in_sessions(context) == 40


def test_a_night_that_failed_before_a_later_one_doubles_nothing(opened: Open) -> None:
    """The first night finds no landing, the next takes the whole archive, the first runs again."""
    place = Path(opened(FIRST).config.source.path)
    place.rename(place.with_suffix(".away"))
    with pytest.raises(MissingLandingError):
        run(opened(FIRST), "ingest")
    place.with_suffix(".away").rename(place)
    later = run(opened(FIRST + timedelta(days=1)), "ingest")
    n_events = count(later, "events")
    assert n_events == 40 * 6
    again = opened(FIRST)
    run(again, "ingest")
    assert count(later, "events") == n_events
    done = again.runlog.find("ingest")
    assert done is not None
    assert done.detail["repeats"] == {"already ingested": 40 * 3}


def test_what_a_growing_archive_brings_late_has_a_verdict(opened: Open) -> None:
    """After the first night: an event of a day before, one of long ago, one without a time; a night
    that was left out; and each of them once."""
    run(opened(FIRST), "ingest")
    place = Path(opened(FIRST).config.source.path)
    late = [("late", datetime(2024, 5, 29, 9)), ("ancient", datetime(2023, 5, 29)), ("never", None)]
    more = pd.DataFrame([(user, "i1", at) for user, at in late], columns=["user", "item", "at"])
    pd.concat([rows(), more]).to_parquet(place, coerce_timestamps="us")
    for _ in range(2):
        context = run(opened(LAST), "ingest")
        assert count(context, "events") == 40 * 9 + 1
        refused = context.catalog.read("quarantine", context.catalog.version("quarantine"))
        assert {row["reason"] for row in refused.collect()} == {"event too late", "no time"}
        assert refused.count() == 2
        after = run(opened(LAST + timedelta(days=1)), "ingest")
        done = after.runlog.find("ingest")
        assert done is not None
        assert (done.detail["clean"], done.detail["quarantined"]) == (0, {})
        assert done.detail["repeats"] == {"already ingested": 40 * 9 + 1, "already refused": 2}


def test_a_torn_catalogue_stops_the_night_before_any_write(
    spark: object, opened: Open, tmp_path: Path
) -> None:
    """Cut off at its end, so that no look at the head of the file tells."""
    rng = np.random.default_rng(1)
    lines = "".join(f"i{n},{name}\n" for n, name in enumerate(rng.integers(1 << 60, size=90_000)))
    whole = gzip.compress(f"item,name\n{lines}".encode())
    place = tmp_path / "items.csv.gz"
    catalogue = (
        f"source.items_path={place}",
        "source.items_format=csv",
        "source.items_columns={item_id: item, item_name: name}",
    )
    place.write_bytes(whole[:-1000])
    context = opened(FIRST, *catalogue)
    with pytest.raises(SourceError, match=r"items\.csv\.gz cannot be read to its end"):
        run(context, "ingest")
    assert set(context.catalog.versions()) == {"runs"}
    place.write_bytes(whole)
    again = run(opened(FIRST, *catalogue), "ingest")
    assert count(again, "items") == count(again, "item_ids") == 90_000
    assert count(again, "events") == 40 * 3


def test_a_crash_within_ingest_loses_no_user(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids of a night are refused; the night after runs before it is run again."""

    def crash(*_: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(TableCatalog, "insert_new", crash)
        with pytest.raises(RuntimeError, match="killed"):
            run(opened(FIRST), "ingest")
    nights = [opened(FIRST + timedelta(days=1)), opened(FIRST)]
    run(nights[0], "ingest", "sessionize", "build_features")
    context = nights[0]
    assert count(context, "histories") == 40
    in_histories = context.catalog.read("histories", context.catalog.version("histories"))
    assert in_histories.agg(F.sum(F.size("history"))).collect()[0][0] == count(context, "events")


def test_fewer_buckets_leave_every_user_once(grown: Open) -> None:
    again = grown(LAST, "features.history_buckets=3", repin=True)
    run(again, "ingest", "sessionize", "build_features")
    found = again.catalog.read("histories", again.catalog.version("histories"))
    assert found.count() == found.select("user_idx").distinct().count() == 40
    assert {r[0] for r in found.select("bucket").distinct().collect()} == {0, 1, 2}


def test_a_torn_slice_is_written_again(grown: Open) -> None:
    context = grown(LAST, force=True)
    want = count(context, "user_features")
    for file in (Path(context.catalog.root) / "user_features").rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-100])
        (file.parent / f".{file.name}.crc").unlink()
    run(context, "build_features")
    assert count(context, "user_features") == want > 0


def test_lists_are_made_for_the_users_that_are_evaluated(grown: Open) -> None:
    settings = grown(LAST).config.evaluate.model_copy(update={"max_eval_users": 10})
    context = grown(LAST)
    context = replace(context, config=context.config.model_copy(update={"evaluate": settings}))
    everyone = context.catalog.read("histories", context.catalog.version("histories"))
    asked = {row["user_idx"] for row in backtest_users(context, everyone).collect()}
    truths = scoring.truth(everyone, context.cutoffs.backtest, settings.horizon_days)
    scored = truths.where(scoring.in_sample(truths, settings))
    assert asked == {row["user_idx"] for row in scored.collect()}
    assert 0 < len(asked) < 25


def test_what_is_old_is_forgotten(grown: Open) -> None:
    """What was made two months ago leaves; events, histories and what is newer stay."""
    old = grown(LAST)
    root = Path(old.catalog.root).parent
    for name in (
        "artifacts/popular/2024-05-29/key",
        "checkpoints/2024-05-29/run",
        "artifacts/mine/kept",
    ):
        storage.write_bytes(str(root / name / "file"), b"")
    before = {table: count(old, table) for table in old.catalog.versions()}
    forget(old)  # its own night is not old
    assert {table: count(old, table) for table in before} == before
    assert (root / "checkpoints/2024-05-29").exists()

    later = grown(LAST + timedelta(days=60))
    storage.write_bytes(str(root / "artifacts/popular/2024-07-29/key/file"), b"")
    for _ in range(2):
        forget(later)
        after = {table: count(later, table) for table in before}
        made_anew = {"user_features", "item_features"}
        assert after == {**before, **dict.fromkeys(made_anew, 0), "runs": before["runs"] + 1}
        assert not (root / "checkpoints/2024-05-29").exists()
        left = sorted(str(f.relative_to(root)) for f in (root / "artifacts").rglob("file"))
        assert left == ["artifacts/mine/kept/file", "artifacts/popular/2024-07-29/key/file"]
        versions = later.catalog.versions()
    forget(later)
    assert later.catalog.versions() == versions


def test_a_young_shop_gets_lists_without_a_model_that_fails(opened: Open) -> None:
    """Three days old, the horizon is fourteen; no item is frequent enough for one challenger."""
    settings = [
        "models=[popular, item2vec, item_knn]",
        "models.item2vec.min_count=1000000",
        "evaluate.horizon_days=14",
    ]
    told: list[str] = []
    context = replace(opened(LAST, *settings), progress=told.append)
    with pytest.raises(ModelsFailedError, match="item2vec in stage train, EmptyDataError"):
        night(context)

    def rows_of(table: str) -> list[Any]:
        return list(context.catalog.read(table, context.catalog.version(table)).collect())

    lists = rows_of("recommendations")
    assert len({row["user_id"] for row in lists}) == 40
    assert {row["model"] for row in lists} == {"popular"}
    assert rows_of("item_neighbours")
    metrics = {(row["model"], row["metric"]): row["value"] for row in rows_of("metrics")}
    n_bought = sum(items.nunique() for _, items in rows().groupby("user")["item"])
    assert metrics == {
        ("population", "n_users"): 40,
        ("population", "n_cold_users"): 40,
        ("population", "n_cold_items_in_truth"): n_bought,
    }
    assert any("nothing to compare yet: no event before 2024-05-18" in line for line in told)
    backtest = next(row for row in rows_of("gates") if row["gate"].startswith("backtest"))
    assert (backtest["passed"], backtest["value"]) == (True, None)
    assert "not compared" in backtest["detail"]
    failed = [row for row in rows_of("runs") if row["status"] != "ok"]
    assert [(row["stage"], row["model"]) for row in failed] == [("train", "item2vec")]
    assert "no sentence has two items" in json.loads(failed[0]["detail"])["error"]

    assert "nothing to compare yet" in str(evaluation_table(context, "novel").title)


def test_a_shop_too_young_for_its_ranker_gets_lists_by_the_ladder(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    """No retriever was fitted before a cutoff of the examples, so there are none. Again: nothing new."""
    settings = [
        "models=[popular, item_knn, lambdamart]",
        "models.lambdamart.needs=[popular, item_knn]",
        "publish={model: lambdamart, ladder: [item_knn, popular]}",
        "evaluate.horizon_days=14",
    ]
    context = opened(LAST, *settings)
    night(context)
    lists = context.catalog.read("recommendations", context.catalog.version("recommendations"))
    shown = lists.select("user_id", "model").distinct().collect()
    assert {row["model"] for row in shown} <= {"item_knn", "popular"}
    assert len({row["user_id"] for row in shown}) == 40
    assert "lambdamart has no lists tonight: lambdamart: no examples end before" in caplog.text
    assert {row.status for row in context.runlog.rows().values()} == {"ok"}
    assert context.catalog.version("examples") is None
    before = context.catalog.version("recommendations")
    night(opened(LAST, *settings))
    assert context.catalog.version("recommendations") == before


def test_a_model_with_too_little_before_the_backtest_has_none(grown: Open) -> None:
    """Item2vec wants 28 uses of an item: there are more by tonight, but not two days before."""
    settings = [
        "models=[popular, item2vec, item_knn]",
        "publish.ladder=[item2vec, popular]",
        "models.item2vec={sentence: history, window: 3, min_count: 28, epochs: 1, n_blocks: 1}",
    ]
    used = rows()["item"].value_counts()
    day_before = rows()[lambda r: r["at"] < datetime(2024, 5, 30)]["item"].value_counts()
    assert used.min() > 28 > day_before.max()
    context = grown(LAST, *settings, "evaluate.horizon_days=2", repin=True)
    night(context)
    metrics = context.catalog.read("metrics", context.catalog.version("metrics"))
    compared = {row["model"] for row in metrics.select("model").distinct().collect()}
    assert compared == {"popular", "item_knn", "published", "population"}
    candidates = context.catalog.read("candidates", context.catalog.version("candidates"))
    mine = candidates.where("model = 'item2vec'").select("cutoff").distinct().collect()
    assert [row["cutoff"] for row in mine] == [datetime(2024, 6, 1)]


def test_a_stage_run_again_has_one_row(grown: Open) -> None:
    again = run(grown(LAST, force=True), "sessionize")
    runs = again.catalog.read("runs", again.catalog.version("runs"))
    stages = sorted(row["stage"] for row in runs.collect())
    assert stages == ["begin", "build_features", "ingest", "sessionize"]


class Recorder:
    """Settings that note which of them are read, as `section` or `section.setting`."""

    def __init__(self, settings: Any, read: set[str], single: tuple[str, ...], above: str = ""):
        self._inner = settings, read, single, above

    def __getattr__(self, name: str) -> Any:
        settings, read, single, above = self._inner
        value = getattr(settings, name)
        if callable(value):
            return value
        if any(each.startswith(f"{name}.") for each in single):
            return Recorder(value, read, single, f"{name}.")
        read.add(above + name)
        return value


@pytest.fixture
def settings_read(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Stage -> the settings that its function read."""
    out: dict[str, set[str]] = {}

    def noting(name: str) -> Any:
        function = running.FUNCTIONS[name]
        single = tuple(each for each in reuse.SETTINGS_READ.get(name, ()) if "." in each)

        def noted(context: RunContext, *model: str) -> Any:
            config: Any = Recorder(context.config, out.setdefault(name, set()), single)
            return function(replace(context, config=config), *model)

        return noted

    for name in running.FUNCTIONS:
        monkeypatch.setitem(running.FUNCTIONS, name, noting(name))
    return out


# What is no part of a result, or is part of it by another way: the models by their artifacts, and by
# the training tables that they read.
NOT_COMPARED = {"paths", "spark", "models", "train"}


@pytest.mark.slow
def test_a_night_with_a_model_more_makes_again_only_what_reads_it(
    spark: Any, opened: Open, tmp_path: Path, settings_read: dict[str, set[str]]
) -> None:
    """A stage's result is that of another run where all that it reads is the same; and a model may be
    another's algorithm by another name, or a class from outside.
    """
    first = opened(LAST)
    night(first)
    for name, read in settings_read.items():
        declared = set(reuse.SETTINGS_READ.get(name, read))
        assert read - NOT_COMPARED <= declared, name
    assert set(settings_read) == {stage.name for stage in STAGES if stage.models(first.config)}
    settings_read.clear()
    before = first.catalog.versions()
    page = (ROOT / "docs" / "add_a_model.md").read_text(encoding="utf-8")
    source = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    outside = tmp_path / "recent_of_a_shop.py"
    outside.write_text(f"{source}\n\nRecent.model_class = RecentModel\n", encoding="utf-8")
    spark.sparkContext.addPyFile(str(outside))
    more = opened(
        LAST,
        "models=[popular, item_knn, slow, recent]",
        "models.slow={algorithm: popular, half_life_days: 300}",
        "models.recent={algorithm: recent_of_a_shop:Recent, last: 2}",
    )
    assert more.run_id != first.run_id
    night(more)
    assert set(settings_read) == {"train", "recommend", "evaluate", "publish"}
    taken = {key for key, row in more.runlog.rows().items() if row.detail.get("of_run")}
    made_once = {("ingest", ""), ("sessionize", ""), ("build_features", "")}
    per_model = {(s, m) for s in ("train", "recommend") for m in ("popular", "item_knn")}
    assert taken == made_once | per_model
    after = more.catalog.versions()
    moved = {table for table, version in after.items() if version != before[table]}
    assert moved <= {
        "candidates", "metrics", "runs", "gates", "staged_recommendations", "recommendations",
        "default_recommendations", "item_neighbours",
    }  # fmt: skip
    metrics = more.catalog.read("metrics", after["metrics"])
    compared = {row["model"] for row in metrics.select("model").distinct().collect()}
    assert {"popular", "item_knn", "slow", "recent", "published"} <= compared
    candidates = more.catalog.read("candidates", after["candidates"])
    tonight = candidates.where(F.col("cutoff") == F.lit(more.cutoffs.tonight))
    listed = {row["model"] for row in tonight.select("model").distinct().collect()}
    assert listed == {*more.config.publish.steps}  # nobody reads the others' lists of tonight
    candidates = candidates.where(F.col("cutoff") == F.lit(more.cutoffs.backtest))
    n_lists = {r["model"]: r["n"] for r in candidates.groupBy("model").agg(
        F.countDistinct("user_idx", "cutoff", "mode").alias("n")).collect()}  # fmt: skip
    assert n_lists["slow"] == n_lists["recent"] == n_lists["popular"] > 0


@pytest.mark.slow
def test_nights_of_a_grid_share_a_backtest(opened: Open) -> None:
    """A week's nights have the backtest of its Thursday, 30 May; a list's follow-up stays its own."""
    night(opened(LAST - timedelta(days=1)))

    def rows_of(*settings: str) -> tuple[RunContext, dict[str, list[Any]]]:
        context = opened(LAST, *settings)
        night(context)
        metrics = context.catalog.read("metrics", context.catalog.version("metrics"))
        found = metrics.where(F.col("run_date") == F.lit(LAST)).drop("run_date").collect()
        kinds = ("backtest", "followup")
        return context, {k: sorted(map(str, (r for r in found if r["kind"] == k))) for k in kinds}

    daily, own = rows_of()
    weekly, shared = rows_of("evaluate.every_days=7")
    days = [context.cutoffs.backtest.date() for context in (daily, weekly)]
    assert days == [date(2024, 5, 31), date(2024, 5, 30)]
    assert len(own["followup"]) > 10
    assert shared["followup"] == own["followup"]
    assert all("cutoff=datetime.datetime(2024, 5, 30" in row for row in shared["backtest"])
    row = weekly.runlog.find("train", "popular")
    assert row is not None
    assert "2024-05-30" in row.detail
    # The night of that cutoff fitted it, and its model is taken; here that night never was.
    assert BACKTEST_OF not in row.detail


def test_a_stage_is_made_again_where_what_it_reads_has_changed(opened: Open) -> None:
    first = run(opened(LAST), "ingest", "sessionize", "build_features")
    wider = run(
        opened(LAST, "sessions.gap_minutes=600", repin=True),
        "ingest",
        "sessionize",
        "build_features",
    )
    taken = [stage for (stage, _), row in wider.runlog.rows().items() if row.detail.get("of_run")]
    assert taken == []  # ingest reads which types are impressions, and says so in its warnings
    ranks = run(
        opened(LAST, "evaluate.horizon_days=2", repin=True),
        "ingest",
        "sessionize",
        "build_features",
    )
    taken = [stage for (stage, _), row in ranks.runlog.rows().items() if row.detail.get("of_run")]
    assert taken == ["ingest", "sessionize"]
    # A landing that has changed is taken in.
    place = Path(first.config.source.path)
    rows().iloc[:-1].to_parquet(place, coerce_timestamps="us")
    corrected = run(opened(LAST, "evaluate.horizon_days=3", repin=True), "ingest", "sessionize")
    taken = [s for (s, _), row in corrected.runlog.rows().items() if row.detail.get("of_run")]
    assert taken == []
    assert count(corrected, "events") == len(rows()) - 1

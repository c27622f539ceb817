"""Two runs of a night, two nights at once, a rollback, files that went away: nobody's rows get lost,
doubled, or published in another's name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pyspark.sql import functions as F

from recspark.data.examples import feature_names
from recspark.data.pair_features import FEATURES
from recspark.errors import (
    DamagedFileError,
    OpenRunError,
    SourceError,
    SupersededRunError,
    VersionNotFoundError,
)
from recspark.pipeline import runlog
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import BACKTEST_OF, SLICES, examples_of
from recspark.pipeline.plan import STAGES
from recspark.pipeline.run import execute, night
from recspark.pipeline.runlog import RunLog, StageResult, begun_runs
from recspark.pipeline.stages import ingest as ingesting
from recspark.pipeline.stages import publish as publishing
from recspark.pipeline.stages.evaluate import published_lists
from recspark.tables.catalog import TableCatalog
from tests.e2e import test_odd_nights as odd
from tests.e2e.test_odd_nights import Open

pytestmark = [pytest.mark.spark, pytest.mark.timeout(600)]
N_DAYS = 4
# The shop's first day has no horizon behind it.
FIRST, SECOND, LAST = (odd.FIRST + timedelta(days=n) for n in range(1, N_DAYS))
LISTS = ("recommendations", "default_recommendations", "item_neighbours")
# Another settings' night: shorter lists of another model.
OTHER = (
    "publish.model=item_knn",
    "evaluate.baseline=item_knn",
    "publish.k=3",
    "model_settings.item_knn.n_neighbours=2",
    "evaluate.ks=[3]",
)


def rows() -> pd.DataFrame:
    return odd.rows(N_DAYS)


def opener(folder: Path) -> Open:
    """By the last night every user has seen every item: lists repeat what was seen."""
    of = odd.opener(folder, N_DAYS)
    return lambda day, *more, **options: of(day, "publish.mode=repeat", *more, **options)


@pytest.fixture(scope="module")
def two_nights(spark: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation after the nights of the first two days."""
    folder = tmp_path_factory.mktemp("nights")
    for day in (FIRST, SECOND):
        night(opener(folder)(day))
    return folder


@pytest.fixture
def opened(two_nights: Path, tmp_path: Path) -> Open:
    """A function that opens a night of a copy of it."""
    shutil.copytree(two_nights / "root", tmp_path / "root")
    return opener(tmp_path)


def stages(context: RunContext, *names: str, model: str | None = None) -> None:
    for stage in STAGES:
        if stage.name in names:
            models = stage.models(context.config, (model,) if model else ())
            for each in models:
                execute(context, stage, each)


def of_night(context: RunContext, table: str) -> list[str]:
    """The rows of a table of this night as they are now, as text."""
    found = context.catalog.read(table, context.catalog.version(table))
    if "run_date" in found.columns:
        found = found.where(F.col("run_date") == F.lit(context.run_date))
    return sorted(r[0] for r in found.select(F.to_json(F.struct("*"))).collect())


def content(context: RunContext, table: str) -> list[str]:
    found = context.catalog.read(table, context.catalog.version(table))
    return sorted(r[0] for r in found.select(F.to_json(F.struct("*"))).collect())


def said(context: RunContext) -> list[str]:
    """What the context tells from now on."""
    texts: list[str] = []
    context.progress = texts.append
    return texts


def test_two_runs_of_a_night_read_each_their_own_slices(opened: Open) -> None:
    """B scores every model between A's two, and A one of them after B: each still has its own."""

    def own(context: RunContext, *models: str) -> list[str]:
        found = context.read("candidates").where(
            (F.col("run_date") == F.lit(LAST)) & F.col("model").isin(list(models))
        )
        return sorted(r[0] for r in found.select(F.to_json(F.struct("*"))).collect())

    a, b = opened(LAST), opened(LAST, *OTHER, repin=True)
    before_train = ("ingest", "sessionize", "build_features", "train")
    stages(a, *before_train)
    stages(b, *before_train)
    stages(a, "recommend", model="popular")
    of_a = own(a, "popular")
    stages(b, "recommend")
    of_b = own(b, "popular", "item_knn")
    assert own(a, "popular") == of_a
    stages(a, "recommend", model="item_knn")
    assert own(b, "popular", "item_knn") == of_b
    of_a = own(a, "popular", "item_knn")
    assert of_a != of_b  # other neighbours
    stages(b, "evaluate")
    assert own(b, "popular", "item_knn") == of_b
    measured = of_night(b, "metrics")

    with pytest.raises(SupersededRunError, match=b.run_id):
        stages(a, "evaluate")
    assert of_night(b, "metrics") == measured
    assert of_night(a, "recommendations") == []
    stages(b, "publish")
    assert len(of_night(b, "recommendations")) == 40 * 3
    with pytest.raises(SupersededRunError, match="--repin"):
        opened(LAST)


@pytest.mark.parametrize(
    "stopped_at", ["recommendations", *[pytest.param(t, marks=pytest.mark.slow) for t in LISTS[1:]]]
)
def test_a_publish_continued_after_anothers_changes_nothing(
    opened: Open, monkeypatch: pytest.MonkeyPatch, stopped_at: str
) -> None:
    """It stands still after all looks at who may publish, right before its commit."""
    a = opened(LAST)
    stages(a, *[stage.name for stage in STAGES[:-1]])
    real = TableCatalog.replace_slice
    waiting = [stopped_at]
    others: dict[str, list[str]] = {}

    def stop(self: TableCatalog, table: str, *args: Any, **options: Any) -> Any:
        if table in waiting:
            waiting.remove(table)
            b = opened(LAST, *OTHER, repin=True)
            night(b)
            others.update({name: of_night(b, name) for name in LISTS})
        return real(self, table, *args, **options)

    monkeypatch.setattr(TableCatalog, "replace_slice", stop)
    with pytest.raises(SupersededRunError):
        stages(a, "publish")
    assert len(others["recommendations"]) == 40 * 3
    assert {name: of_night(a, name) for name in LISTS} == others


def test_a_second_process_of_a_run_that_has_published_ends(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = opened(LAST)
    stages(a, *[stage.name for stage in STAGES[:-1]])
    real = publishing.judge

    def stop(context: RunContext, *args: Any) -> Any:
        monkeypatch.setattr(publishing, "judge", real)
        stages(opened(LAST), "publish")
        return real(context, *args)

    monkeypatch.setattr(publishing, "judge", stop)
    with pytest.raises(SupersededRunError, match="another process of run"):
        stages(a, "publish")
    keys = [(r["run_id"], r["stage"], r["model"]) for r in a.catalog.read(
        "runs", a.catalog.version("runs")).collect()]  # fmt: skip
    assert len(keys) == len(set(keys))


def test_a_second_open_run_is_refused_unless_asked_for(opened: Open) -> None:
    first = opened(LAST)
    with pytest.raises(OpenRunError, match=rf"run {first.run_id} .* last row in runs: begin"):
        opened(LAST, *OTHER)
    opened(LAST, *OTHER, begins=False)  # as `recspark tune` looks at a night
    assert opened(LAST).run_id == first.run_id  # many processes of one run go on side by side
    place = Path(first.config.source.path)
    place.rename(place.with_suffix(".away"))
    with pytest.raises(SourceError):
        stages(first, "ingest")
    second = opened(LAST, *OTHER)  # the first has ended by an error
    place.with_suffix(".away").rename(place)
    assert opened(LAST, *OTHER, force=True).run_id == second.run_id
    with pytest.raises(SupersededRunError, match=second.run_id):
        opened(LAST)
    assert opened(LAST, force=True).run_id == first.run_id  # asked for: it is the newest again
    with pytest.raises(SupersededRunError, match=first.run_id):
        opened(LAST, *OTHER)
    third = opened(LAST, *OTHER, repin=True)
    order = [run.run_id for run in begun_runs(first.catalog, LAST)]
    assert order == [second.run_id, first.run_id, third.run_id]


def test_two_processes_that_begin_a_run_at_once_share_it(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look before either has begun."""
    looks = [begun_runs(opened(SECOND).catalog, LAST)] * 2
    assert looks[0] == []
    monkeypatch.setattr(runlog, "begun_runs", lambda *of: looks.pop() if looks else begun_runs(*of))
    one, other = opened(LAST), opened(LAST)
    assert looks == []
    assert one.run_id == other.run_id
    assert len(begun_runs(one.catalog, LAST)) == 1


def test_repin_takes_in_a_corrected_landing_though_no_table_has_moved(
    spark: object, tmp_path: Path
) -> None:
    """Run again on the same rows, no table moves; then the landing is mended."""
    of = opener(tmp_path)
    first = of(FIRST)
    place = Path(first.config.source.path)
    stages(first, "ingest")
    again = of(FIRST, repin=True)
    stages(again, "ingest")  # the same rows: no table moves
    mended = rows()[lambda r: r["user"] != "u7"]
    mended.to_parquet(place, coerce_timestamps="us")
    pins = dict(again.pins)
    third = of(FIRST, repin=True)
    assert third.pins == pins
    assert len({first.run_id, again.run_id, third.run_id}) == 3
    stages(third, "ingest")
    version = third.catalog.version("events")
    assert third.catalog.count("events", version) == 39 * 6


def test_two_processes_of_one_run_leave_one_row_of_a_stage(opened: Open) -> None:
    one = opened(LAST)
    other = RunLog(one.catalog, LAST, one.run_id)
    assert other.find("ingest") is None  # it has looked
    stages(one, "ingest")
    row = one.runlog.find("ingest")
    assert row is not None
    other.record(
        stage="ingest",
        model="",
        inputs=row.inputs,
        result=StageResult(row.outputs, row.rows_in, row.rows_out),
        config="{}",
        code="code",
        seconds=1.0,
        peak_memory_mb=1.0,
        started_at=datetime.now(UTC),
    )
    stages_of = [r["stage"] for r in one.catalog.read("runs", one.catalog.version("runs")).where(
        F.col("run_id") == one.run_id).collect()]  # fmt: skip
    assert sorted(stages_of) == ["begin", "ingest"]


def test_a_follow_up_has_the_mode_that_the_list_was_published_in(opened: Open) -> None:
    tonight = opened(LAST, "publish.mode=novel")
    tonight.stage = "evaluate"
    found = published_lists(tonight)
    assert found is not None
    models_of_modes, lists = found
    assert models_of_modes == {"repeat": ["published"]}
    assert {r["mode"] for r in lists.select("mode").distinct().collect()} == {"repeat"}


RANKED = (
    "models=[popular, item_knn, lambdamart]",
    "models.lambdamart.needs=[popular]",
    "examples.every_days=1",
    "examples.n_cutoffs=1",
    "examples.n_negatives=5",
    # The users of this shop act by a rule, and features that are honest tell it.
    f"examples.honest_features=[{', '.join(feature_names(('popular',), [*FEATURES]))}]",
)


def up_to_examples(context: RunContext) -> None:
    stages(context, "ingest", "sessionize", "build_features")
    stages(context, "train", model="popular")


def examples_of_run(context: RunContext) -> dict[str, list[tuple[Any, ...]]]:
    """Cutoff -> the examples as this run's ranker reads them; their number is what `runs` says."""
    row = context.runlog.find("examples", "lambdamart")
    assert row is not None
    read = examples_of(context, "lambdamart", context.cutoffs.tonight).rows
    rows = context.catalog.read("examples", row.outputs["examples"]).where("model = 'lambdamart'")
    found: dict[str, list[tuple[Any, ...]]] = {}
    for cutoff, made in row.detail[SLICES].items():
        is_of_slice = F.col("cutoff") == F.lit(datetime.fromisoformat(cutoff))
        found[cutoff] = sorted(
            (r["mode"], r["user_idx"], r["item_idx"], r["label"])
            for r in rows.where(is_of_slice).collect()
        )
        assert len(found[cutoff]) == made["rows"] > 0
    assert read.count() == len(found[max(found)])
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_runs_of_a_night_have_each_their_own_examples(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B replaces both slices of the ranker right before A, which keeps the older one, commits the
    newer one. So A makes the older one anew. All that a run makes at once is one commit.
    """
    earlier = opened(SECOND, *RANKED, repin=True)
    up_to_examples(earlier)
    stages(earlier, "examples")
    assert len(examples_of_run(earlier)) == 2
    assert earlier.catalog.version("examples") == 0
    a = opened(LAST, *RANKED)
    b = opened(LAST, *RANKED, "examples.n_negatives=1", repin=True)
    up_to_examples(a)
    up_to_examples(b)
    real = TableCatalog.replace_slice
    waiting = ["examples"]
    slices_written = []

    def stop(self: TableCatalog, table: str, frame: Any, where: Any, **options: Any) -> Any:
        if table in waiting:
            waiting.remove(table)
            stages(b, "examples")
        if self is a.catalog and table == "examples":
            slices_written.append(where["cutoff"])
        return real(self, table, frame, where, **options)

    monkeypatch.setattr(TableCatalog, "replace_slice", stop)
    stages(a, "examples")
    older, newer = a.cutoffs.examples
    assert slices_written == [[newer], [older]]
    of_a, of_b = examples_of_run(a), examples_of_run(b)
    assert {*of_a} == {*of_b}
    assert all(len(of_a[cutoff]) > len(of_b[cutoff]) for cutoff in of_a)
    assert of_a[older.isoformat()] == examples_of_run(earlier)[older.isoformat()]
    row = b.runlog.find("examples", "lambdamart")
    assert row is not None
    assert row.outputs["examples"] == 1  # two slices, one commit


def fitted_by(context: RunContext) -> dict[str, str]:
    """Model -> the run whose artifact the backtest takes."""
    rows = {m: context.runlog.find("train", m) for m in context.config.models}
    return {m: row.detail.get(BACKTEST_OF, context.run_id) for m, row in rows.items() if row}


def test_the_backtest_takes_what_was_fitted_on_the_night_of_its_cutoff(opened: Open) -> None:
    """Its cutoff is the one of the second night's lists; a model with other settings is made anew."""
    before_train = ("ingest", "sessionize", "build_features")
    context = opened(LAST)
    (second,) = begun_runs(context.catalog, SECOND)
    assert context.cutoffs.backtest.date() == LAST
    stages(context, *before_train, "train", "recommend")
    assert fitted_by(context) == dict.fromkeys(context.config.models, second.run_id)
    artifacts = Path(context.catalog.root).parent / "artifacts"
    per_cutoff = {
        (folder.parent.name, folder.name): len(list(folder.iterdir()))
        for folder in artifacts.glob("*/*")
    }
    cutoffs = {
        str(day + timedelta(days=1)) for day in (FIRST - timedelta(days=1), FIRST, SECOND, LAST)
    }
    # The first night's backtest was made that night; all others are a night's own.
    assert per_cutoff == {(m, day): 1 for m in context.config.models for day in cutoffs}

    other = opened(LAST, "models.item_knn.shrink=3", repin=True)
    stages(other, *before_train, "train")
    assert fitted_by(other) == {"popular": second.run_id, "item_knn": other.run_id}

    forced = opened(LAST, force=True)
    stages(forced, "train", model="popular")
    assert fitted_by(forced)["popular"] == forced.run_id

    # Another dictionary: the integers of that night may stand for other items.
    shutil.rmtree(artifacts.parent / "tables" / "item_ids")
    for table in ("histories", "sessions", "items"):
        shutil.rmtree(artifacts.parent / "tables" / table)
    anew = opened(LAST, repin=True)
    stages(anew, *before_train, "train")
    assert set(fitted_by(anew).values()) == {anew.run_id}


def gone(root: Path) -> None:
    shutil.rmtree(root / "tables/recommendations")


def empty_log(root: Path) -> None:
    newest = max((root / "tables/recommendations/_delta_log").glob("*.json"))
    newest.write_bytes(b"")


def cut(root: Path) -> None:
    for file in (root / "tables/recommendations").glob(f"run_date={SECOND}/*.parquet"):
        file.write_bytes(file.read_bytes()[:-20])


def gone_candidates(root: Path) -> None:
    shutil.rmtree(root / f"tables/candidates/run_date={SECOND}")


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (gone, ["publish"]),
        (empty_log, []),
        pytest.param(cut, ["publish"], marks=pytest.mark.slow),
        pytest.param(gone_candidates, ["recommend"], marks=pytest.mark.slow),
    ],
)
def test_a_rerun_looks_at_what_its_log_says(
    opened: Open, damage: Callable[[Path], None], again: list[str]
) -> None:
    context = opened(SECOND)
    want = of_night(context, "recommendations")
    root = Path(context.catalog.root).parent
    damage(root)
    context = opened(SECOND)
    texts = said(context)
    if not again:
        with pytest.raises(DamagedFileError, match="'recommendations': its log file"):
            night(context)
        return
    night(context)
    assert of_night(context, "recommendations") == want
    made = {text.split(" ")[0].rstrip(":") for text in texts if text.endswith("made again")}
    assert made == set(again)
    texts.clear()
    night(opened(SECOND))
    assert not [text for text in texts if "made again" in text]


@pytest.mark.parametrize(
    "tables",
    [
        ("events", "sessions", "histories"),
        *[pytest.param((t,), marks=pytest.mark.slow) for t in ("events", "sessions", "histories")],
    ],
)
def test_after_a_restore_later_nights_skip_no_event(opened: Open, tables: tuple[str, ...]) -> None:
    """What the second night brought is taken back; the night is run again, and then the third."""
    before = opened(SECOND)
    first = begun_runs(before.catalog, FIRST)[-1]
    rows_of = RunLog(before.catalog, FIRST, first.run_id).outputs([s.name for s in STAGES])
    for table in tables:
        before.spark.sql(
            f"RESTORE delta.`{before.catalog.path(table)}` TO VERSION AS OF {rows_of[table]}"
        )
    if "events" in tables:  # the third night, though the second was not run again
        stages(opened(LAST), "ingest", "sessionize", "build_features")
    stages(opened(SECOND, repin=True), "ingest", "sessionize", "build_features")
    last = opened(LAST, repin=True)
    stages(last, "ingest", "sessionize", "build_features")
    made = {table: content(last, table) for table in ("sessions", "histories")}
    for table in made:
        shutil.rmtree(Path(last.catalog.root) / table)
    again = opened(LAST, force=True)
    stages(again, "sessionize", "build_features")
    assert made == {table: content(again, table) for table in made}
    assert len(content(last, "events")) == 40 * 12


def test_a_backup_put_back_is_not_taken_for_the_table_that_it_replaces(
    opened: Open, two_nights: Path
) -> None:
    """`events` of two nights ago, from a backup: the version of the note is another commit there."""
    context = opened(LAST)
    stages(context, "ingest", "sessionize", "build_features")
    events = Path(context.catalog.root) / "events"
    shutil.rmtree(events)
    shutil.copytree(two_nights / "root/tables/events", events)
    rows()[lambda r: r["user"] != "u7"].to_parquet(
        context.config.source.path, coerce_timestamps="us"
    )
    context.spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()
    again = opened(LAST, repin=True)
    stages(again, "ingest", "sessionize", "build_features")
    found = again.catalog.read("histories", again.catalog.version("histories"))
    n = found.agg(F.sum(F.size("history"))).collect()[0][0]
    assert n == again.catalog.count("events", again.catalog.version("events")) == 40 * 9 + 39 * 3


def test_a_dictionary_taken_back_is_refused(opened: Open) -> None:
    place = Path(opened(SECOND).config.source.path)
    old = rows()
    new = old[(old["user"] == "u7") & (old["at"].dt.date == LAST)].assign(user="new")
    pd.concat([old, new]).to_parquet(place, coerce_timestamps="us")
    context = opened(LAST)
    stages(context, "ingest", "sessionize", "build_features")
    path = context.catalog.path("user_ids")
    context.spark.sql(f"RESTORE delta.`{path}` TO VERSION AS OF 0")
    again = opened(LAST, repin=True)
    with pytest.raises(VersionNotFoundError, match="'user_ids': histories were made with its"):
        stages(again, "ingest", "sessionize", "build_features")
    context.spark.sql(f"RESTORE delta.`{path}` TO VERSION AS OF 1")
    stages(opened(LAST), "ingest", "sessionize", "build_features")


def test_two_nights_at_once_that_bring_the_same_event_keep_one(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one commits between the earlier one's look at `events` and its commit."""
    place = Path(opened(LAST).config.source.path)
    both = rows().assign(event=lambda r: r.index.astype(str))
    both.to_parquet(place, coerce_timestamps="us")
    settings = ("source.columns.event_id=event", "ingest.max_late_days=30")
    days = [LAST + timedelta(days=n) for n in (1, 2)]
    real = ingesting.read_landing

    def stop(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(ingesting, "read_landing", real)
        other = opened(days[1], *settings)
        execute(other, STAGES[0])
        return real(*args, **options)

    monkeypatch.setattr(ingesting, "read_landing", stop)
    one = opened(days[0], *settings)
    execute(one, STAGES[0])
    found = one.catalog.read("events", one.catalog.version("events"))
    ids = [r["event_id"] for r in found.select("event_id").collect()]
    assert len(ids) == len(set(ids))

"""Nights in processes of their own that are killed, stopped, and run side by side."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from datetime import date, timedelta
from pathlib import Path

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark.errors import SupersededRunError
from recspark.tables.catalog import TableCatalog
from recspark.tables.specs import SPECS
from tests.conftest import ROOT
from tests.e2e import test_odd_nights as odd

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(3600)]
N_KILLS = 15
N_DAYS = 4
# The shop's first day has no horizon behind it.
NIGHTS = FIRST, SECOND, LAST = tuple(odd.FIRST + timedelta(days=n) for n in range(1, N_DAYS))
OTHER = ("publish.model=item_knn", "evaluate.baseline=item_knn", "publish.k=3", "evaluate.ks=[3]")


def shop(folder: Path) -> Path:
    """A shop whose landings overlap: each holds its day and the day before, event ids and all."""
    folder.mkdir()
    events = odd.rows(N_DAYS).assign(event=lambda r: "e" + r.index.astype(str))
    day = events["at"].dt.date
    for night in NIGHTS:
        landed = events[(day == night) | (day == night - timedelta(days=1))]
        landed.to_parquet(folder / f"{night}.parquet", coerce_timestamps="us")
    return folder


def start(folder: Path, night: date, *more: str) -> subprocess.Popen[bytes]:
    """Begin a night in a process group of its own: driver, JVM and Python workers."""
    settings = [s.replace("shop.parquet", "{run_date}.parquet") for s in odd.settings_of(folder)]
    settings += ["source.columns.event_id=event", "source.archive=false", "evaluate.n_bootstrap=20",
                 "publish.mode=repeat", "ingest.max_late_days=7", "ingest.min_clean_fraction=0"]  # fmt: skip
    flags = [text for text in more if text.startswith("--")]
    settings += [text for text in more if not text.startswith("--")]
    command = [str(Path(sys.executable).parent / "recspark"), "nightly", "--env", "test", "--no-report",
               "--run-date", str(night), *flags]  # fmt: skip
    for setting in settings:
        command += ["--set", setting]
    log = (folder / f"{night}.log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def run(folder: Path, night: date, *more: str) -> int:
    return start(folder, night, *more).wait(timeout=900)


def stop_all(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    os.killpg(process.pid, how)


def content(spark: SparkSession, folder: Path, *leave: str) -> dict[str, list[str]]:
    catalog = TableCatalog(spark, str(folder / "root" / "tables"))
    out = {}
    for table, version in catalog.versions().items():
        if table in leave:
            continue
        found = catalog.read(table, version)
        if table == "runs":
            found = found.select("run_date", "stage", "model", "rows_in", "rows_out", "status")
        texts = found.select(F.to_json(F.struct("*"))).collect()
        out[table] = sorted(r[0] for r in texts)
    return out


def check_keys(spark: SparkSession, folder: Path) -> None:
    """No key twice in any table, no integer twice in a dictionary, no event lost."""
    catalog = TableCatalog(spark, str(folder / "root" / "tables"))
    for table, version in catalog.versions().items():
        found = catalog.read(table, version)
        for key in filter(None, (SPECS[table].key, (SPECS[table].unique or "",))):
            if "" not in key:
                assert found.groupBy(*key).count().where("count > 1").isEmpty(), (table, key)
    events = catalog.read("events", catalog.version("events"))
    histories = catalog.read("histories", catalog.version("histories"))
    in_histories = histories.agg(F.sum(F.size("history"))).collect()[0][0]
    assert events.count() == in_histories == 40 * 3 * N_DAYS


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shop(tmp_path_factory.mktemp("undisturbed") / "shop")
    for night in NIGHTS:
        assert run(folder, night) == 0, (folder / f"{night}.log").read_text()[-3000:]
    return folder


def test_fifteen_kills_at_random_moments(
    spark: SparkSession, undisturbed: Path, tmp_path: Path
) -> None:
    folder = shop(tmp_path / "shop")
    seed = int(os.environ.get("RECSPARK_TEST_SEED", "17"))
    moments = random.Random(seed)
    left = {FIRST: N_KILLS // 3, SECOND: N_KILLS // 3, LAST: N_KILLS // 3}
    killed = []
    for night in NIGHTS:
        whole = 40.0  # of a night; known better after each that ends
        while True:
            began = time.monotonic()
            process = start(folder, night)
            try:
                code = process.wait(moments.uniform(0.2, 1.1) * whole if left[night] else 900)
            except subprocess.TimeoutExpired:
                stop_all(process, signal.SIGKILL)
                process.wait()
                left[night] -= 1
                killed.append(night)
                continue
            assert code == 0, (folder / f"{night}.log").read_text()[-3000:]
            whole = time.monotonic() - began
            if not left[night]:
                break
            whole = max(5.0, whole * 0.9)  # as recorded, it ends sooner
    assert len(killed) == N_KILLS
    check_keys(spark, folder)
    assert content(spark, folder) == content(spark, undisturbed)


def test_two_nights_at_once_and_an_older_one_after_a_newer(
    spark: SparkSession, undisturbed: Path, tmp_path: Path
) -> None:
    """The first night, then the other two side by side, then all again; the events are the same."""
    folder = shop(tmp_path / "shop")
    assert run(folder, FIRST) == 0
    both = [start(folder, night) for night in (LAST, SECOND)]
    codes = [process.wait(timeout=900) for process in both]
    logs = "".join((folder / f"{night}.log").read_text()[-3000:] for night in NIGHTS)
    assert codes == [0, 0], logs
    check_keys(spark, folder)
    for night in (SECOND, FIRST, LAST):
        assert run(folder, night, "--force") == 0, (folder / f"{night}.log").read_text()[-3000:]
    check_keys(spark, folder)
    # Which of two landings an event came by, and its integers, go by who was first.
    mine, theirs = (content(spark, place) for place in (folder, undisturbed))
    assert len(mine["sessions"]) == len(theirs["sessions"])
    assert len(mine["recommendations"]) == len(theirs["recommendations"])


def test_a_publish_stopped_and_continued_after_anothers(
    spark: SparkSession, tmp_path: Path
) -> None:
    folder = shop(tmp_path / "shop")
    assert run(folder, FIRST) == 0
    log = folder / f"{SECOND}.log"
    process = start(folder, SECOND)
    try:
        while "publish ..." not in (log.read_text() if log.exists() else ""):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.05)
        time.sleep(1.0)  # at its gates
        stop_all(process, signal.SIGSTOP)
        assert run(folder, SECOND, "--repin", *OTHER) == 0, log.read_text()[-3000:]
        lists = ("recommendations", "default_recommendations", "item_neighbours", "metrics")
        before = {table: content(spark, folder)[table] for table in lists}
        stop_all(process, signal.SIGCONT)
        assert process.wait(timeout=300) == SupersededRunError.exit_code, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            stop_all(process, signal.SIGKILL)
    assert {table: content(spark, folder)[table] for table in lists} == before
    of_second = [row for row in before["recommendations"] if str(SECOND) in row]
    assert len(of_second) == 40 * 3

"""A whole small night: what it leaves, that it can be run again, and that others can read it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyspark.sql import functions as F

from recspark import schema
from recspark.errors import DamagedFileError, GateRefusedError, MissingLandingError, StageOrderError
from recspark.models import artifacts
from recspark.models.registry import model_spec
from recspark.pipeline import context as context_module
from recspark.pipeline.context import RunContext
from recspark.pipeline.fitted import artifact_folder
from recspark.pipeline.plan import STAGES
from recspark.pipeline.run import execute, night, open_night
from recspark.pipeline.stages import publish
from recspark.tables.specs import SPECS
from tests.conftest import (
    NIGHT,
    ROOT,
    production_settings,
    run_night,
    small_settings,
    without_commits,
)

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]


def content(context: RunContext, table: str, drop: tuple[str, ...] = ()) -> list[str]:
    rows = context.catalog.read(table, context.catalog.version(table)).drop(*drop)
    return sorted(r[0] for r in rows.select(F.to_json(F.struct(*rows.columns))).collect())


def everything(context: RunContext) -> dict[str, list[str]]:
    """All columns of all tables but times and memory; where the night lies is written `ROOT`, and the
    ids of its commits, which are drawn, are left out.
    """
    measured = {"runs": ("seconds", "peak_memory_mb", "started_at", "ended_at")}
    root = str(Path(context.catalog.root).parent)
    return {
        table: [
            without_commits(row.replace(root, "ROOT"))
            for row in content(context, table, measured.get(table, ()))
        ]
        for table in context.catalog.versions()
    }


def test_every_active_user_has_ten_items_and_none_was_seen(small_night: RunContext) -> None:
    catalog = small_night.catalog
    rows = catalog.read("recommendations", catalog.version("recommendations"))
    per_user = rows.groupBy("user_id").agg(F.count(F.lit(1)).alias("n"), F.max("rank").alias("top"))
    events = catalog.read("events", catalog.version("events"))
    users = events.select("user_id").distinct().count()
    found = [(r["n"], r["top"]) for r in per_user.collect()]
    assert found == [(10, 10)] * users
    assert users > 200
    seen = rows.join(
        events.select("user_id", "item_id"), on=["user_id", "item_id"], how="left_semi"
    )
    assert seen.count() == 0
    assert rows.where("item_name IS NULL").count() == 0


def test_rows_are_conserved(small_night: RunContext, retail_slice: Path) -> None:
    import pyarrow.parquet as pq

    catalog = small_night.catalog
    n_in = pq.read_metadata(retail_slice).num_rows
    n_events = catalog.read("events", catalog.version("events")).count()
    quarantined = catalog.read("quarantine", catalog.version("quarantine"))
    assert n_in == n_events + quarantined.count()
    reasons = {r[0] for r in quarantined.select("reason").distinct().collect()}
    assert len(reasons) >= 4


def test_every_stage_left_its_row(small_night: RunContext) -> None:
    rows = small_night.runlog.rows()
    for stage in STAGES:
        for model in stage.models(small_night.config):
            row = rows[stage.name, model]
            assert row.status == "ok"
            assert row.rows_in > 0


def test_metrics_hold_every_model_in_both_modes(small_night: RunContext) -> None:
    catalog = small_night.catalog
    rows = catalog.read("metrics", catalog.version("metrics")).where(
        "metric = 'ndcg' AND k = 10 AND segment = 'warm'"
    )
    found = {(r["model"], r["mode"]): r for r in rows.collect()}
    for model in (*small_night.config.models, "published"):
        for mode in schema.MODES:
            row = found[model, mode]
            assert 0 < row["value"] < 1
            assert row["ci_low"] <= row["diff"] <= row["ci_high"]
    assert found["ease", "repeat"]["value"] > found["popular", "repeat"]["value"]


def test_the_published_list_in_the_backtest_is_the_champion_where_it_is_full(
    small_night: RunContext,
) -> None:
    catalog = small_night.catalog
    lists = catalog.read("candidates", catalog.version("candidates")).where(
        (F.col("cutoff") == F.lit(small_night.cutoffs.backtest)) & (F.col("rank") <= 10)
    )
    mine = lists.where("model = 'published' AND mode = 'repeat'").drop("model")
    champion = lists.where("model = 'ease' AND mode = 'repeat'").drop("model")
    full = champion.groupBy("user_idx").count().where("count = 10").select("user_idx")
    champion = champion.join(full, on="user_idx", how="left_semi")
    mine = mine.join(full, on="user_idx", how="left_semi")
    assert champion.exceptAll(mine.select(*champion.columns)).count() == 0
    assert champion.count() > 100


@pytest.fixture(scope="module")
def first_content(small_night: RunContext) -> dict[str, list[str]]:
    """What the night left, before any second run."""
    return everything(small_night)


def test_a_second_run_changes_nothing(
    small_night: RunContext, retail_slice: Path, first_content: dict[str, list[str]]
) -> None:
    versions = small_night.catalog.versions()
    run_night(Path(small_night.catalog.root).parent, retail_slice)
    assert small_night.catalog.versions() == versions  # it commits nothing at all
    assert set(versions) == set(first_content)


def test_a_forced_run_changes_nothing_either(
    small_night: RunContext, retail_slice: Path, first_content: dict[str, list[str]]
) -> None:
    root = Path(small_night.catalog.root).parent
    run_night(root, retail_slice, NIGHT, force=True)
    assert everything(small_night) == first_content


def test_a_night_under_productions_settings_is_the_same(
    small_night: RunContext,
    retail_slice: Path,
    first_content: dict[str, list[str]],
    tmp_path: Path,
) -> None:
    """The other tests switch off adaptive plans, compiled code and statistics of files."""
    conf = small_night.spark.conf
    asked = {
        "spark.sql.adaptive.enabled": "true",
        "spark.sql.codegen.wholeStage": "true",
        "spark.sql.codegen.factoryMode": "FALLBACK",
    }
    settings = small_settings(tmp_path, retail_slice)
    context = open_night("test", date.fromisoformat(NIGHT), settings)  # it sets those of the tests
    with production_settings(small_night.spark):
        night(context)
        assert {key: conf.get(key) for key in asked} == asked
        skipping = "spark.databricks.delta.properties.defaults.dataSkippingNumIndexedCols"
        assert conf.get(skipping, None) is None
    assert conf.get("spark.sql.adaptive.enabled") == "false"
    again = everything(context)
    assert again.keys() == first_content.keys()
    for table, rows in again.items():
        assert rows == first_content[table], table


def test_tables_open_without_spark(small_night: RunContext) -> None:
    script = ROOT / "tests" / "readers" / "read_tables.py"
    done = subprocess.run(
        [sys.executable, script, small_night.catalog.root],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    for name, version in small_night.catalog.versions().items():
        rows = small_night.catalog.count(name, version)
        about = found[name]
        assert (about["reader"], about["features"]) == (1, []), name
        assert about["polars"] == rows, name
        assert about["deltalake"] in (None, rows), name
        assert set(about["columns"]) == set(SPECS[name].schema.names), name


def test_a_stage_before_its_turn_is_refused(
    spark: object, retail_slice: Path, tmp_path: Path
) -> None:
    context = open_night("test", date.fromisoformat(NIGHT), small_settings(tmp_path, retail_slice))
    with pytest.raises(StageOrderError, match="stage 'ingest'"):
        execute(context, STAGES[2])


def test_a_missing_landing_is_named(spark: object, tmp_path: Path) -> None:
    context = open_night(
        "test", date.fromisoformat(NIGHT), small_settings(tmp_path, tmp_path / "none.parquet")
    )
    with pytest.raises(MissingLandingError, match=r"none\.parquet"):
        execute(context, STAGES[0])
    assert context.catalog.version("events") is None


def test_a_torn_file_of_a_table_is_named(
    small_night: RunContext, retail_slice: Path, tmp_path: Path
) -> None:
    root = tmp_path / "torn"
    shutil.copytree(Path(small_night.catalog.root).parent, root)
    for file in (root / "tables" / "histories").rglob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-100])
        (file.parent / f".{file.name}.crc").unlink()
    day = date.fromisoformat(NIGHT)
    context = open_night("test", day, small_settings(root, retail_slice), force=True)
    versions = context.catalog.versions()
    stages = {stage.name: stage for stage in STAGES}
    with pytest.raises(DamagedFileError, match=r"table 'histories': its file .*parquet is torn"):
        execute(context, stages["train"], "popular")
    # Only `runs` is written: that the stage has failed, and that the run has ended by an error.
    assert context.catalog.versions() == {**versions, "runs": versions["runs"] + 2}


def test_a_gate_that_refuses_keeps_the_last_good_list(
    small_night: RunContext, retail_slice: Path, tmp_path: Path
) -> None:
    """The champion comes out upside down, far worse than the baseline: it is not published."""
    root = tmp_path / "again"
    shutil.copytree(Path(small_night.catalog.root).parent, root)
    before = content(small_night, "recommendations")
    day = date.fromisoformat(NIGHT)
    context = open_night("test", day, small_settings(root, retail_slice), force=True)
    champion = context.config.publish.model
    for cutoff in (context.cutoffs.backtest, context.cutoffs.tonight):
        folder = artifact_folder(
            replace(context, stage="recommend", model=champion), champion, cutoff
        )
        good = artifacts.load(folder, model_spec(champion))
        arrays = {**good.arrays(), "matrix": -good.arrays()["matrix"]}
        bad = type(good).from_arrays(good.settings, good.cutoff, np.asarray(good.items), arrays)
        artifacts.save(bad, folder)
    stages = {stage.name: stage for stage in STAGES}
    execute(context, stages["recommend"], champion)
    execute(context, stages["evaluate"])
    with pytest.raises(GateRefusedError, match=r"backtest_ndcg.*Nothing was promoted") as refused:
        execute(context, stages["publish"])
    assert refused.value.exit_code == 40
    assert content(context, "recommendations") == before
    gates = context.catalog.read("gates", context.catalog.version("gates"))
    assert {r["gate"] for r in gates.where("NOT passed").collect()} == {"backtest_ndcg"}


def test_items_are_broadcast_where_they_are_few(
    small_night: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joins are hinted up to a stated number of items; what they give is the same without hints."""

    def lists() -> tuple[list[Any], bool]:
        items = publish.item_names(small_night)
        neighbours = publish.neighbour_lists(small_night, items, unavailable=None)
        plan = neighbours._jdf.queryExecution().logical().toString()
        return sorted(map(tuple, neighbours.collect())), "strategy=broadcast" in plan

    few, is_hinted = lists()
    monkeypatch.setattr(context_module, "BROADCAST_ITEMS", 0)
    many, is_still_hinted = lists()
    assert few == many
    assert few
    assert is_hinted
    assert not is_still_hinted

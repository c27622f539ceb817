"""Quality on the bundled data: the demo's backtest, beside the plain rows and an independent score.

The protocols "retail-novel" and "retail-repeat": cutoff 2010-11-25, 15 days of truth, users and items
known before it. `make demo` first. Where `../shared/tools/score_retail.py` is, the same lists are
scored by it too, and must give the same figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from benchmarks import machine
from recspark.config import Evaluate
from recspark.data.interactions import before
from recspark.eval import evaluate as scoring
from recspark.tables.catalog import TableCatalog

# NDCG@10 of plain numpy and single-process models, measured outside the project with settings chosen on
# the split before: what ours have to reach.
PLAIN = {
    "novel": {
        "popular": 0.0756,
        "item_knn": 0.0670,
        "als": 0.0874,
        "ease": 0.1177,
        "user_knn": 0.117,
    },
    "repeat": {
        "popular": 0.1480,
        "item_knn": 0.1816,
        "als": 0.2829,
        "ease": 0.2985,
        "user_knn": 0.346,
    },
}

BASELINE = "ease"  # with decayed weights: the strongest single model of the plain rows


def run(*, smoke: bool) -> None:
    """Print and write the table; smoke mode only checks that the demo's tables are read: one model a mode."""
    root = Path(os.environ.get("RECSPARK_ROOT", "build/demo"))
    if not (root / "tables" / "metrics").exists():
        print(f"no tables below {root}: run `make demo` first")
        return
    with machine.session("retail", smoke=smoke, env="test") as spark:
        catalog = TableCatalog(spark, f"{root}/tables")
        metrics = catalog.read("metrics", catalog.version("metrics"))
        night = metrics.where("kind = 'backtest'").agg(F.max("run_date")).collect()[0][0]
        rows = metrics.where(
            (F.col("run_date") == F.lit(night)) & (F.col("segment") == "warm") & (F.col("k") == 10)
        ).where("kind = 'backtest'")
        figures: dict[str, Any] = {}
        for row in rows.collect():
            figures.setdefault(row["mode"], {}).setdefault(row["model"], {})[row["metric"]] = {
                "value": row["value"], "diff": row["diff"],
                "ci": [row["ci_low"], row["ci_high"]], "n_users": row["n_users"],
            }  # fmt: skip
        scorer = Path(os.environ.get("RECSPARK_SHARED", "../shared")) / "tools" / "score_retail.py"
        for mode, models in figures.items():
            for model, found in list(models.items())[: 1 if smoke else None]:
                other = independent(catalog, night, model, mode, scorer) if scorer.exists() else {}
                if other:
                    found["score_retail"] = other
                plain = PLAIN[mode].get(model)
                print(
                    f"{mode:7s} {model:10s} NDCG@10 {found['ndcg']['value']:.4f}"
                    f"  plain {plain if plain else '':6}  score_retail {other.get('ndcg@10', '')}"
                )
        for row in differences(catalog, night, sorted(figures["novel"])[: 2 if smoke else None]):
            against = {"diff": row.diff, "ci": [row.ci_low, row.ci_high]}
            figures[row.mode][row.model]["ndcg"][f"against_{BASELINE}"] = against
            print(
                f"{row.mode:7s} {row.model:10s} NDCG@10 less that of {BASELINE}: "
                f"{row.diff:+.4f} [{row.ci_low:+.4f}, {row.ci_high:+.4f}]"
            )
    if not smoke:
        machine.write(
            "retail",
            "make demo && python -m benchmarks retail",
            {"plain": PLAIN, "figures": figures},
        )


def differences(catalog: TableCatalog, night: Any, models: list[str]) -> list[scoring.MetricRow]:
    """Return the rows of NDCG@10 whose `diff` is the difference to `BASELINE`, of the warm users."""
    candidates = catalog.read("candidates", catalog.version("candidates"))
    candidates = candidates.where(F.col("run_date") == F.lit(night))
    cutoff = candidates.agg(F.min("cutoff")).collect()[0][0]
    histories = catalog.read("histories", catalog.version("histories"))
    features = catalog.read("item_features", catalog.version("item_features"))
    past = before(histories, cutoff).withColumn("activity", F.lit("regular"))
    settings = Evaluate(horizon_days=15, ks=(10,), baseline=BASELINE)  # type: ignore[call-arg]
    rows = scoring.evaluate(
        candidates.where(F.col("cutoff") == F.lit(cutoff)),
        scoring.population(scoring.truth(histories, cutoff, settings.horizon_days), past),
        scoring.catalogue(features.where(F.col("cutoff") == F.lit(cutoff))),
        settings,
        run_date=night,
        kind="backtest",
        cutoff=cutoff,
        models=sorted({*models, BASELINE}),
    )
    return [
        row
        for row in rows
        if (row.metric, row.segment) == ("ndcg", "warm") and row.model in models and row.diff
    ]


def independent(
    catalog: TableCatalog, night: Any, model: str, mode: str, scorer: Path
) -> dict[str, float]:
    """Return what the independent scorer says of one model's backtest lists."""
    lists = named_lists(catalog, night, model, mode)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/lists.parquet"
        lists.toPandas().to_parquet(path)
        done = subprocess.run(
            [sys.executable, str(scorer), path, "--protocol", mode],
            capture_output=True,
            text=True,
            check=True,
        )
    words = done.stdout.split()
    return {name: json.loads(value) for name, value in zip(words[1::2], words[2::2], strict=True)}


def named_lists(catalog: TableCatalog, night: Any, model: str, mode: str) -> DataFrame:
    """Return `user_id, item_id, rank` of one model's backtest lists of ten."""
    candidates = catalog.read("candidates", catalog.version("candidates")).where(
        (F.col("run_date") == F.lit(night))
        & (F.col("model") == model)
        & (F.col("mode") == mode)
        & (F.col("rank") <= 10)
    )
    earliest = candidates.agg(F.min("cutoff")).collect()[0][0]
    users = catalog.read("user_ids", catalog.version("user_ids")).select("user_idx", "user_id")
    items = catalog.read("item_ids", catalog.version("item_ids")).select("item_idx", "item_id")
    return (
        candidates.where(F.col("cutoff") == F.lit(earliest))
        .join(users, on="user_idx", how="inner")
        .join(items, on="item_idx", how="inner")
        .select("user_id", "item_id", "rank")
    )

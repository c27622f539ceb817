"""The session models on Diginetica: the next item of every prefix of every test session.

`python -m benchmarks.quality.sessions --data FOLDER`, or `RECSPARK_DIGINETICA=FOLDER`: the folder
with `train_sessions.txt.gz` and `test_sessions.txt.gz` (one session a line, item ids in click
order, filtered as in SR-GNN). Research only: never in the repository.

Protocol: fit on all train sessions; full ranking among their items, nothing masked; P@20 is the
share of prefixes whose next item is among the first 20, MRR@20 the mean of 1 / rank (0 beyond 20).
`item_knn` and `ease` are not here: a dense matrix of 43,097 items takes 22 GB while it is made.
`--validate` fits on the first nine tenths of the train sessions and asks 5,000 of the last tenth:
how settings were chosen.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from benchmarks import machine
from recspark import schema
from recspark.config import Features, Train, digest
from recspark.data import features, training_rows
from recspark.data.blocks import Array, Ragged, micros
from recspark.data.dataset import Dataset
from recspark.data.interactions import before
from recspark.eval import next_item
from recspark.models.base import FitOptions
from recspark.models.registry import make
from recspark.pipeline.training_sets import training_set
from recspark.tables.catalog import TableCatalog
from recspark.testing import synth

CUTOFF = datetime(2016, 6, 1, tzinfo=UTC)
SESSION_S, EVENT_S = 64, 1  # as conf/sources/diginetica.yaml makes times up
TARGETS = {"session_knn": (0.510, 0.185), "gru4rec": (0.500, 0.170)}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> model, settings
    "popular": ("popular", {"half_life_days": None}),
    "vsknn": ("session_knn", {"method": "vsknn", "n_newest": 5000, "idf": 1.0}),
    "stan": (
        "session_knn",
        {
            "method": "stan",
            "n_newest": 5000,
            "n_neighbours": 1500,
            "position_decay": 1.5,
            "neighbour_decay": 3.0,
        },
    ),
    "gru4rec": ("gru4rec", {}),
    "sasrec": ("sasrec", {"train_on": "session", "context": "session"}),
}
DEFAULT = ("popular", "vsknn", "stan", "gru4rec")
ROWS = ("train_sessions.txt.gz", "test_sessions.txt.gz")


def run(*, smoke: bool) -> None:
    """Print and write the table; smoke mode takes 500 sessions and one rank, and writes nothing."""
    folder = Path(os.environ.get("RECSPARK_DIGINETICA", "../shared/data/diginetica"))
    rows = ("popular", "stan", "gru4rec") if smoke else DEFAULT
    measure(folder, rows, {}, ranks=1 if smoke else 2, validate=False, smoke=smoke, work="")


def measure(
    folder: Path,
    rows: tuple[str, ...],
    changed: dict[str, Any],
    *,
    ranks: int,
    validate: bool,
    smoke: bool,
    work: str,
) -> None:
    """Fit and score each row with `changed` over its settings.

    `work` : a folder that keeps tables and checkpoints, from which a training of the same settings
    and data goes on; "" = none
    """
    if not all((folder / name).exists() for name in ROWS):
        print(f"no Diginetica in {folder}: pass --data, or set RECSPARK_DIGINETICA")
        return
    train, test = (read(folder / name) for name in ROWS)
    if validate:
        n = len(train.start) - 1
        test = take(train, np.linspace(n * 9 // 10, n - 1, 5000).astype(int))
        train = take(train, np.arange(n * 9 // 10))
    if smoke:
        train, test = take(train, np.arange(500)), take(test, np.arange(50))
    with (
        machine.session("sessions", smoke=smoke, env="test") as spark,
        tempfile.TemporaryDirectory() as passing,
    ):
        place = f"{work}/{'validation' if validate else 'test'}" if work else passing
        data = dataset(spark, train, place)
        for row in rows:
            model, settings = SETTINGS[row]
            settings = {
                **settings,
                **changed,
                **({"epochs": 1} if smoke and row == "gru4rec" else {}),
            }
            recommender = make(model, settings)
            options = FitOptions(
                train=Train(ranks=ranks, threads=1),
                progress=print,
                scratch=f"{place}/{row}-{digest(settings)[:8]}" if work else "",
            )
            table = next(iter(recommender.training_tables), None)
            started = time.monotonic()
            fitted = recommender.fit(with_training(spark, data, table, place, ranks), options)
            fit_s = time.monotonic() - started
            started = time.monotonic()
            found = next_item.ranks(fitted.scorer(), fitted.items, test, micros(CUTOFF), 20)
            figures = {
                "row": row,
                "model": model,
                "settings": recommender.settings.model_dump(),
                "ranks": ranks if table else None,
                "n_prefixes": len(found),
                **{f"{name}@20": value for name, value in next_item.summary(found, 20).items()},
                "fit_s": round(fit_s, 1),
                "score_s": round(time.monotonic() - started, 1),
                "target": TARGETS.get(model),
            }
            print(
                f"{row:10s} P@20 {figures['hit_rate@20']:.4f}  MRR@20 {figures['mrr@20']:.4f}  "
                f"fit {fit_s:.0f} s, {len(found):,} prefixes scored in {figures['score_s']:.0f} s",
                flush=True,
            )
            if not smoke and not validate:
                command = f"python -m benchmarks.quality.sessions {row} --ranks {ranks}"
                machine.write(f"sessions_{row}", command, figures)


def read(path: Path) -> Ragged:
    """Return the sessions of one file, item ids as numbers."""
    with gzip.open(path, "rt", encoding="ascii") as lines:
        sessions = [np.array(line.split(), np.int64) for line in lines]
    start = np.concatenate([[0], np.cumsum([len(s) for s in sessions])])
    return Ragged(start, np.concatenate(sessions).astype(np.int32))


def take(sessions: Ragged, rows: Array) -> Ragged:
    """Return the sessions `rows`, in that order."""
    parts = [sessions.values[sessions.start[r] : sessions.start[r + 1]] for r in rows]
    return Ragged(np.concatenate([[0], np.cumsum([len(p) for p in parts])]), np.concatenate(parts))


def dataset(spark: SparkSession, sessions: Ragged, work: str) -> Dataset:
    """Return what models are fitted on: a user a session, times made up in the order of lines."""
    n, row = len(sessions.start) - 1, sessions.rows
    place = np.arange(len(row)) - sessions.start[row]
    at = micros(CUTOFF) + 1_000_000 * ((row - n) * SESSION_S + np.minimum(place, 60) * EVENT_S)
    struct = pa.StructArray.from_arrays(
        [
            pa.array(sessions.values, pa.int32()),
            pa.array(at, pa.timestamp("us", "UTC")),
            pa.array(["click"] * len(row), pa.string()),
            pa.array(np.ones(len(row)), pa.float32()),
            pa.array(np.ones(len(row)), pa.float32()),
            pa.array(row.astype(str), pa.string()),
            pa.nulls(len(row), pa.string()),
        ],
        names=schema.HISTORY_EVENT.names,
    )
    history = pa.ListArray.from_arrays(pa.array(sessions.start, pa.int32()), struct)
    table = pa.table({"user_idx": pa.array(np.arange(n), pa.int64()), "history": history})
    Path(f"{work}/histories").mkdir(parents=True, exist_ok=True)
    for part in range(4):
        chosen = table.take(pa.array(np.arange(part, n, 4)))
        pq.write_table(chosen, f"{work}/histories/{part}.parquet")
    histories = before(spark.read.parquet(f"{work}/histories"), CUTOFF)
    items = synth.items(spark, sessions.values)
    return Dataset(
        cutoff=CUTOFF,
        histories=histories,
        items=items,
        user_features=features.user_features(histories, CUTOFF).drop("cutoff"),
        item_features=features.item_features(histories, items, CUTOFF).drop("cutoff"),
    )


def with_training(
    spark: SparkSession, data: Dataset, table: str | None, work: str, ranks: int
) -> Dataset:
    """Return `data` with the training set of `table`, written as the night does."""
    from dataclasses import replace

    if table is None:
        return data
    catalog, n_files = TableCatalog(spark, f"{work}/tables"), training_rows.n_training_files(ranks)
    rows = training_rows.TRAINING_TABLES[table](data.histories, CUTOFF, Features(), n_files)  # type: ignore[call-arg]
    where = {"cutoff": CUTOFF}
    version = catalog.replace_slice(table, rows, where, n_files=n_files).version
    return replace(data, training={table: training_set(catalog, table, version, where)})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.sessions", description=__doc__
    )
    parser.add_argument("rows", nargs="*", help=", ".join(SETTINGS))
    parser.add_argument("--data", type=Path, default=None, help="folder of the two files")
    parser.add_argument("--set", default="{}", help="settings over those of the rows, as JSON")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--validate", action="store_true", help="score a part of the train sessions"
    )
    parser.add_argument(
        "--work", default="", help="a folder that keeps checkpoints: a training goes on from there"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    arguments = parser.parse_args()
    measure(
        arguments.data or Path(os.environ.get("RECSPARK_DIGINETICA", "../shared/data/diginetica")),
        tuple(arguments.rows) or DEFAULT,
        json.loads(arguments.set),
        ranks=arguments.ranks,
        validate=arguments.validate,
        smoke=arguments.smoke,
        work=arguments.work,
    )


if __name__ == "__main__":
    main()

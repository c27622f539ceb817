"""MovieLens 1M by published protocols: lists by RecBole's random split, ratings by AutoRec's.

The data may not be redistributed: the folder `ml-1m` is looked for below RECSPARK_DATA (default
`../shared/data`).

Lists: ratings of 3 and more, users and items with at least 10 each, a random tenth of each user's items for
the test, another tenth for validation, the rest to train on; every item that the user has in neither of
the other parts is ranked; NDCG@10 with binary gains over all users. Settings were chosen by the validation
part (`--set` and `--validation` below), the test part is scored once.

Ratings: a random tenth is the test; the error is the root of the mean square, predictions cut to [1, 5], 3
for a user or film without a rating in the training part.

    python -m benchmarks quality.movielens
    RECSPARK_ML=models=ease,multvae,seeds=3,part=validation python -m benchmarks quality.movielens
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from benchmarks import machine
from recspark import schema
from recspark.config import Train, load_config
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset, TrainingSet
from recspark.eval import metrics
from recspark.models import autorec, registry
from recspark.models.base import FitOptions
from recspark.models.encoder import encode
from recspark.models.neural import Job
from recspark.session import build_session
from recspark.testing import synth
from recspark.train.feed import plan_shards
from recspark.train.launch import launcher
from recspark.train.loop import LoopOptions, load_weights

# Reached by others under the same protocols (RecBole's and BARS's tables; Sedhain et al. 2015).
PUBLISHED = {"ease": 0.2865, "multvae": 0.2523, "als": 0.263, "autorec_rmse": 0.831}
SETTINGS: dict[str, dict[str, Any]] = {
    "popular": {"half_life_days": None},
    "item_knn": {"half_life_days": None, "n_neighbours": 200, "shrink": 50},
    "ease": {"half_life_days": None, "reg": 1000},
    "als": {"half_life_days": None, "embedding_size": 64, "reg": 0.1, "alpha": 2, "iterations": 10},
    "multvae": {
        "half_life_days": None, "hidden_size": 600, "latent_size": 128, "epochs": 100,
        "batch_size": 500, "learning_rate": 2e-3, "beta": 0.2, "dropout": 0.5,
    },
    "autorec": {
        "half_life_days": None, "hidden_size": 500, "epochs": 60, "unobserved": 0.2,
        "batch_size": 500, "learning_rate": 2e-3, "weight_decay": 1e-4,
    },
    "sdae": {
        "half_life_days": None, "hidden_sizes": [600, 200], "epochs": 60, "pretraining_epochs": 10,
        "batch_size": 500, "learning_rate": 2e-3, "corruption": 0.5,
    },
    "mf": {
        "half_life_days": None, "embedding_size": 64, "epochs": 30, "batch_size": 500,
        "learning_rate": 1e-2, "n_negatives": 500, "weight_decay": 1e-3,
    },
}  # fmt: skip
RATINGS = {
    "hidden_size": 500, "epochs": 150, "batch_size": 200, "learning_rate": 1e-3, "weight_decay": 2e-2,
    "unobserved": 0.0,
}  # fmt: skip
LONGEST = 4096  # films of a user, or users of a film
TRAIN = Train(ranks=2, threads=1, timeout_s=3000)  # type: ignore[call-arg]


def run(*, smoke: bool) -> None:
    """Print and write the tables."""
    folder = Path(os.environ.get("RECSPARK_DATA", "../shared/data")) / "ml-1m"
    if not folder.exists():
        print(f"no data at {folder}: set RECSPARK_DATA to the folder that holds ml-1m")
        return
    asked = dict(part.split("=") for part in os.environ.get("RECSPARK_ML", "").split(":") if part)
    models = asked.get("models", "popular,ease" if smoke else ",".join(SETTINGS)).split(",")
    seeds = range(1, int(asked.get("seeds", "1")) + 1)
    part = asked.get("part", "test")
    spark = build_session(load_config("local", ["spark.master=local[2]"]).spark, "movielens")
    ratings = pd.read_parquet(folder / "ratings.parquet")
    ratings = ratings[ratings["rating"] > 0]
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            split = Split(ratings, seed, scratch, spark)
            for name in models:
                if name != "autorec_rmse":
                    found = split.score(name, part)
                    figures.setdefault(name, []).append({"seed": seed, **found})
                    print(name, figures[name][-1], flush=True)
            if "autorec_rmse" in models or (len(models) == len(SETTINGS) and not smoke):
                found = rating_error(ratings, seed, scratch, spark, part)
                figures.setdefault("autorec_rmse", []).append({"seed": seed, **found})
                print("autorec_rmse", figures["autorec_rmse"][-1], flush=True)
    spark.stop()
    if not smoke and part == "test":
        command = "python -m benchmarks quality.movielens"
        about = {"settings": SETTINGS, "rating_settings": RATINGS, "published": PUBLISHED}
        machine.write("movielens", command, {**about, "figures": figures})


class Split:
    """RecBole's split of one seed, as data for models and as truth."""

    def __init__(self, ratings: pd.DataFrame, seed: int, scratch: str, spark: SparkSession) -> None:
        liked = core(ratings[ratings["rating"] >= 3], 10)
        self.user = np.unique(liked["user_id"], return_inverse=True)[1]
        self.item = np.unique(liked["movie_id"], return_inverse=True)[1]
        print(f"{len(liked):,} ratings, {self.user.max() + 1} users, {self.item.max() + 1} films")
        self.part = parts(self.user, seed)
        self.spark = spark
        train = self.part == 0
        n = int(train.sum())
        log = synth.Log(
            self.user[train], self.item[train].astype(np.int32), np.ones(n), np.ones(n, np.float32)
        )
        files = synth.write_training(
            log, f"{scratch}/bags-{seed}", "training_bags", n_files=8, length=LONGEST
        )
        data = synth.dataset(spark, log)
        self.data: Dataset = replace(data, training=files)
        self.seed, self.scratch = seed, scratch

    def score(self, name: str, part: str) -> dict[str, Any]:
        """Fit model `name` and score its lists on a part; the other parts' items are masked."""
        begun = time.perf_counter()
        options = FitOptions(
            train=TRAIN.model_copy(update={"seed": self.seed}),
            progress=lambda text: print(f"  {text}", flush=True),
        )
        model = registry.make(name, SETTINGS[name]).fit(self.data, options)
        fitted = time.perf_counter() - begun
        number = 1 if part == "validation" else 2
        rows = model.recommend(self.queries(number), 10).toArrow()
        listed: dict[int, list[int]] = {}
        for user, item in zip(rows["user_idx"].to_pylist(), rows["item_idx"].to_pylist()):
            listed.setdefault(user, []).append(item)
        mine = self.part == number
        truth = pd.Series(self.item[mine]).groupby(self.user[mine]).agg(set)
        n_users = np.bincount(self.item[self.part == 0], minlength=self.item.max() + 1)
        catalogue = metrics.Catalogue(
            np.arange(len(n_users), dtype=np.int32), np.maximum(n_users, 1)
        )
        block = metrics.Block.of(
            [listed.get(user, []) for user in truth.index], list(truth), catalogue
        )
        return {
            "ndcg@10": round(float(metrics.ndcg(block, 10).mean()), 4),
            "recall@10": round(float(metrics.recall(block, 10).mean()), 4),
            "hit_rate@10": round(float(metrics.hit_rate(block, 10).mean()), 4),
            "users": len(truth),
            "fit_seconds": round(fitted, 1),
        }

    def queries(self, number: int) -> DataFrame:
        """Return the queries: what was trained on, all parts but `number` masked."""
        masked = self.part < number
        seen = pd.Series(self.item[masked]).groupby(self.user[masked]).agg(lambda s: sorted(set(s)))
        frame = pa.table(
            {
                "user_idx": pa.array(seen.index, pa.int64()),
                "seen": pa.array(list(seen), pa.list_(pa.int32())),
            }
        )
        asked = synth.ask(self.data).drop("seen")
        return asked.join(self.spark.createDataFrame(frame), on="user_idx").select(
            *[F.col(name) for name in schema.QUERIES.names]
        )


def core(ratings: pd.DataFrame, least: int) -> pd.DataFrame:
    """Return the ratings left when users and items with fewer than `least` go, again and again."""
    while True:
        users = ratings["user_id"].map(ratings["user_id"].value_counts())
        items = ratings["movie_id"].map(ratings["movie_id"].value_counts())
        kept = (users >= least) & (items >= least)
        if kept.all():
            return ratings
        ratings = ratings[kept]


def parts(user: Array, seed: int) -> Array:
    """Return 0 (train), 1 (validation) or 2 (test) of each row: int(n / 10) of each user in both."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(user))
    order = shuffled[np.argsort(user[shuffled], kind="stable")]
    counts = np.bincount(user)
    place = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    tenth = np.repeat(counts // 10, counts)
    part = np.empty(len(user), np.int8)
    part[order] = np.where(place < tenth, 2, np.where(place < 2 * tenth, 1, 0))
    return part


def rating_error(
    ratings: pd.DataFrame, seed: int, scratch: str, spark: SparkSession, part: str
) -> dict[str, Any]:
    """Train item-based AutoRec: a row is a film, its entries are users' ratings."""
    rng = np.random.default_rng(seed)
    users, user = np.unique(ratings["user_id"], return_inverse=True)
    films, film = np.unique(ratings["movie_id"], return_inverse=True)
    value = ratings["rating"].to_numpy(np.float32)
    drawn = rng.random(len(value))
    held = drawn < 0.1
    if part == "validation":  # the test stays out of everything
        user, film, value = user[~held], film[~held], value[~held]
        held = rng.random(len(value)) < 0.1
    begun = time.perf_counter()
    rows = bags(film[~held], user[~held], value[~held], len(films))
    files: TrainingSet = synth.write_files(rows, f"{scratch}/films-{seed}-{part}", "films", 8)
    settings = autorec.AutoRecSettings(**RATINGS)
    loop = LoopOptions(
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        seed=seed,
    )
    vocabulary = np.arange(len(users), dtype=np.int32)
    job = Job(settings, vocabulary, plan_shards(files, TRAIN.ranks), None, loop)
    trained = launcher(spark, TRAIN, tell=lambda text: print(f"  {text}", flush=True)).run(
        autorec.train_rank, job
    )
    net = autorec.make_net(settings, len(users), seed)
    load_weights(net, trained[0].value)
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    order = np.lexsort((user[~held], film[~held]))
    start = np.concatenate([[0], np.cumsum(np.bincount(film[~held], minlength=len(films)))])
    hidden = encode(
        start, user[~held][order].astype(np.int32), value[~held][order], arrays, autorec.LAYERS, unit=False
    )  # fmt: skip
    guess = (hidden[film[held]] * arrays["items_out"][user[held]]).sum(axis=1)
    guess = np.clip(guess + arrays["items_out_bias"][user[held]], 1, 5)
    known = np.isin(user[held], user[~held]) & np.isin(film[held], film[~held])
    error = np.where(known, guess, 3) - value[held]
    return {
        "rmse": round(float(np.sqrt((error**2).mean())), 4),
        "mae": round(float(np.abs(error).mean()), 4),
        "ratings": int(held.sum()),
        "fit_seconds": round(time.perf_counter() - begun, 1),
        "torch": torch.__version__,
    }


def bags(row: Array, item: Array, value: Array, n_rows: int) -> pa.Table:
    """Return `items` and `weights` lists, padded to the longest, of each row with an entry."""
    order = np.lexsort((item, row))
    counts = np.bincount(row, minlength=n_rows)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    items = np.full((n_rows, counts.max()), -1, np.int32)
    values = np.zeros(items.shape, np.float32)
    items[row[order], place] = item[order]
    values[row[order], place] = value[order]
    kept = counts > 0
    return pa.table(
        {
            "items": pa.array(list(items[kept]), pa.list_(pa.int32())),
            "weights": pa.array(list(values[kept]), pa.list_(pa.float32())),
        }
    )

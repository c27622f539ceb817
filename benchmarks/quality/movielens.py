"""MovieLens 1M by published protocols: lists by RecBole's random split, ratings by AutoRec's.

The data may not be redistributed: the folder `ml-1m` is looked for below RECSPARK_DATA (default
`../shared/data`).

Lists: ratings of 3 and more, users and items with at least 10 each, a random tenth of each user's items for
the test, another tenth for validation, the rest to train on; every item that the user has in neither of
the other parts is ranked; NDCG@10 with binary gains over all users. Settings were chosen by the validation
part, the test part is scored once.

Ratings: a random tenth is the test; the error is the root of the mean square, predictions cut to [1, 5], 3
for a user or film without a rating in the training part.

    python -m benchmarks quality.movielens
    RECSPARK_ML=models=ease,multvae:seeds=3:part=validation python -m benchmarks quality.movielens
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import SparkSession

from benchmarks.quality import ml1m
from benchmarks.quality.ml1m import Asked, Question, Table
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset, TrainingSet
from recspark.models.autoencoders import autorec
from recspark.models.autoencoders.autoencoder import encode
from recspark.models.neural import Job
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
        "half_life_days": None, "hidden_size": 600, "latent_size": 128, "epochs": 60,
        "batch_size": 500, "learning_rate": 2e-3, "beta": 0.5, "dropout": 0.5,
    },
    "autorec": {
        "half_life_days": None, "hidden_size": 200, "epochs": 40, "unobserved": 0.2,
        "batch_size": 250, "learning_rate": 2e-3, "weight_decay": 1e-2, "input_dropout": 0.5,
    },
    "sdae": {
        "half_life_days": None, "hidden_sizes": [600, 200], "epochs": 20, "pretraining_epochs": 5,
        "batch_size": 500, "learning_rate": 2e-3, "corruption": 0.5,
    },
    "mf": {
        "half_life_days": None, "embedding_size": 64, "epochs": 30, "batch_size": 500,
        "learning_rate": 3e-2, "n_negatives": 5000, "weight_decay": 1e-2,
    },
}  # fmt: skip
RATINGS = {
    "hidden_size": 500, "epochs": 50, "batch_size": 50, "learning_rate": 1e-3, "weight_decay": 0.1,
    "unobserved": 0.0,
}  # fmt: skip


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    ratings = ml1m.ratings()
    if ratings is None:
        return
    asked = Asked.of(("popular", "ease") if smoke else (*SETTINGS, "autorec_rmse"), smoke=smoke)
    ratings = ratings[ratings["rating"] > 0]
    if smoke:
        ratings = ratings[ratings["user_id"] <= 300]
    table = Table("movielens", {"protocol": __doc__, "published": PUBLISHED}, asked)
    with asked.session("movielens") as (spark, scratch):
        for seed in asked.seeds:
            lists = [row for row in asked.models if row != "autorec_rmse"]
            if lists:
                split = Split(ratings, seed, f"{scratch}/bags-{seed}", spark, asked.part)
            for row in lists:
                settings = asked.settings(row, SETTINGS[row])
                table.add(row, row, settings, split.data, {"masked": split.question}, seed)
            if "autorec_rmse" in asked.models:
                table.write(
                    "autorec_rmse", seed, rating_error(ratings, seed, scratch, spark, asked)
                )


class Split:
    """RecBole's split of one seed, as data for models and as a question.

    The items of the other part are masked; models see those of the training part.
    """

    def __init__(
        self, ratings: pd.DataFrame, seed: int, folder: str, spark: SparkSession, part: str
    ) -> None:
        liked = ml1m.core(ratings[ratings["rating"] >= 3], 10)
        user = np.unique(liked["user_id"], return_inverse=True)[1]
        item = np.unique(liked["movie_id"], return_inverse=True)[1].astype(np.int32)
        print(f"{len(liked):,} ratings, {user.max() + 1} users, {item.max() + 1} films")
        of_part = parts(user, seed)
        train = of_part == 0
        n = int(train.sum())
        log = synth.Log(user[train], item[train], np.ones(n), np.ones(n, np.float32))
        files = synth.write_training(
            log, folder, "training_bags", 8, np.bincount(log.user_idx).max()
        )
        self.data: Dataset = replace(ml1m.dataset(spark, log), training={files.table: files})
        self.train = log
        number = 1 if part == "validation" else 2
        masked = np.flatnonzero(of_part < number)
        masked = masked[np.lexsort((item[masked], user[masked]))]
        self.masked = user[masked], item[masked]
        mine = of_part == number
        queries = ml1m.with_seen(
            synth.ask(self.data), user[masked], item[masked], f"{folder}-seen-{part}"
        )
        self.question = Question(queries, user[mine], item[mine])


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
    ratings: pd.DataFrame, seed: int, scratch: str, spark: SparkSession, asked: Asked
) -> dict[str, Any]:
    """Train item-based AutoRec: a row is a film, its entries are users' ratings."""
    rng = np.random.default_rng(seed)
    users, user = np.unique(ratings["user_id"], return_inverse=True)
    films, film = np.unique(ratings["movie_id"], return_inverse=True)
    value = ratings["rating"].to_numpy(np.float32)
    drawn = rng.random(len(value))
    held = drawn < 0.1
    if asked.part == "validation":  # the test stays out of everything
        user, film, value = user[~held], film[~held], value[~held]
        held = rng.random(len(value)) < 0.1
    begun = time.perf_counter()
    rows = bags(film[~held], user[~held], value[~held], len(films))
    files: TrainingSet = synth.write_files(rows, f"{scratch}/films-{seed}-{asked.part}", "films", 8)
    settings = autorec.AutoRecSettings(**asked.settings("autorec_rmse", RATINGS))
    loop = LoopOptions(
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        seed=seed,
    )
    vocabulary = np.arange(len(users), dtype=np.int32)
    train = asked.train.model_copy(update={"seed": seed})
    job = Job(settings, vocabulary, plan_shards(files, asked.ranks), None, loop)
    trained = launcher(spark, train, tell=lambda text: print(f"  {text}", flush=True)).run(
        autorec.train_rank, job
    )
    net = autorec.make_net(settings, len(users), seed)
    load_weights(net, trained[0].value)
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    order = np.lexsort((user[~held], film[~held]))
    start = np.concatenate([[0], np.cumsum(np.bincount(film[~held], minlength=len(films)))])
    hidden = encode(
        start, user[~held][order].astype(np.int32), value[~held][order], arrays, autorec.layers_of(settings), unit=False
    )  # fmt: skip
    guess = (hidden[film[held]] * arrays["items_out"][user[held]]).sum(axis=1)
    guess = np.clip(guess + arrays["items_out_bias"][user[held]], 1, 5)
    known = np.isin(user[held], user[~held]) & np.isin(film[held], film[~held])
    error = np.where(known, guess, 3) - value[held]
    return {
        "settings": settings.model_dump(),
        "rmse": round(float(np.sqrt((error**2).mean())), 4),
        "mae": round(float(np.abs(error).mean()), 4),
        "ratings": int(held.sum()),
        "fit_seconds": round(time.perf_counter() - begun, 1),
        "epochs": len(trained[0].value.curve.epochs),
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

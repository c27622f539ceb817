"""Top-N: our kernel, seen items masked, against MLlib's `recommendForAllUsers`, which cannot mask."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from pyspark.ml.recommendation import ALS
from pyspark.sql import functions as F

from benchmarks import machine
from recspark.config import load_config
from recspark.data.blocks import Array, QueryBlock
from recspark.models import topk
from recspark.session import build_session


class Factors:
    """Scores of given user factors: row u of `users` belongs to user_idx u."""

    def __init__(self, users: Array, items: Array) -> None:
        self.users, self.items = users, items

    def score(self, block: QueryBlock) -> topk.Scores:
        known = np.ones(len(block), bool)
        return topk.DotScores(self.users[block.user_idx], self.items, None, known)


def run(*, smoke: bool) -> None:
    """Time both on the same factors, cores and threads; the first run of each warms up."""
    n_users, n_items, rank, k = (2_000, 1_000, 16, 20) if smoke else (20_000, 10_000, 64, 100)
    spark = build_session(load_config("local", ["spark.master=local[2]"]).spark, "benchmark topn")
    ratings = spark.range(n_users * 20).select(
        (F.col("id") % n_users).cast("int").alias("user"),
        F.pmod(F.xxhash64("id"), F.lit(n_items)).cast("int").alias("item"),
        F.lit(1.0).cast("float").alias("rating"),
    )
    als = ALS(rank=rank, maxIter=1, seed=1, implicitPrefs=True, userCol="user", itemCol="item")
    model = als.fit(ratings.dropDuplicates(["user", "item"]))
    users, items = (
        matrix(model.userFactors, n_users, rank),
        matrix(model.itemFactors, n_items, rank),
    )
    queries = spark.range(n_users).selectExpr(
        "id AS user_idx",
        "CAST(NULL AS array<struct<item_idx:int,event_at:timestamp,event_type:string,weight:float,value:float,"
        "session_id:string,order_id:string>>) AS history",
        "CAST(array() AS array<struct<item_idx:int,weight:float>>) AS pairs",
        f"transform(sequence(0, 49), x -> CAST(pmod(xxhash64(id, x), {n_items}) AS int)) AS seen",
    ).repartition(8).cache()  # fmt: skip
    queries.count()
    vocabulary = np.arange(n_items, dtype=np.int32)
    ours = best_of(lambda: topk.recommend(queries, vocabulary, Factors(users, items), k))
    theirs = best_of(lambda: model.recommendForAllUsers(k))
    figures = {
        "users": n_users, "items": n_items, "rank": rank, "k": k, "seen_per_user": 50, "threads": 2,
        "ours_seconds": ours, "mllib_seconds": theirs, "ratio": theirs / ours,
    }  # fmt: skip
    print(f"ours {ours:.2f} s, MLlib {theirs:.2f} s, {theirs / ours:.1f} times faster")
    spark.stop()
    if not smoke:
        machine.write("topn", "python -m benchmarks topn", figures)


def matrix(factors: Any, n: int, rank: int) -> Array:
    """Return MLlib's factors as float32 (n, rank)."""
    out = np.zeros((n, rank), np.float32)
    for row in factors.collect():
        out[row["id"]] = row["features"]
    return out


def best_of(make: Any, times: int = 3) -> float:
    """Return the shortest of a few runs, seconds."""
    seconds = []
    for _ in range(times):
        begun = time.perf_counter()
        make().write.format("noop").mode("overwrite").save()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)

"""Top-N: our engine, seen items masked, against MLlib's `recommendForAllUsers`, which cannot mask
(made for an eighth of the users, by `recommendForUserSubset`, which is the same code: times 8).

The same factors, cores and threads for all: also `implicit.cpu.topk` in one process, which masks. A
sample of our lists is compared with a float64 brute force.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from pyspark.ml.recommendation import ALS, ALSModel
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from scipy import sparse

from benchmarks import machine, plot
from benchmarks.memory import PeakMemory
from recspark import schema
from recspark.data.blocks import Array, QueryBlock
from recspark.models.scoring import topk

N_SEEN = 50


@dataclass(frozen=True)
class Size:
    """Lists of k of `items` for each of `users`."""

    users: int = 100_000
    items: int = 20_000
    rank: int = 64
    k: int = 100
    threads: int = 2
    partitions: int = 8


class Factors:
    """Scores of given user factors: row u of `users` belongs to user_idx u."""

    def __init__(self, users: Array, items: Array) -> None:
        self.users, self.items = users, items

    def score(self, block: QueryBlock) -> topk.Scores:
        known = np.ones(len(block), bool)
        return topk.DotScores(self.users[block.user_idx], self.items, None, known)


def run(*, smoke: bool) -> None:
    """Time all on the same factors; the first run of each warms up. About ten minutes."""
    size = Size(2_000, 1_000, 16, 20, partitions=2) if smoke else Size()
    part = replace(size, users=size.users // 4)
    curves: dict[str, tuple[str, dict[float, float]]] = {
        "seconds by users": ("thousand users", {}),
        "seconds by partitions": ("partitions", {}),
        "seconds by cores": ("cores", {}),
    }
    by_users, by_partitions, by_cores = (points for _, points in curves.values())
    with session(size, smoke=smoke) as spark:
        model = fitted(spark, size)
        users = matrix(model.userFactors, size.users, size.rank)
        items = matrix(model.itemFactors, size.items, size.rank)
        seen = rows_seen(spark, size)
        noop(ours(spark, replace(size, users=size.users // 20), users, items))  # warms up
        found = {
            "ours": timed(lambda: ours(spark, size, users, items), 1 if smoke else 3),
            "implicit": one_process(size, users, items, seen, 1 if smoke else 3),
        }
        wrong = differs(spark, size, users, items, seen)
        noop(model.recommendForUserSubset(spark.range(200).toDF("user"), size.k))  # warms up
        asked = spark.range(size.users // 8).toDF("user")
        found["mllib"] = timed(lambda: model.recommendForUserSubset(asked, size.k), 1)
        for name in ("seconds", "cpu_seconds"):  # it takes every user's scores one by one
            found["mllib"][name] *= 8
        found["mllib"]["measured_on"] = f"{size.users // 8:,} users, times 8"
        found["ours_again"] = timed(lambda: ours(spark, size, users, items), 1)
        for share in (16, 4):
            smaller = replace(size, users=size.users // share)
            by_users[smaller.users / 1000] = seconds_of(spark, smaller, users, items)
        by_users[size.users / 1000] = found["ours"]["seconds"]
        for n in (1, 2, 4, 16):
            by_partitions[n] = seconds_of(spark, replace(part, partitions=n), users, items)
        by_cores[2] = seconds_of(spark, part, users, items)
    single = replace(part, threads=1)
    with session(single, smoke=smoke) as spark:
        noop(ours(spark, replace(single, users=size.users // 20), users, items))  # warms up
        by_cores[1] = seconds_of(spark, single, users, items)
    best = min(found["ours"]["seconds"], found["ours_again"]["seconds"])
    ratios = {
        "mllib_seconds_to_ours": found["mllib"]["seconds"] / best,
        "mllib_cpu_seconds_to_ours": found["mllib"]["cpu_seconds"] / found["ours"]["cpu_seconds"],
        "ours_seconds_to_implicit": best / found["implicit"]["seconds"],
        "ours_cpu_seconds_to_implicit": found["ours"]["cpu_seconds"]
        / found["implicit"]["cpu_seconds"],
        "lists_that_differ_from_brute_force": wrong,
    }
    for name, figures in found.items():
        print(name, figures)
    print(ratios, by_users, by_partitions, by_cores)
    if wrong:
        raise AssertionError(f"{wrong} lists differ from a float64 brute force")
    if not smoke:
        sizes = {**asdict(size), "seen_per_user": N_SEEN}
        scaling = {panel: points for panel, (_, points) in curves.items()}
        machine.write(
            "topn",
            "python -m benchmarks topn",
            {"sizes": sizes, **found, **ratios, "scaling": scaling},
        )
        title = f"Top {size.k} of {size.items:,} items for {size.users:,} users, rank {size.rank}, 2 cores"
        bars = {
            "recspark, seen masked": best,
            "implicit.cpu.topk, seen masked": found["implicit"]["seconds"],
            "MLlib, cannot mask": found["mllib"]["seconds"],
        }
        plot.draw("topn", title, bars, curves)


def session(size: Size, *, smoke: bool) -> AbstractContextManager[SparkSession]:
    """A session whose JVM has its second compiler, which `local` leaves out and MLlib needs."""
    settings = [f"master=local[{size.threads}]", "driver_memory=4g"]
    return machine.session("topn", settings, {"spark.driver.extraJavaOptions": "-ea"}, smoke=smoke)


def fitted(spark: SparkSession, size: Size) -> ALSModel:
    """MLlib's model of random interactions: its factors are what all of them take."""
    ratings = spark.range(size.users * 5).select(
        (F.col("id") % size.users).cast("int").alias("user"),
        F.pmod(F.xxhash64("id"), F.lit(size.items)).cast("int").alias("item"),
        F.lit(1.0).cast("float").alias("rating"),
    )
    als = ALS(rank=size.rank, maxIter=1, seed=1, implicitPrefs=True, userCol="user", itemCol="item")
    return als.fit(ratings.dropDuplicates(["user", "item"]))


def queries(spark: SparkSession, size: Size) -> DataFrame:
    return (
        spark.range(size.users)
        .selectExpr(
            "id AS user_idx",
            f"CAST(NULL AS {schema.HISTORY.simpleString()}) AS history",
            f"transform(sequence(0, {N_SEEN - 1}), x -> "
            f"CAST(pmod(xxhash64(id, x), {size.items}) AS int)) AS seen",
        )
        .repartition(size.partitions, "user_idx")
    )


def ours(spark: SparkSession, size: Size, users: Array, items: Array) -> DataFrame:
    vocabulary = np.arange(size.items, dtype=np.int32)
    return topk.recommend(queries(spark, size), vocabulary, Factors(users, items), size.k)


def seconds_of(spark: SparkSession, size: Size, users: Array, items: Array) -> float:
    return float(timed(lambda: ours(spark, size, users, items), 1)["seconds"])


def rows_seen(spark: SparkSession, size: Size) -> sparse.csr_matrix:
    """The seen items as a matrix, for those who want one."""
    table = queries(spark, size).select("user_idx", "seen").toArrow().sort_by("user_idx")
    item = table["seen"].combine_chunks().flatten().to_numpy()
    start = np.arange(size.users + 1, dtype=np.int32) * N_SEEN
    out = sparse.csr_matrix(
        (np.ones(len(item), np.float32), item.astype(np.int32), start),
        shape=(size.users, size.items),
    )
    out.sum_duplicates()
    return out


def one_process(
    size: Size, users: Array, items: Array, seen: sparse.csr_matrix, times: int
) -> dict[str, Any]:
    from implicit.cpu.topk import topk as find

    return timed_call(
        lambda: find(items, users, size.k, filter_query_items=seen, num_threads=size.threads), times
    )


def differs(
    spark: SparkSession, size: Size, users: Array, items: Array, seen: sparse.csr_matrix
) -> int:
    """How many of 200 users' lists are not those of a float64 brute force, ties by the smaller item."""
    step = size.users // 200
    lists = ours(spark, size, users, items).where(F.col("user_idx") % step == 0).toArrow()
    found = lists.sort_by([("user_idx", "ascending"), ("rank", "ascending")])
    user = found["user_idx"].to_numpy()
    item, score = found["item_idx"].to_numpy(), found["score"].to_numpy()
    wrong = 0
    for asked in range(0, size.users, step):
        exact = (items.astype(np.float64) @ users[asked].astype(np.float64)).astype(np.float32)
        open_ = np.setdiff1d(np.arange(size.items), seen[asked].indices)
        want = open_[np.lexsort((open_, -exact[open_]))][: size.k]
        mine = user == asked
        wrong += not (np.array_equal(item[mine], want) and np.array_equal(score[mine], exact[want]))
    return wrong


def matrix(factors: DataFrame, n: int, rank: int) -> Array:
    """Return MLlib's factors as float32 (n, rank)."""
    table = factors.toArrow()
    out = np.zeros((n, rank), np.float32)
    out[table["id"].to_numpy()] = np.stack(table["features"].to_numpy())
    return out


def noop(frame: DataFrame) -> None:
    frame.write.format("noop").mode("overwrite").save()


def timed(make: Callable[[], DataFrame], times: int) -> dict[str, Any]:
    return timed_call(lambda: noop(make()), times)


def timed_call(work: Callable[[], Any], times: int) -> dict[str, Any]:
    """Return the shortest of a few runs, seconds, and the most memory held."""
    seconds = []
    with PeakMemory() as memory:
        for _ in range(times):
            begun = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - begun)
    return {
        "seconds": min(seconds), "all": seconds, "cpu_seconds": memory.cpu_seconds / times,
        **memory.megabytes, "load": os.getloadavg()[0],
    }  # fmt: skip

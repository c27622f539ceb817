"""ALS: our blocked engine against Spark MLlib's ALS and `implicit`, same cores, rank and iterations.

`python -m benchmarks.als --interactions 20_000_000 --users 100_000 --items 20_000 --rank 128
--driver-memory 8g` runs the size of the target; without options it takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pyspark.ml.recommendation import ALS
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from benchmarks import machine, plot
from benchmarks.memory import PeakMemory, cpu_seconds
from recspark.data.blocks import Array
from recspark.engines.als import BlockedAls, Plan
from recspark.engines.als_objective import Objective, loss

_GROUPS = 16  # tastes; four events in five fall into the user's own
_CHECKPOINT_EVERY = 4  # iterations of MLlib's
_SCHEMA = "user bigint, items array<int>, weights array<float>"


@dataclass(frozen=True)
class Size:
    """What is fitted. `interactions` are drawn; repeats of a user's item make one."""

    interactions: int = 2_000_000
    users: int = 40_000
    items: int = 10_000
    rank: int = 64
    iterations: int = 10
    blocks: int = 4
    threads: int = 2
    reg: float = 0.01
    alpha: float = 5.0
    seed: int = 1
    driver_memory: str = "4g"
    mllib_iterations: int = 0  # 0 = as the others


def run(*, smoke: bool) -> None:
    """Run the default size, or a tiny one."""
    size = Size(20_000, 400, 200, 8, 2, blocks=2) if smoke else Size()
    compare(size, smoke=smoke)
    if not smoke:
        curves(size)


def compare(size: Size, *, smoke: bool) -> None:
    """Fit all three, score their factors by one function, write the figures if not in smoke mode."""
    with session(size, smoke=smoke) as spark, tempfile.TemporaryDirectory() as folder:
        interactions(spark, size).write.parquet(f"{folder}/pairs")
        pairs = spark.read.parquet(f"{folder}/pairs")
        by_row = pairs.select(
            "user", F.explode(F.arrays_zip("items", "weights")).alias("p")
        ).select(
            F.col("user").cast("int"),
            F.col("p.items").alias("item"),
            F.col("p.weights").alias("rating"),
        )
        by_row.write.parquet(f"{folder}/ratings")
        rows = collect(pairs)
        print(f"{len(rows[1]):,} interactions of {size.users:,} users and {size.items:,} items")
        scaled, flat = (
            Objective(size.reg, size.alpha),
            Objective(20 * size.reg, size.alpha, 1.0, 0.0),
        )
        if not smoke:  # compile, start the workers
            tiny = replace(size, interactions=2_000, users=100, items=50, iterations=1)
            blocked(interactions(spark, tiny), tiny, scaled)
        found = {
            "ours": measure(lambda: blocked(pairs, size, scaled), rows, scaled),
            "mllib": measure(
                lambda: mllib(spark.read.parquet(f"{folder}/ratings"), size), rows, scaled
            ),
            "ours_flat": measure(lambda: blocked(pairs, size, flat), rows, flat),
        }
    found["implicit_flat"] = measure(lambda: one_process(rows, size, flat), rows, flat)
    ratios = compared(found, size)
    for name, figures in found.items():
        print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()})
    print(ratios)
    if not smoke:
        sizes = {**asdict(size), "distinct_interactions": len(rows[1])}
        command = "python -m benchmarks.als " + " ".join(
            f"--{name.replace('_', '-')} {value}" for name, value in asdict(size).items()
        )
        name = f"als_{len(rows[1]) / 1e6:.0f}m_rank_{size.rank}"
        machine.write(name, command, {"sizes": sizes, **found, **ratios})


def curves(size: Size) -> None:
    """Measure how ours grows with data, blocks and cores; write the figures and draw all."""
    found: dict[str, dict[float, float]] = {"interactions": {}, "blocks": {}, "cores": {}}
    short = replace(size, iterations=3)
    with session(size) as spark:
        blocked(interactions(spark, replace(short, interactions=20_000)), short, Objective(0.1))
        for times in (1, 4, 16):
            part = replace(
                short, interactions=size.interactions * times // 4, users=size.users * times // 4
            )
            found["interactions"][part.interactions / 1e6] = iteration_of(spark, part)
        for n in (1, 2, 4, 16):
            found["blocks"][n] = iteration_of(spark, replace(short, blocks=n))
        found["cores"][2] = found["blocks"][size.blocks]
    single = replace(short, threads=1)
    with session(single) as spark:
        blocked(interactions(spark, replace(single, interactions=20_000)), single, Objective(0.1))
        found["cores"][1] = iteration_of(spark, single)
    print(found)
    machine.write("als_scaling", "python -m benchmarks als", {"sizes": asdict(size), **found})
    large = json.loads((machine.RESULTS / "als_20m_rank_128.json").read_text())
    ten = large["cpu_seconds_of_ten_iterations"]
    bars = {
        "recspark, scaled reg": ten["ours"], "recspark, flat reg": ten["ours_flat"],
        "implicit, flat reg": ten["implicit_flat"], "MLlib, scaled reg": ten["mllib"],
    }  # fmt: skip
    title = "ALS, 19.7 M interactions, rank 128: CPU seconds of ten iterations; right: seconds of one at rank 64"
    panels = {
        "seconds by data": ("million interactions", found["interactions"]),
        "seconds by blocks": ("blocks", found["blocks"]),
        "seconds by cores": ("cores", found["cores"]),
    }
    plot.draw("als", title, bars, panels, "CPU seconds")


def iteration_of(spark: SparkSession, size: Size) -> float:
    """Ours: the median seconds of an iteration."""
    with tempfile.TemporaryDirectory() as folder:
        interactions(spark, size).write.parquet(f"{folder}/pairs")
        pairs = spark.read.parquet(f"{folder}/pairs")
        return float(blocked(pairs, size, Objective(size.reg, size.alpha))[2]["iteration_seconds"])


def session(size: Size, *, smoke: bool = False) -> AbstractContextManager[SparkSession]:
    """A session whose JVM has its second compiler, which `local` leaves out and MLlib needs."""
    settings = [f"master=local[{size.threads}]", f"driver_memory={size.driver_memory}"]
    return machine.session("als", settings, {"spark.driver.extraJavaOptions": "-ea"}, smoke=smoke)


def compared(found: dict[str, dict[str, Any]], size: Size) -> dict[str, Any]:
    """Return the ratios that targets are set for: times of ten iterations, set-up and ten times one.

    Losses are compared after as many iterations as MLlib made.
    """
    made = size.mllib_iterations or size.iterations

    def of_ten(name: str, kind: str) -> float:
        return float(found[name][f"set_up_{kind}"] + 10 * found[name][f"iteration_{kind}"])

    out: dict[str, Any] = {}
    for kind in ("seconds", "cpu_seconds"):
        out |= {
            f"{kind}_of_ten_iterations": {name: of_ten(name, kind) for name in found},
            f"mllib_{kind}_to_ours": of_ten("mllib", kind) / of_ten("ours", kind),
            f"ours_{kind}_to_implicit": of_ten("ours_flat", kind) / of_ten("implicit_flat", kind),
            f"ours_iteration_{kind}_to_implicit": found["ours_flat"][f"iteration_{kind}"]
            / found["implicit_flat"][f"iteration_{kind}"],
        }
    return out | {
        "loss_compared_to_mllib_after": made,
        "loss_to_mllib": found["ours"]["losses"][made - 1] / found["mllib"]["loss"],
        "loss_to_implicit": found["ours_flat"]["loss"] / found["implicit_flat"]["loss"],
    }


def blocked(
    pairs: DataFrame, size: Size, objective: Objective
) -> tuple[Array, Array, dict[str, Any]]:
    """Ours: (users by id, items, figures)."""
    clock = Clock()
    plan = Plan(size.rank, size.iterations, size.blocks, size.seed, progress=clock.tick)
    with BlockedAls(pairs, size.items, objective, plan) as als:
        clock.tick()
        als.run()
        items = als.item_factors()
        seconds = clock.now()[0]
        users = np.zeros((size.users, size.rank), np.float32)
        for ids, x in als.user_factors().toLocalIterator():
            users[ids] = x
    return users, items, {
        "seconds": seconds,
        **clock.figures(),
        "reported_loss": als.losses[-1],
        "losses": als.losses,
    }  # fmt: skip


def mllib(ratings: DataFrame, size: Size) -> tuple[Array, Array, dict[str, Any]]:
    """Spark MLlib's. Without checkpoints its lineage overflows the stack after some iterations."""
    spark = ratings.sparkSession
    als = ALS(
        rank=size.rank, maxIter=size.mllib_iterations or size.iterations, regParam=size.reg,
        alpha=size.alpha, seed=size.seed, implicitPrefs=True, numUserBlocks=size.blocks,
        numItemBlocks=size.blocks, checkpointInterval=_CHECKPOINT_EVERY,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, JobStarts(spark) as jobs:
        spark.sparkContext.setCheckpointDir(folder)
        model = als.fit(ratings)
        ended = jobs.clock.now()
        ticks = [*jobs.clock.ticks, ended]
        factors = []
        for frame, n in ((model.userFactors, size.users), (model.itemFactors, size.items)):
            table = frame.toArrow()
            out = np.zeros((n, size.rank), np.float32)
            out[table["id"].to_numpy()] = np.stack(table["features"].to_numpy())
            factors.append(out)
            frame.unpersist()
    return factors[0], factors[1], of_jobs(ticks, als.getMaxIter())


def of_jobs(ticks: list[tuple[float, float]], iterations: int) -> dict[str, float]:
    """Return MLlib's set-up and iteration from when its jobs began, and the end of the last.

    Every half-step is one job but the last, which is the first of two counts; a checkpoint is one
    more. So the first half-step began with the job 2 n + 1 + checkpoints before the end.
    """
    jobs = 2 * iterations + 1 + iterations // _CHECKPOINT_EVERY
    begun, ended = ticks[-1 - jobs], ticks[-1]
    out = {"seconds": ended[0]}
    for name, of in (("seconds", 0), ("cpu_seconds", 1)):
        out[f"set_up_{name}"] = begun[of]
        out[f"iteration_{name}"] = (ended[of] - begun[of]) / iterations
    return out


def one_process(
    rows: tuple[Array, Array, Array], size: Size, objective: Objective
) -> tuple[Array, Array, dict[str, Any]]:
    """`implicit`'s; its weights are the confidences."""
    from implicit.cpu.als import AlternatingLeastSquares
    from scipy import sparse

    start, at, weight = rows
    confidence = sparse.csr_matrix(
        (1 + size.alpha * weight, at.copy(), start), shape=(size.users, size.items)
    )
    als = AlternatingLeastSquares(
        factors=size.rank, regularization=objective.reg, alpha=1.0, iterations=size.iterations,
        num_threads=size.threads, random_state=size.seed,
    )  # fmt: skip
    clock = Clock()
    als.fit(confidence, show_progress=False)
    seconds, cpu = clock.now()
    n = size.iterations
    return als.user_factors, als.item_factors, {
        "seconds": seconds, "set_up_seconds": 0.0, "set_up_cpu_seconds": 0.0,
        "iteration_seconds": seconds / n, "iteration_cpu_seconds": cpu / n,
    }  # fmt: skip


def measure(
    fit: Callable[[], tuple[Array, Array, dict[str, Any]]],
    rows: tuple[Array, Array, Array],
    objective: Objective,
) -> dict[str, Any]:
    """Run one fit; add its loss in float64, and the most memory that all processes held."""
    with PeakMemory() as memory:
        users, items, figures = fit()
    score = loss(*rows, users, items, objective)
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}, flush=True)
    more = {"fit_cpu_seconds": memory.cpu_seconds, "load": os.getloadavg()[0]}
    return {**figures, "loss": score, **memory.megabytes, **more}


class Clock:
    """Seconds and CPU seconds from its making to each tick: set-up, then iterations."""

    def __init__(self) -> None:
        self._begun = (0.0, 0.0)
        self._begun = self.now()
        self.ticks: list[tuple[float, float]] = []

    def now(self) -> tuple[float, float]:
        seconds, cpu = time.perf_counter(), cpu_seconds()
        return seconds - self._begun[0], cpu - self._begun[1]

    def tick(self, _text: str = "") -> None:
        self.ticks.append(self.now())

    def figures(self) -> dict[str, Any]:
        """Return the first tick, and the median step from each to the next."""
        out: dict[str, Any] = {}
        for name, of in (("seconds", 0), ("cpu_seconds", 1)):
            at = [tick[of] for tick in self.ticks]
            out[f"set_up_{name}"] = at[0]
            out[f"iteration_{name}"] = float(np.median(np.diff(at)))
        return out


class JobStarts:
    """A tick of a clock for every Spark job that begins while inside; looked at ten times a second."""

    def __init__(self, spark: SparkSession) -> None:
        self._tracker, self._ended = spark.sparkContext.statusTracker(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self.clock, self._known = Clock(), set(self._ids())
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            new = set(self._ids()) - self._known
            self._known |= new
            for _ in new:
                self.clock.tick()

    def _ids(self) -> list[int]:
        return list(self._tracker.getJobIdsForGroup(None))  # those that ended, too


def interactions(spark: SparkSession, size: Size) -> DataFrame:
    """A row a user: distinct items whose popularity falls as a power, mostly of the user's taste.

    Made on the executors, from the seed and the user's number.
    """
    per_user, n_items, seed = size.interactions / size.users, size.items, size.seed

    def make(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            user = batch.column("id").to_numpy()
            rng = np.random.default_rng([seed, int(user[0])])
            lengths = np.clip(rng.lognormal(-0.5, 1, len(user)) * per_user, 1, n_items / 4).astype(
                int
            )
            row = np.repeat(np.arange(len(user)), lengths)
            taste = np.where(
                rng.random(len(row)) < 0.8, user[row], rng.integers(0, _GROUPS, len(row))
            )
            place = (n_items // _GROUPS * rng.random(len(row)) ** 2.5).astype(np.int64)
            item = place * _GROUPS + taste % _GROUPS
            key, times = np.unique(row * n_items + item, return_counts=True)
            start = np.searchsorted(key, np.arange(len(user) + 1) * n_items)
            offsets = pa.array(start, pa.int32())
            columns = [(key % n_items).astype(np.int32), np.minimum(times, 5).astype(np.float32)]
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column("id"),
                    *[pa.ListArray.from_arrays(offsets, pa.array(c)) for c in columns],
                ],
                names=["user", "items", "weights"],
            )

    return spark.range(0, size.users, 1, 4 * size.threads).mapInArrow(make, _SCHEMA)


def collect(pairs: DataFrame) -> tuple[Array, Array, Array]:
    """All interactions as (start, item, weight), users in order: for `implicit` and the loss."""
    table = pairs.toArrow().sort_by("user").combine_chunks()
    items, weights = table["items"].combine_chunks(), table["weights"].combine_chunks()
    start = np.concatenate([[0], np.cumsum(items.value_lengths().to_numpy())])
    return start, items.flatten().to_numpy(), weights.flatten().to_numpy()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.als", description=__doc__)
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    compare(Size(**vars(parser.parse_args())), smoke=False)


if __name__ == "__main__":
    main()

"""Item2vec: hit rate by number of partitions and seconds an epoch, beside MLlib's and gensim's.

`RECSPARK_SESSIONS` names a folder with `train_sessions.txt.gz` and `test_sessions.txt.gz` (one
session a line, item numbers in click order: Diginetica as the SR-GNN papers prepare it); without it
sessions are made up. All three: skip-gram, window 5 drawn anew for each target, 64 dimensions, 5
epochs, rate .025, no subsampling; ours and gensim's: 10 negatives by popularity^.5 (MLlib knows
hierarchical softmax only: `ours_hs` is ours with it). P@20: share of next items among the 20 nearest
by cosine to the last.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.ml.feature import Word2Vec as MllibWord2Vec
from pyspark.ml.functions import vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from benchmarks import machine, plot
from benchmarks.memory import PeakMemory, cpu_seconds
from recspark.data.blocks import Array
from recspark.engines import word2vec as engine
from recspark.engines.word2vec_examples import SENTENCES
from recspark.engines.word2vec_step import Word2Vec

SETTINGS = Word2Vec(
    size=64, window=5, shrink_window=True, n_negatives=10, ns_exponent=0.5, epochs=5
)
PARTITIONS, SEEDS = (1, 4, 16), (1, 2, 3)
_COMMAND = "RECSPARK_SESSIONS=FOLDER python -m benchmarks item2vec"
N_TESTED = 20_000  # next items looked for, drawn once


@dataclass(frozen=True)
class Sessions:
    """`train` and (last, following) of test sessions, as item numbers; `items` ascending."""

    train: list[Array]
    last: Array
    following: Array

    @property
    def items(self) -> Array:
        return np.unique(np.concatenate(self.train)).astype(np.int32)


def run(*, smoke: bool) -> None:
    """Measure all: about 40 minutes on two cores with three seeds (`RECSPARK_BENCH_SEEDS`).

    `RECSPARK_BENCH_ONLY` = `speed` or `scaling` measures again what needs a quiet machine, the four
    fits that are compared by time or how ours grows, and keeps the other results as they are.
    """
    if smoke:
        with session(smoke=True) as spark:
            bench = Bench(spark, made_up(800), replace(SETTINGS, epochs=2, n_rotations=2))
            cases = speed(1) + quality((1, 4), (1,))
            print(summary([bench.measure(*case) for case in cases]))
        return
    folder, only = os.environ.get("RECSPARK_SESSIONS"), os.environ.get("RECSPARK_BENCH_ONLY", "")
    sessions = read(folder) if folder else made_up(150_000)
    seeds = SEEDS[: int(os.environ.get("RECSPARK_BENCH_SEEDS", len(SEEDS)))]
    grown = {}
    with session() as spark:
        bench = Bench(spark, sessions, SETTINGS)
        bench.warm_up()
        if only != "scaling":
            cases = speed(seeds[0]) + (quality(PARTITIONS, seeds) if only != "speed" else [])
            old = results("item2vec")["rows"] if only else []
            rows = [bench.measure(*case) for case in cases]
            rows += [
                row for row in old if (row["name"], row["partitions"], row["seed"]) not in cases
            ]
            write(bench, rows, "RECSPARK_SESSIONS" if folder else "made up")
        if only != "speed":
            grown = scaling(bench)
    if grown:
        grown["cores"][1] = on_one_core(sessions)
        print(grown)
        machine.write("item2vec_scaling", f"RECSPARK_BENCH_ONLY=scaling {_COMMAND}", grown)
    picture(len(sessions.train))


def session(cores: int = 2, *, smoke: bool = False) -> AbstractContextManager[SparkSession]:
    """Of a cluster, not "local": that one's JVM has its first compiler only, half of MLlib's speed."""
    settings = [f"master=local[{cores}]", "driver_memory=4g", "shuffle_partitions=2"]
    return machine.session("item2vec", settings, smoke=smoke, env="cluster")


def speed(seed: int) -> list[tuple[str, int, int]]:
    """Return (name, partitions, seed) of each run that is compared by its time."""
    return [(name, 2, seed) for name in ("ours", "gensim", "mllib", "ours_hs")]


def quality(partitions: Sequence[int], seeds: Sequence[int]) -> list[tuple[str, int, int]]:
    """Return (name, partitions, seed) of each run that is made for its hit rate."""
    return [
        *(("ours", n, seed) for seed in seeds for n in partitions),
        *(("gensim", 2, seed) for seed in seeds[1:]),
        *(("mllib", n, seed) for seed in seeds for n in partitions),
    ]


class Bench:
    """The data and the settings that all runs share."""

    def __init__(self, spark: SparkSession, sessions: Sessions, settings: Word2Vec) -> None:
        self.sessions, self.settings = sessions, settings
        self.frame = as_frame(spark, sessions)

    def warm_up(self) -> None:
        """Let the JVM compile what the fits run, which takes three of ours: 5.3, 4.4, 3.2 s an epoch."""
        for fit in (ours, ours, mllib):
            fit(self.frame, self.sessions, self.settings, 2, 1)

    def measure(self, name: str, n: int, seed: int) -> dict[str, Any]:
        """Return the row of one run."""
        with PeakMemory() as memory:
            if name == "ours":
                found = ours(self.frame, self.sessions, self.settings, n, seed)
            elif name == "ours_hs":  # the loss that MLlib has
                tree = replace(self.settings, loss="hierarchical")
                found = ours(self.frame, self.sessions, tree, n, seed)
            elif name == "gensim":
                found = gensim(self.sessions, self.settings, n, seed)
            else:
                found = mllib(self.frame, self.sessions, self.settings, n, seed)
        load = os.getloadavg()[0]
        row = {
            "name": name,
            "partitions": n,
            "seed": seed,
            **found,
            **memory.megabytes,
            "load": load,
        }
        print(row, flush=True)
        return row


def write(bench: Bench, rows: list[dict[str, Any]], data: str) -> None:
    """Write the results."""
    figures = summary(rows)
    print(figures)
    machine.write(
        "item2vec",
        _COMMAND,
        {
            "data": data,
            "sessions": len(bench.sessions.train),
            "items": len(bench.sessions.items),
            "next_items_tested": len(bench.sessions.last),
            "settings": vars(bench.settings),
            **figures,
            "rows": rows,
        },
    )


def scaling(bench: Bench) -> dict[str, dict[float, float]]:
    """Return ours' seconds an epoch by sessions, blocks and cores (two; see `on_one_core`)."""
    whole, by_sessions = bench.sessions, {}
    for share in (16, 4, 1):
        part = replace(whole, train=whole.train[::share])
        frame = as_frame(bench.frame.sparkSession, part)
        found = ours(frame, part, bench.settings, 2, 1)
        by_sessions[len(part.train) / 1000] = found["epoch_seconds"]
    last = by_sessions[len(whole.train) / 1000]
    by_blocks = {2: last} | {
        n: ours(bench.frame, whole, bench.settings, n, 1)["epoch_seconds"] for n in (1, 4)
    }
    return {"thousand sessions": by_sessions, "blocks": by_blocks, "cores": {2: last}}


def on_one_core(sessions: Sessions) -> float:
    """Return ours' seconds an epoch in a session of one core."""
    with session(cores=1) as spark:
        frame = as_frame(spark, sessions)
        # The last one counts; see `Bench.warm_up`.
        fits = [ours(frame, sessions, SETTINGS, 2, 1) for _ in range(3)]
    return float(fits[-1]["epoch_seconds"])


def results(name: str) -> dict[str, Any]:
    """Return what `results/<name>.json` holds."""
    found: dict[str, Any] = json.loads((machine.RESULTS / f"{name}.json").read_text())
    return found


def picture(n_sessions: int) -> None:
    """Draw seconds an epoch at two partitions and how they grow, and hit rates by partitions."""
    figures = results("item2vec")
    measured = (machine.RESULTS / "item2vec_scaling.json").exists()
    grown = results("item2vec_scaling") if measured else {}
    epochs, hits = figures["epoch_seconds"], figures["mean_p_at_20"]
    names = {
        "ours": "recspark, negatives",
        "gensim": "gensim, negatives",
        "ours_hs": "recspark, tree",
        "mllib": "MLlib, tree",
    }
    bars = {label: epochs[f"{name} 2"] for name, label in names.items()}
    by_partitions = {
        name: {n: hits[f"{name} {n}"] for n in (*PARTITIONS[:1], 2, *PARTITIONS[1:])}
        for name in ("ours", "mllib")
    }
    seconds = {
        f"seconds by {what.split()[-1]}": (what, {float(x): y for x, y in grown[what].items()})
        for what in ("thousand sessions", "cores")
        if what in grown
    }
    plot.draw(
        "item2vec",
        f"One epoch on {n_sessions:,} sessions, {SETTINGS.size} dimensions, 2 cores",
        bars,
        {
            **seconds,
            "P@20 of recspark": ("partitions", by_partitions["ours"]),
            "P@20 of MLlib": ("partitions", by_partitions["mllib"]),
        },
    )


def ours(
    frame: DataFrame, sessions: Sessions, settings: Word2Vec, n: int, seed: int
) -> dict[str, Any]:
    """Train with n blocks. The first epoch, which packs the sentences, is not in `epoch_seconds`."""
    split: list[float] = []
    real = engine.cells.write_epoch

    def timed(*args: Any) -> Any:
        begun = time.perf_counter()
        out = real(*args)
        split.append(time.perf_counter() - begun)
        return out

    engine.cells.write_epoch = timed
    ends, cpu = [time.perf_counter()], cpu_seconds()
    try:
        vectors = engine.train_vectors(
            frame.repartition(n),
            sessions.items,
            replace(settings, n_blocks=n, seed=seed),
            progress=lambda _text: ends.append(time.perf_counter()),
        )
    finally:
        engine.cells.write_epoch = real
    total, cpu = time.perf_counter() - ends[0], cpu_seconds() - cpu
    hits = {"p_at_20": precision(sessions, vectors.inputs, vectors.inputs)}
    if vectors.outputs is not None:
        hits["p_at_20_in_out"] = precision(sessions, vectors.inputs, vectors.outputs, unit=False)
        hits["p_at_20_likelihood"] = precision(
            sessions,
            *with_bias(vectors.inputs, vectors.outputs, vectors.counts, settings.ns_exponent),
            unit=False,
        )
    return {
        **hits,
        "fit_seconds": total,
        "fit_cpu_seconds": cpu,
        "epoch_seconds": statistics.median(np.diff(ends)[1:]),
        "of_which_making_examples": statistics.median(split[1:]),
    }


def mllib(
    frame: DataFrame, sessions: Sessions, settings: Word2Vec, n: int, seed: int
) -> dict[str, Any]:
    """Train MLlib's with n partitions. Set-up is small beside five epochs and counted in."""
    words = frame.select(F.col("items").cast("array<string>").alias("words")).persist()
    words.count()
    assert settings.window is not None
    begun, cpu = time.perf_counter(), cpu_seconds()
    model = MllibWord2Vec(
        vectorSize=settings.size,
        windowSize=settings.window,
        maxIter=settings.epochs,
        numPartitions=n,
        minCount=1,
        stepSize=settings.learning_rate,
        seed=seed,
        inputCol="words",
        outputCol="mean",
    ).fit(words)
    total, cpu = time.perf_counter() - begun, cpu_seconds() - cpu
    rows = model.getVectors().select("word", vector_to_array("vector").alias("vector")).toArrow()
    words.unpersist(blocking=True)
    item = rows.column("word").to_numpy(zero_copy_only=False).astype(np.int32)
    values = rows.column("vector").combine_chunks().flatten().to_numpy().reshape(len(item), -1)
    vectors = values[np.argsort(item)].astype(np.float32)
    return {
        "p_at_20": precision(sessions, vectors, vectors),
        "fit_seconds": total,
        "fit_cpu_seconds": cpu,
        "epoch_seconds": total / settings.epochs,
    }


def gensim(sessions: Sessions, settings: Word2Vec, workers: int, seed: int) -> dict[str, Any]:
    """Train gensim's, in one process with `workers` threads."""
    from gensim.models import Word2Vec as GensimWord2Vec
    from gensim.models.callbacks import CallbackAny2Vec

    ends: list[float] = []

    class Clock(CallbackAny2Vec):  # type: ignore[misc]
        def on_epoch_end(self, model: Any) -> None:
            ends.append(time.perf_counter())

    ends.append(time.perf_counter())
    begun, cpu = ends[0], cpu_seconds()
    model = GensimWord2Vec(
        [session.tolist() for session in sessions.train],
        vector_size=settings.size,
        window=settings.window,
        shrink_windows=settings.shrink_window,
        sg=1,
        negative=settings.n_negatives,
        ns_exponent=settings.ns_exponent,
        sample=0,
        min_count=1,
        epochs=settings.epochs,
        alpha=settings.learning_rate,
        min_alpha=settings.min_learning_rate,
        workers=workers,
        seed=seed,
        callbacks=[Clock()],
    )
    cpu = cpu_seconds() - cpu
    vectors = np.stack([model.wv[int(item)] for item in sessions.items])
    outputs = np.stack([model.syn1neg[model.wv.key_to_index[int(i)]] for i in sessions.items])
    return {
        "p_at_20": precision(sessions, vectors, vectors),
        "p_at_20_in_out": precision(sessions, vectors, outputs, unit=False),
        "fit_seconds": ends[-1] - begun,
        "fit_cpu_seconds": cpu,
        "epoch_seconds": statistics.median(np.diff(ends)[1:]),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return hit rates, the means over seeds; times of the first seed, which a quiet machine made;
    and the figures that targets are set for.
    """

    def mean(name: str, n: int, figure: str) -> float:
        return statistics.fmean(
            row[figure] for row in rows if (row["name"], row["partitions"]) == (name, n)
        )

    def first(name: str, n: int, figure: str) -> float:
        return min(
            (row["seed"], row[figure])
            for row in rows
            if (row["name"], row["partitions"]) == (name, n)
        )[1]

    cases = dict.fromkeys((row["name"], row["partitions"]) for row in rows)
    most = max(n for name, n in cases if name == "ours")
    ours_s = first("ours", 2, "epoch_seconds")
    return {
        "mean_p_at_20": {f"{name} {n}": mean(name, n, "p_at_20") for name, n in cases},
        "epoch_seconds": {f"{name} {n}": first(name, n, "epoch_seconds") for name, n in cases},
        "times_faster_than_mllib": first("mllib", 2, "epoch_seconds") / ours_s,
        "times_faster_than_gensim": first("gensim", 2, "epoch_seconds") / ours_s,
        "fit_cpu_seconds": {name: first(name, 2, "fit_cpu_seconds") for name, n in cases if n == 2},
        f"p_at_20_with_{most}_over_1": mean("ours", most, "p_at_20") / mean("ours", 1, "p_at_20"),
    }


def precision(sessions: Sessions, users: Array, items: Array, *, unit: bool = True) -> float:
    """Return P@20: share of next items among the 20 best for the last one, which is left out.

    An item that was never trained on counts as a miss. `unit` : by cosine, else by product.
    """
    known = sessions.items
    last, following = (
        np.minimum(np.searchsorted(known, part), len(known) - 1)
        for part in (sessions.last, sessions.following)
    )
    asked = (known[last] == sessions.last) & (known[following] == sessions.following)
    last, following = last[asked], following[asked]
    if unit:
        users, items = (
            part / np.linalg.norm(part, axis=1, keepdims=True) for part in (users, items)
        )
    hits = 0
    for begin in range(0, len(last), 1000):
        part = slice(begin, begin + 1000)
        scores = users[last[part]] @ items.T  # (1000, n_items)
        row = np.arange(len(scores))
        wanted = scores[row, following[part]]
        scores[row, last[part]] = -np.inf
        hits += int(((scores > wanted[:, None]).sum(axis=1) < 20).sum())
    return hits / len(sessions.last)


def with_bias(users: Array, items: Array, counts: Array, exponent: float) -> tuple[Array, Array]:
    """Return vectors whose product is `users @ items.T` + log of the noise, but for a constant."""
    ones = np.ones((len(users), 1), np.float32)
    bias = exponent * np.log(np.maximum(counts, 1))[:, None].astype(np.float32)
    return np.hstack([users, ones]), np.hstack([items, bias])


def read(folder: str) -> Sessions:
    """Return the sessions of both files."""
    found = []
    for name in ("train", "test"):
        with gzip.open(Path(folder) / f"{name}_sessions.txt.gz", "rt") as lines:
            found.append([np.array(line.split(), np.int32) for line in lines])
    return split_sessions(*found)


def made_up(n: int, n_items: int = 20_000, seed: int = 1) -> Sessions:
    """Return sessions that walk: from each item to one of its 30 neighbours on a ring."""
    n_items = min(n_items, 5 * n)
    rng = np.random.default_rng(seed)
    places = rng.permutation(n_items)
    walks = []
    for length in 2 + rng.poisson(3, n + n // 10):
        steps = rng.integers(-15, 16, length)
        steps[0] = int(n_items * rng.random() ** 3)  # some places are visited more
        walks.append(places[np.cumsum(steps) % n_items].astype(np.int32))
    return split_sessions(walks[:n], walks[n:])


def split_sessions(train: list[Array], test: list[Array]) -> Sessions:
    """Return them with `N_TESTED` (last, next) pairs of `test`."""
    last = np.concatenate([session[:-1] for session in test])
    following = np.concatenate([session[1:] for session in test])
    chosen = np.random.default_rng(0).permutation(len(last))[:N_TESTED]
    return Sessions(train, last[chosen], following[chosen])


def as_frame(spark: SparkSession, sessions: Sessions) -> DataFrame:
    """Return `sentence_id, items`, cached."""
    lengths = [len(session) for session in sessions.train]
    start = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    items = pa.ListArray.from_arrays(start, pa.array(np.concatenate(sessions.train), pa.int32()))
    ids = pa.array(np.arange(len(lengths)), pa.int64())
    frame = spark.createDataFrame(pa.table({"sentence_id": ids, "items": items}), SENTENCES)
    frame = frame.repartition(2).persist()
    frame.count()
    return frame

"""What the benchmarks on MovieLens 1M share: ratings, fits, figures of users, intervals, results.

The data may not be redistributed: the folder `ml-1m` is looked for below RECSPARK_DATA (default
`../shared/data`). RECSPARK_ML holds options, `name=value` joined by colons (`;` stands for a colon
within a value):

- `models` : rows, joined by commas; `seeds` : how many, from 1; `part` : `test` or `validation`
- `set` : settings over those of a row, as JSON: `{"als"; {"reg"; 0.1}}`
- `ranks` : of a training and cores of Spark (1); `work` : a folder that keeps checkpoints, from which
  a training of the same settings goes on

Nothing is written but for the test part, and nothing in smoke mode. `results/NAME.json` keeps the
rows and seeds that a run did not measure.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from benchmarks import machine
from recspark.config import Train, digest
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.interactions import before
from recspark.data.interactions import queries as queries_of
from recspark.eval import metrics, significance
from recspark.models import registry
from recspark.models.base import FitOptions
from recspark.testing import synth
from recspark.train.curve import Curve

K = 10
N_BOOTSTRAP = 1000
AGAINST = ("popular", "item_knn", "ease", "session_knn")  # rows that the others are compared with
PLAIN = ", plain"  # of the row that stands beside ours; it is compared with it
METRICS = {"ndcg": metrics.ndcg, "recall": metrics.recall, "hit_rate": metrics.hit_rate}


@dataclass(frozen=True)
class Asked:
    """The options of a run; see above."""

    models: tuple[str, ...]
    seeds: tuple[int, ...]
    part: str
    changed: dict[str, dict[str, Any]]
    ranks: int
    work: str
    smoke: bool

    @classmethod
    def of(cls, models: tuple[str, ...], *, smoke: bool) -> Asked:
        """Return what RECSPARK_ML asks for; `models` where it names none."""
        pairs = [part.split("=", 1) for part in os.environ.get("RECSPARK_ML", "").split(":")]
        asked = {pair[0]: pair[1].replace(";", ":") for pair in pairs if pair[0]}
        return cls(
            models=tuple(asked["models"].split(",")) if "models" in asked else models,
            seeds=tuple(range(1, int(asked.get("seeds", "1")) + 1)),
            part=asked.get("part", "test"),
            changed=json.loads(asked.get("set", "{}")),
            ranks=int(asked.get("ranks", "1")),
            work=asked.get("work", ""),
            smoke=smoke,
        )

    def settings(self, row: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Return `settings` of a row, changed as asked; in smoke mode one pass over the data."""
        once = [name for name in ("epochs", "iterations") if self.smoke and name in settings]
        return {**settings, **dict.fromkeys(once, 1), **self.changed.get(row, {})}

    @property
    def train(self) -> Train:
        """Of every training."""
        return Train(ranks=self.ranks, threads=1, timeout_s=7200)  # type: ignore[call-arg]

    @contextmanager
    def session(self, name: str) -> Iterator[tuple[SparkSession, str]]:
        """Give a Spark session with a core a rank, and a folder for files."""
        master = f"master=local[{self.ranks}]"
        with (
            machine.session(name, [master], smoke=self.smoke) as spark,
            tempfile.TemporaryDirectory() as folder,
        ):
            yield spark, self.work or folder


@dataclass(frozen=True)
class Question:
    """Queries, and the items that would be right: distinct pairs of `user` and `item`."""

    queries: DataFrame
    user: Array
    item: Array


@dataclass
class Table:
    """Rows of figures; `results/<name>.json` is written after each row.

    Parameters
    ----------
    name : of the benchmark and of its file
    about : `protocol`, in words; what others reached
    asked : options of the run
    longest : length of the lists; above `K`, hits among them are counted too
    against : rows that the others are compared with
    """

    name: str
    about: dict[str, Any]
    asked: Asked
    longest: int = K
    against: tuple[str, ...] = AGAINST
    _of_users: dict[tuple[int, str, str], dict[str, Array]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        print(self.about["protocol"], flush=True)

    def add(
        self,
        row: str,
        model: str,
        settings: dict[str, Any],
        data: Dataset,
        questions: dict[str, Question],
        seed: int,
        allowed: Array | None = None,
    ) -> None:
        """Fit `model`, score its lists on every question, print and write the row.

        `allowed` : the items that may be listed; None = all.
        """
        curves: list[Curve] = []
        place = f"{self.asked.work}/{self.name}/{row}-{seed}-{digest(settings)[:8]}"
        options = FitOptions(
            train=self.asked.train.model_copy(update={"seed": seed}),
            progress=lambda text: print(f"  {text}", flush=True),
            record=curves.append,
            scratch=place if self.asked.work else "",
        )
        recommender = registry.make(model, settings)
        begun = time.perf_counter()
        fitted = recommender.fit(data, options)
        figures: dict[str, Any] = {"fit_seconds": round(time.perf_counter() - begun, 1)}
        if curves:
            seconds = [epoch.seconds for epoch in curves[0].epochs]
            figures |= {"epochs": len(seconds), "train_seconds": round(sum(seconds), 1)}
        lists: dict[int, pa.Table] = {}  # questions may share their queries
        for name, question in questions.items():
            key = id(question.queries)
            if key not in lists:
                lists[key] = fitted.recommend(question.queries, self.longest, allowed).toArrow()
            figures[name] = self.scored(row, name, question, lists[key], seed)
        self.write(row, seed, {"settings": recommender.settings.model_dump(), **figures})

    def scored(
        self, row: str, name: str, question: Question, lists: pa.Table, seed: int
    ) -> dict[str, Any]:
        """Return the figures of a row's lists, and what they differ by from other rows' before."""
        users, values = of_users(lists, question, self.longest)
        self._of_users[seed, row, name] = values
        return {
            "users": len(users),
            **{metric: round(float(value.mean()), 4) for metric, value in values.items()},
            "minus": {
                other: {
                    metric: interval(users, value - self._of_users[seed, other, name][metric])
                    for metric, value in values.items()
                }
                for other in (*self.against, row.removesuffix(PLAIN))
                if other != row and (seed, other, name) in self._of_users
            },
        }

    def write(self, row: str, seed: int, figures: dict[str, Any]) -> None:
        """Print a row, and write it beside those that the file has."""
        shown = {key: value for key, value in figures.items() if key != "settings"}
        print(f"{row}, seed {seed}: {json.dumps(shown)}", flush=True)
        if self.asked.smoke or self.asked.part != "test":
            return
        path = machine.RESULTS / f"{self.name}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else {}
        about = machine.about()
        stamp = {name: about[name] for name in ("measured_at", "load_average")}
        stamp |= {"ranks": self.asked.ranks}
        rows.setdefault(row, {})[f"seed {seed}"] = {**figures, **stamp}
        machine.write(
            self.name, f"python -m benchmarks quality.{self.name}", {**self.about, "rows": rows}
        )


def ratings() -> pd.DataFrame | None:
    """Return the ratings in the order of the file, or say that they are missing."""
    folder = Path(os.environ.get("RECSPARK_DATA", "../shared/data")) / "ml-1m"
    if not folder.exists():
        print(f"no data at {folder}: set RECSPARK_DATA to the folder that holds ml-1m")
        return None
    return pd.read_parquet(folder / "ratings.parquet")


def in_time(
    found: pd.DataFrame, ties: Literal["rank", "file"] = "rank"
) -> tuple[Array, Array, Array]:
    """Return user and item, counted from 0, and time in seconds, by user, then time, oldest first.

    A user's ratings of one second follow `time_rank_in_user`, or the rows of the file.
    """
    by = {"rank": ["user_id", "time_rank_in_user"], "file": ["user_id", "timestamp"]}
    found = found.sort_values(by[ties], kind="stable")
    user = np.unique(found["user_id"], return_inverse=True)[1]
    item = np.unique(found["movie_id"], return_inverse=True)[1].astype(np.int32)
    return user, item, found["timestamp"].to_numpy()


def from_end(user: Array) -> Array:
    """Return the place of each row from its user's end, 0 = the last; rows are by user.

    >>> from_end(np.array([4, 4, 4, 7]))
    array([2, 1, 0, 0])
    """
    counts = np.unique(user, return_counts=True)[1]
    return np.repeat(np.cumsum(counts), counts) - 1 - np.arange(len(user))


def core(found: pd.DataFrame, least: int) -> pd.DataFrame:
    """Return the ratings left when users and items with fewer than `least` go, again and again."""
    while True:
        users = found["user_id"].map(found["user_id"].value_counts())
        items = found["movie_id"].map(found["movie_id"].value_counts())
        kept = (users >= least) & (items >= least)
        if kept.all():
            return found
        found = found[kept]


def log(user: Array, item: Array, at: Array) -> synth.Log:
    """Return events of weight 1 at `at`, seconds; the newest one is a second old."""
    age = (at.max() + 1 - at) / 86_400
    return synth.Log(user, item, age, np.ones(len(user), np.float32))


def dataset(spark: SparkSession, events: synth.Log) -> Dataset:
    """Return what models are fitted on; its histories are made once and kept."""
    data = synth.dataset(spark, events)
    return replace(data, histories=data.histories.persist())


def queries(spark: SparkSession, events: synth.Log, *, masked: bool) -> DataFrame:
    """Return the queries of all users of `events`, whose items are masked or not; made once and kept."""
    histories = before(synth.histories(spark, events), synth.CUTOFF)
    found = queries_of(histories, "novel" if masked else "repeat")
    return found.persist()


def with_seen(asked: DataFrame, user: Array, item: Array, folder: str) -> DataFrame:
    """Return the queries with the pairs (`user`, `item`), by user, masked, whatever they masked before.

    The pairs pass through files in `folder`.
    """
    users, first = np.unique(user, return_index=True)
    start = pa.array(np.append(first, len(user)), pa.int32())
    seen = pa.table(
        {
            "user_idx": pa.array(users, pa.int64()),
            "seen": pa.ListArray.from_arrays(start, pa.array(item, pa.int32())),
        }
    )
    synth.write_files(seen, folder, "seen", 4)
    found = asked.sparkSession.read.parquet(folder)
    return asked.drop("seen").join(found, on="user_idx", how="inner").persist()


def lists_of(scores: Array) -> pa.Table:
    """Return the `K` best of scores of all items, (n_users, n_items), as a model's lists."""
    top = np.argsort(-scores, axis=1, kind="stable")[:, :K]
    n = len(scores)
    return pa.table(
        {
            "user_idx": np.repeat(np.arange(n, dtype=np.int64), K),
            "item_idx": top.ravel().astype(np.int32),
            "rank": np.tile(np.arange(1, K + 1, dtype=np.int32), n),
        }
    )


def of_users(
    lists: pa.Table, question: Question, longest: int = K
) -> tuple[Array, dict[str, Array]]:
    """Return the users of the question, ascending, and each one's figures: 0 without a list.

    Lists have `longest` items at most. Above `K`, hits among all of them are counted too.
    """
    listed, item, rank = (lists.column(n).to_numpy() for n in ("user_idx", "item_idx", "rank"))
    users, n_truth = np.unique(question.user, return_counts=True)
    wanted = np.isin(listed, users)
    listed, item, rank = listed[wanted], item[wanted], rank[wanted]
    n_items = int(max(question.item.max(), item.max(initial=0))) + 1
    items = np.full((len(users), longest), metrics.NOTHING, np.int32)
    hits = np.zeros(items.shape, bool)
    place = np.searchsorted(users, listed), rank - 1
    items[place] = item
    hits[place] = np.isin(
        listed.astype(np.int64) * n_items + item,
        question.user.astype(np.int64) * n_items + question.item,
    )
    everything = metrics.Catalogue(np.arange(n_items, dtype=np.int32), np.ones(n_items))
    block = metrics.Block(items, hits, n_truth, everything)
    figures = {f"{name}@{K}": metric(block, K) for name, metric in METRICS.items()}
    if longest > K:
        figures[f"hit_rate@{longest}"] = metrics.hit_rate(block, longest)
    return users, figures


def interval(users: Array, difference: Array) -> list[float]:
    """Return the mean difference of users and the ends of its paired bootstrap interval (95 %)."""
    columns = np.stack([significance.to_steps(difference), np.ones(len(users))], axis=1)
    sums = np.zeros((1 + N_BOOTSTRAP, 2), np.int64)
    for begin in range(0, len(users), significance.BLOCK_USERS):
        part = slice(begin, begin + significance.BLOCK_USERS)
        weights = significance.poisson_weights(users[part].astype(np.int64), N_BOOTSTRAP, seed=1)
        sums += significance.replicate_sums(weights, columns[part])
    means = sums[:, 0] * significance.STEP / sums[:, 1]
    low, high = significance.percentile_interval(means[1:, None])
    return [round(float(value), 4) for value in (means[0], low[0], high[0])]

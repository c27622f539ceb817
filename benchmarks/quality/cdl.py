"""CDL on CiteULike-a with tags as the words of an item: P training items a user, recall@300.

The data may not be redistributed: the folder `citeulike-a` is looked for below RECSPARK_DATA (default
`../shared/data`). Its abstracts are not there; an item's words are its tags.

Protocol (Wang, Wang & Yeung 2015, section 5.2): P items of each user, drawn at random, are the training
set, all others the test; every item that the user has not in training is ranked, those without any
training event too; recall@300 divides by the user's test items; the mean over users. Settings were
chosen with seed 100, rows are of other seeds.

`popular`, `item_knn` and `ease` know only items with an event; `content_knn` ranks by the cosine of
tf-idf vectors of tags (numpy, here); `als` is CDL's matrix factorisation without the network
(the same closed forms, prior 0); `hybrid` adds the ranks of `content_knn` and `als` by reciprocal rank fusion.

    python -m benchmarks quality.cdl
    RECSPARK_CDL=p=1:seed=100:rows=als,cdl:set='{"als";{"reg";1}}' python -m benchmarks quality.cdl
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession
from scipy import sparse

from benchmarks import machine
from recspark.config import Features, Train
from recspark.data import training_texts
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.models import registry
from recspark.models.base import FitOptions
from recspark.testing import synth

K = 300
CDL: dict[str, Any] = {
    "hidden_sizes": [200, 50], "reg_users": 0.1, "reg_items": 10.0, "reg_words": 100.0,
    "corruption": 0.3, "rounds": 3, "epochs": 5, "pretraining_epochs": 3, "batch_size": 128,
    "learning_rate": 4e-3,
}  # fmt: skip
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> model, settings
    "popular": ("popular", {"half_life_days": None}),
    "item_knn": ("item_knn", {"half_life_days": None, "n_neighbours": 200, "shrink": 10}),
    "ease": ("ease", {"half_life_days": None, "reg": 100}),
    "als": (
        "als",
        {
            "embedding_size": 50, "reg": 1.0, "reg_exponent": 0.0, "alpha": 1e-9,
            "unobserved_weight": 0.01, "iterations": 10, "half_life_days": None, "method": "cholesky",
        },
    ),
    "cdl": ("cdl", CDL),
}  # fmt: skip
ROWS = ("popular", "item_knn", "ease", "als", "content_knn", "cdl", "hybrid")
TRAIN = Train(ranks=2, threads=1, timeout_s=3000)  # type: ignore[call-arg]


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    folder = Path(os.environ.get("RECSPARK_DATA", "../shared/data")) / "citeulike-a"
    if not folder.exists():
        print(f"no data at {folder}: set RECSPARK_DATA to the folder that holds citeulike-a")
        return
    asked = dict(
        part.split("=", 1) for part in os.environ.get("RECSPARK_CDL", "").split(":") if part
    )
    rows = asked.get("rows", "popular,content_knn" if smoke else ",".join(ROWS)).split(",")
    changed = json.loads(asked.get("set", "{}").replace(";", ":"))
    first = int(asked.get("seed", "1"))
    seeds = range(first, first + int(asked.get("seeds", "1")))
    libraries, tags = read(folder)
    if smoke:
        libraries, tags = [found[found < 2000] for found in libraries[:200]], tags[:2000]
        libraries = [found for found in libraries if len(found)]
    found: dict[str, Any] = {}
    with machine.session("cdl", ["master=local[2]"], smoke=smoke) as spark:
        for p in [int(v) for v in asked.get("p", "1" if smoke else "1,10").split(",")]:
            for seed in seeds:
                with tempfile.TemporaryDirectory() as scratch:
                    lists = Split(spark, libraries, tags, p, seed, scratch, changed)
                    for row in rows:
                        figures = {"seed": seed, **lists.score(row)}
                        found.setdefault(f"p={p}", {}).setdefault(row, []).append(figures)
                        print(f"P={p} {row:12s} {figures}", flush=True)
    if not smoke and "seed" not in asked:
        about = {"settings": {**SETTINGS, "changed": changed}, "k": K}
        machine.write("cdl", "python -m benchmarks quality.cdl", {**about, "figures": found})


def read(folder: Path) -> tuple[list[Array], list[Array]]:
    """Return the items of each user, and the tags of each item."""

    def lines(name: str) -> list[Array]:
        with gzip.open(folder / name, "rt", encoding="ascii") as file:
            return [np.unique(np.array(line.split()[1:], np.int64)) for line in file]

    return lines("users.dat.gz"), lines("item-tag.dat.gz")


class Split:
    """P items of each user to train on, as data for models, and the rest as truth."""

    def __init__(
        self,
        spark: SparkSession,
        libraries: list[Array],
        tags: list[Array],
        p: int,
        seed: int,
        scratch: str,
        changed: dict[str, Any],
    ) -> None:
        rng = np.random.default_rng([seed, p])
        drawn = [rng.permutation(items) for items in libraries]
        self.mine = [items[:p] for items in drawn]
        self.truth = [items[p:] for items in drawn]
        self.n_items, self.seed, self.changed = len(tags), seed, changed
        user = np.repeat(np.arange(len(drawn)), [len(items) for items in self.mine])
        item = np.concatenate(self.mine).astype(np.int32)
        n = len(user)
        log = synth.Log(user, item, np.ones(n), np.ones(n, np.float32))
        data = synth.dataset(spark, log)
        self.known = np.unique(item)
        catalogue = spark.createDataFrame(
            pa.table(
                {
                    "item_idx": pa.array(np.arange(len(tags)), pa.int32()),
                    "item_name": pa.nulls(len(tags), pa.string()),
                    "category": pa.nulls(len(tags), pa.list_(pa.string())),
                    "text": [" ".join(f"t{tag}" for tag in found) for found in tags],
                }
            )
        )
        settings = Features()  # type: ignore[call-arg]
        rows = training_texts.training_texts(catalogue, synth.CUTOFF, settings, 1).toArrow()
        rows = rows.sort_by("item_idx")
        files = synth.write_files(rows.drop_columns(["cutoff"]), scratch, training_texts.TABLE, 8)
        self.spark, self.data = spark, data
        self.everything: Dataset = replace(data, items=catalogue, training={files.table: files})
        entries = np.concatenate(tags)
        of_item = np.repeat(np.arange(len(tags)), [len(found) for found in tags])
        counts = sparse.csr_matrix((np.ones(len(entries)), (of_item, entries)))
        idf = np.log(len(tags) / np.maximum(1, np.asarray(counts.sum(axis=0)).ravel()))
        weighed = counts @ sparse.diags(idf)
        norm = np.sqrt(np.asarray(weighed.multiply(weighed).sum(axis=1)).ravel())
        self.content = sparse.diags(1 / np.maximum(norm, 1e-12)) @ weighed
        self.listed: dict[str, list[Array]] = {}

    def score(self, row: str) -> dict[str, Any]:
        """Fit and score one row."""
        begun = time.perf_counter()
        self.listed[row] = self.lists(row)
        hits = [np.isin(a, b).sum() for a, b in zip(self.listed[row], self.truth, strict=True)]
        recall = [hit / len(b) for hit, b in zip(hits, self.truth, strict=True) if len(b)]
        seconds = round(time.perf_counter() - begun, 1)
        return {f"recall@{K}": round(float(np.mean(recall)), 4), "users": len(recall), "s": seconds}

    def lists(self, row: str) -> list[Array]:
        """Return the K best of each user."""
        if row == "content_knn":
            return self.of_content()
        if row == "hybrid":
            return self.fused(("content_knn", "als"))
        name, settings = SETTINGS[row]
        settings = {**settings, **self.changed.get(row, {})}
        options = FitOptions(
            train=TRAIN.model_copy(update={"seed": self.seed}),
            progress=lambda text: print(f"  {text}", flush=True),
        )
        whole = row in ("als", "cdl")
        data = self.everything if whole else self.data
        model = registry.make(name, settings).fit(data, options)
        found = model.recommend(synth.ask(self.data), K).toArrow().sort_by("user_idx")
        user = found.column("user_idx").to_numpy()
        item = found.column("item_idx").to_numpy()
        cut = np.searchsorted(user, np.arange(len(self.mine) + 1))
        return [item[a:b] for a, b in pairwise(cut)]

    def of_content(self) -> list[Array]:
        """Return the items whose tags are nearest to those of the user's items."""
        out = []
        for mine in self.mine:
            scores = np.asarray(self.content @ self.content[mine].sum(axis=0).T).ravel()
            scores[mine] = -1
            best = np.argpartition(-scores, K)[:K]
            out.append(best[np.argsort(-scores[best], kind="stable")])
        return out

    def fused(self, rows: tuple[str, ...]) -> list[Array]:
        """Return the lists of rows put together by reciprocal ranks (Cormack et al. 2009)."""
        for row in rows:
            if row not in self.listed:
                self.listed[row] = self.lists(row)
        out = []
        for user in range(len(self.mine)):
            scores = np.zeros(self.n_items)
            for row in rows:
                listed = self.listed[row][user]
                scores[listed] += 1 / (60 + np.arange(1, len(listed) + 1))
            out.append(np.argsort(-scores, kind="stable")[:K])
        return out

"""Our networks with their shipped settings beside a plain torch loop of the same paper and settings.

The loops are in `plain_nets.py`, `plain_sequences.py` and `plain_cdl.py`, at most 60 lines each; all
data lies in their memory. What differs: how the data comes, the loss where ours samples candidates
and the loop does not, and how a user is answered. A loop's row has a paired interval over users of
the loop less ours.

- `multvae`, `sdae`, `mf`, `autorec`: MovieLens 1M by RecBole's random split, as in
  `quality.movielens`, its first 2,000 users; NDCG@10, test part, the films of the other parts masked.
  Defaults of the class, without decay.
- `gru4rec`, `sasrec`: the next film of the first 1,000 users, by the protocol of that name in
  `quality.movielens_next`, films rated before masked. Settings of `conf/models`, where whole
  histories are read. `gru4rec_bpr`, the defaults of the class on whole histories, is measured
  only where it is asked for: some twenty minutes of a core.
- `cdl`: CiteULike-a as in `quality.cdl`, 5 training items a user, the first 2,000 users and the
  articles that 12 of them have; recall@50. Defaults of the class.

Settings are the same on both sides, and were chosen elsewhere, with one overlap: those of `sdae`, `mf` and
`autorec` by the validation part of all users, another draw, which holds a tenth of what is asked here.

    python -m benchmarks quality.plain
    RECSPARK_ML=models=mf:part=validation python -m benchmarks quality.plain
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from pyspark.sql import SparkSession
from torch import Tensor

from benchmarks.quality import cdl as articles
from benchmarks.quality import ml1m, movielens, movielens_next
from benchmarks.quality.ml1m import Asked, Question, Table
from benchmarks.quality.movielens import Split
from benchmarks.quality.plain_cdl import cdl
from benchmarks.quality.plain_nets import NETS
from benchmarks.quality.plain_sequences import SEQUENCES
from recspark.data.blocks import Array
from recspark.models import registry
from recspark.models.base import FitOptions
from recspark.testing import synth

CONF = Path(__file__).parents[2] / "conf" / "models"
BAG_USERS, NEXT_USERS, READERS = 2000, 1000, 2000
OF_READER, HELD_BY, K = (
    5,
    12,
    50,
)  # training articles of a user, least readers of one, list's length
# What they are measured against has the settings of its own benchmark; the networks their own.
SETTINGS = {row: movielens.SETTINGS[row] for row in ("popular", "item_knn", "ease")}
NEXT = {  # row -> model, protocol
    "session_knn": ("session_knn", "gru4rec"),
    "gru4rec": ("gru4rec", "gru4rec"),
    "gru4rec_bpr": ("gru4rec", "gru4rec"),
    "sasrec": ("sasrec", "sasrec"),
}
ON_REQUEST = ("gru4rec_bpr",)
ARTICLES = ("articles_popular", "articles_als", "cdl")
NEXT_FILM = "next_film"  # the question


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    ratings = ml1m.ratings()
    if ratings is None:
        return
    every = (*SETTINGS, *NETS, *(row for row in NEXT if row not in ON_REQUEST), *ARTICLES)
    asked = Asked.of(("popular", "mf", "sasrec", "cdl") if smoke else every, smoke=smoke)
    table = Table("plain", {"protocol": __doc__}, asked)
    torch.set_num_threads(1)
    with asked.session("plain") as (spark, scratch):
        for seed in asked.seeds:
            bags(table, ratings[ratings["rating"] > 0], spark, scratch, seed)
            for protocol in ("gru4rec", "sasrec"):
                next_films(table, protocol, ratings, spark, f"{scratch}/{protocol}", seed)
            of_articles(table, spark, f"{scratch}/articles-{seed}", seed)


def bags(table: Table, ratings: pd.DataFrame, spark: SparkSession, scratch: str, seed: int) -> None:
    """Add the rows of networks that read a user's films as a bag, and of what stands beside."""
    asked = table.asked
    rows = [row for row in asked.models if row in (*SETTINGS, *NETS)]
    if not rows:
        return
    few = ratings[ratings["user_id"] <= (300 if asked.smoke else BAG_USERS)]
    split = Split(few, seed, f"{scratch}/plain-{seed}", spark, asked.part)
    user, item = split.masked
    matrix = torch.zeros(int(user.max()) + 1, int(item.max()) + 1)
    of_user = torch.from_numpy(split.train.user_idx)
    matrix[of_user, torch.from_numpy(split.train.item_idx).long()] = 1
    for row in rows:
        settings = set_of(asked, row, SETTINGS.get(row, {"half_life_days": None}))
        table.add(row, row, settings, split.data, {"masked": split.question}, seed)
        if row in NETS:
            made = registry.make(row, settings).settings
            scores, seconds = timed(seed, NETS[row], matrix, made)
            scores[user, item] = -np.inf
            add(table, row, "masked", split.question, scores, seconds, seed)


def next_films(
    table: Table,
    protocol: str,
    ratings: pd.DataFrame,
    spark: SparkSession,
    folder: str,
    seed: int,
) -> None:
    """Add the rows of one protocol of `quality.movielens_next`."""
    asked, rule = table.asked, movielens_next.PROTOCOLS[protocol]
    rows = [row for row in asked.models if NEXT.get(row, ("", ""))[1] == protocol]
    if not rows:
        return
    few = ratings[ratings["user_id"] <= (100 if asked.smoke else NEXT_USERS)]
    few = ml1m.core(few[few["rating"] >= rule.rating], rule.least)
    user, item, at = ml1m.in_time(few, rule.ties)
    print(f"{len(user):,} ratings, {user.max() + 1} users, {item.max() + 1} films", flush=True)
    back = ml1m.from_end(user)
    truth = 1 if asked.part == "validation" else 0
    trained, read = (
        ml1m.log(user[kept], item[kept], at[kept]) for kept in (back > 1, back > truth)
    )
    data = ml1m.dataset(spark, trained)
    queries = ml1m.queries(spark, read, masked=True)
    question = Question(queries, user[back == truth], item[back == truth])
    for row in rows:
        model = NEXT[row][0]
        shipped = (
            {} if row == "gru4rec_bpr" else yaml.safe_load((CONF / f"{model}.yaml").read_text())
        )
        settings = set_of(asked, row, {**movielens_next.HISTORY, **shipped})
        mine = movielens_next.with_training(data, trained, model, settings, f"{folder}-{seed}")
        table.add(row, model, settings, mine, {NEXT_FILM: question}, seed)
        if model in SEQUENCES:
            made = registry.make(model, settings).settings
            histories = [histories_of(log) for log in (trained, read)]
            scores, seconds = timed(seed, SEQUENCES[model], *histories, int(item.max()) + 1, made)
            scores[read.user_idx, read.item_idx] = -np.inf
            add(table, row, NEXT_FILM, question, scores, seconds, seed)


def histories_of(log: synth.Log) -> list[Array]:
    """Return the films of each user, newest last; the log is in that order."""
    return np.split(log.item_idx, np.flatnonzero(np.diff(log.user_idx)) + 1)


def of_articles(table: Table, spark: SparkSession, folder: str, seed: int) -> None:
    """Add the rows of CiteULike-a."""
    asked = table.asked
    where = Path(os.environ.get("RECSPARK_DATA", "../shared/data")) / "citeulike-a"
    rows = [row for row in asked.models if row in ARTICLES]
    if not rows or not where.exists():
        print(f"{len(rows)} rows of {where}", flush=True)
        return
    libraries, tags = articles.read(where)
    libraries = libraries[: 150 if asked.smoke else READERS]
    readers = np.bincount(np.concatenate(libraries), minlength=len(tags))
    kept = np.flatnonzero(readers >= (2 if asked.smoke else HELD_BY))
    libraries = [np.searchsorted(kept, mine[np.isin(mine, kept)]) for mine in libraries]
    libraries = [mine for mine in libraries if len(mine) > OF_READER]
    split = articles.Split(spark, libraries, [tags[n] for n in kept], OF_READER, seed, folder, {})
    print(f"{sum(map(len, libraries)):,} pairs, {len(libraries)} users, {len(kept)} articles")
    recalls: dict[str, Array] = {}
    for row in rows:
        model = row.removeprefix("articles_")
        beside = articles.SETTINGS[model][1] if row != "cdl" else {}
        settings = set_of(asked, row, beside)
        options = FitOptions(
            train=asked.train.model_copy(update={"seed": seed}),
            progress=lambda text: print(f"  {text}", flush=True),
        )
        begun = time.perf_counter()
        data = split.data if model == "popular" else split.everything
        fitted = registry.make(model, settings).fit(data, options)
        seconds = round(time.perf_counter() - begun, 1)
        lists = fitted.recommend(synth.ask(split.data), K).toArrow().sort_by("user_idx")
        at = lists.column("user_idx").to_numpy(), lists.column("rank").to_numpy() - 1
        listed = np.full((len(libraries), K), -1)
        listed[at] = lists.column("item_idx").to_numpy()
        figures = {"settings": registry.make(model, settings).settings.model_dump()}
        add_recall(table, row, recalls, split, listed, {**figures, "fit_seconds": seconds}, seed)
        if row == "cdl":
            matrix, words = matrices(split)
            made = registry.make(model, settings).settings
            scores, seconds = timed(seed, cdl, matrix, words, made)
            scores[matrix.numpy() > 0] = -np.inf
            listed = np.argsort(-scores, axis=1, kind="stable")[:, :K]
            name = f"{row}{ml1m.PLAIN}"
            add_recall(table, name, recalls, split, listed, {"fit_seconds": seconds}, seed)


def matrices(split: articles.Split) -> tuple[Tensor, Tensor]:
    """Return what users train on (n_users, n_items), and the words of items (n_items, n_words)."""
    [training] = split.everything.training.values()
    files = [uri.removeprefix("file://") for uri, _ in training.files]
    found = pd.concat([pd.read_parquet(file) for file in files])
    words, weights = np.stack(found["words"]), np.stack(found["weights"])
    item = np.repeat(found["item_idx"].to_numpy(), words.shape[1])
    counted = weights.ravel() > 0
    texts = torch.zeros(split.n_items, int(words.max()) + 1)
    texts[item[counted], words.ravel()[counted]] = torch.from_numpy(weights.ravel()[counted])
    matrix = torch.zeros(len(split.mine), split.n_items, dtype=torch.double)
    for user, mine in enumerate(split.mine):
        matrix[user, mine] = 1
    return matrix, texts


def add_recall(
    table: Table,
    row: str,
    recalls: dict[str, Array],
    split: articles.Split,
    listed: Array,
    figures: dict[str, Any],
    seed: int,
) -> None:
    """Score lists of articles (n_users, K), print and write the row."""
    users = np.arange(len(listed))
    found = [np.isin(*both).sum() / len(both[1]) for both in zip(listed, split.truth, strict=True)]
    recalls[row] = np.array(found)
    minus = {
        other: ml1m.interval(users, recalls[row] - values)
        for other, values in recalls.items()
        if other != row
    }
    mean = round(float(recalls[row].mean()), 4)
    table.write(row, seed, {**figures, f"recall@{K}": mean, "users": len(users), "minus": minus})


def set_of(asked: Asked, row: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a row; in smoke mode one pass over the data."""
    network = row in (*NETS, *NEXT, "cdl") and row != "session_knn"
    once = {"epochs": 1} if asked.smoke and network else {}
    if asked.smoke and row == "cdl":
        once |= {"rounds": 1, "pretraining_epochs": 1, "hidden_sizes": [20, 10]}
    return {**asked.settings(row, settings), **once}


def timed(seed: int, loop: Any, *given: Any) -> tuple[Array, float]:
    """Train a plain loop; return its scores (n_users, n_items), and the seconds that it took."""
    torch.manual_seed(seed)
    begun = time.perf_counter()
    scores: Array = loop(*given).numpy()
    return scores, round(time.perf_counter() - begun, 1)


def add(
    table: Table,
    row: str,
    name: str,
    question: Question,
    scores: Array,
    seconds: float,
    seed: int,
) -> None:
    """Score the lists of a plain loop, print and write the row."""
    plain = f"{row}{ml1m.PLAIN}"
    figures = table.scored(plain, name, question, ml1m.lists_of(scores), seed)
    table.write(plain, seed, {"fit_seconds": seconds, name: figures})

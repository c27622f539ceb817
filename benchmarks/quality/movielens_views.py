"""MovieLens 1M cut into two views of films: users who are new in one of them.

All ratings count alike, whatever their value. Two cuts: `neutral`, by a hash of the film; `hard`, by
genre (view b = action, adventure, crime, fantasy, horror, mystery, film noir, science fiction,
thriller, war and western; view a = all other films). The truth of a user is the last film in time
that the user rated in view b. Nothing of that time or later is in the data. Every fifth user, by a
hash, is cold in view b: the earlier ratings there are taken out too. Ranked are the films of view b
without those that the user rated before; hit rate and NDCG among the first 10, ties by the film's
number. Users without a rating before the truth are left out.

`part=validation` asks for the last but one film of view b of the users who are not cold, with the
last one and all later ratings left out: for choosing settings.

Rows: `popular` of view b; `mvdnn_b_alone`, which knows nothing but view b, as each of two separate
models would (to it, cold users are unknown: they get no list, which counts 0); `mvdnn_two_towers`,
which reads both views, but has a user tower of its own for view b; `mvdnn_one_view`, the same films
as one view; `ease` on the union of the views. Every list is of view b.

    python -m benchmarks quality.movielens_views
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from benchmarks.quality import ml1m
from benchmarks.quality.ml1m import Asked, Question, Table
from recspark import schema
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.models import registry
from recspark.testing import synth

NEWEST = 512  # ratings of a user that a network trains on
CUTS = ("neutral", "hard")
_HARD = {
    "Action", "Adventure", "Crime", "Fantasy", "Film-Noir", "Horror", "Mystery", "Sci-Fi",
    "Thriller", "War", "Western",
}  # fmt: skip
TARGET = {
    "cold users, hit_rate@10": "1.3 x popular, and above mvdnn_b_alone",
    "warm users": "not below mvdnn_b_alone and mvdnn_two_towers",
}
_MVDNN: dict[str, Any] = {
    "views": {"a": ["view a"], "b": ["view b"]}, "list_view": "b", "parts": ["item_name", "category"],
    "n_examples": 8, "n_samples": 256, "batch_size": 32, "epochs": 8, "window": 50,
}  # fmt: skip
_ALONE = {**_MVDNN, "views": {"b": ["view b"]}}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> model, settings
    "popular": ("popular", {"half_life_days": None}),
    "ease": ("ease", {"half_life_days": None, "reg": 300}),
    "mvdnn_b_alone": ("mvdnn", _ALONE),
    "mvdnn_two_towers": ("mvdnn", {**_MVDNN, "learn_views": ["b"]}),
    "mvdnn_one_view": ("mvdnn", {**_MVDNN, "views": {}, "list_view": None}),
    "mvdnn": ("mvdnn", _MVDNN),
}
AGAINST = ("popular", "ease", "mvdnn_b_alone", "mvdnn_two_towers", "mvdnn_one_view")
ONLY_B = ("popular", "mvdnn_b_alone")  # rows that are given nothing but view b


@dataclass(frozen=True)
class Split:
    """Ratings to learn from, by user in time, and the truth, a film for each user.

    `user`, `item` and `at` are of the ratings; `truth` is the film of each of `users`, ascending;
    `is_cold` bool (n_users,).
    """

    user: Array
    item: Array
    at: Array
    users: Array
    truth: Array
    is_cold: Array


def split(user: Array, item: Array, at: Array, is_b: Array, part: str) -> Split:
    """Cut the ratings, by user in time, oldest first. `is_b` bool: of each film of number 0, 1, …"""
    cold_user = np.array([zlib.crc32(f"user {u}".encode()) % 5 == 0 for u in range(user.max() + 1)])
    if part == "validation":  # the test's truth and its cold users stay out of everything
        of_test = _before_last_of_b(user, item, at, is_b)
        kept = of_test.kept & ~cold_user[user]
        user, item, at = user[kept], item[kept], at[kept]
        cold_user = np.array(
            [zlib.crc32(f"again {u}".encode()) % 5 == 0 for u in range(len(cold_user))]
        )
    last = _before_last_of_b(user, item, at, is_b)
    kept = last.kept & ~(cold_user[user] & is_b[item])
    has_past = np.isin(last.users, user[kept])
    kept &= np.isin(user, last.users)
    users = last.users[has_past]
    return Split(user[kept], item[kept], at[kept], users, last.items[has_past], cold_user[users])


@dataclass(frozen=True)
class _Last:
    """Users with a film of view b, the last such film of each, and which ratings are older."""

    users: Array
    items: Array
    kept: Array


def _before_last_of_b(user: Array, item: Array, at: Array, is_b: Array) -> _Last:
    rows = np.flatnonzero(is_b[item])
    is_last = np.append(user[rows][1:] != user[rows][:-1], True)
    rows = rows[is_last]
    at_last = np.full(user.max() + 1, -np.inf)
    at_last[user[rows]] = at[rows]
    return _Last(user[rows], item[rows], at < at_last[user])


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    ratings = ml1m.ratings()
    if ratings is None:
        return
    asked = Asked.of(("popular", "mvdnn") if smoke else tuple(SETTINGS), smoke=smoke)
    if smoke:
        ratings = ratings[ratings["user_id"] <= 100]
    films = read_films().loc[np.unique(ratings["movie_id"])]
    user, item, at = ml1m.in_time(ratings)
    about = {"protocol": __doc__, "target": TARGET}
    table = Table("movielens_views", about, asked, against=_of_cuts(AGAINST))
    with asked.session(table.name) as (spark, folder):
        for cut in CUTS:
            is_b = views(films, cut)
            cut_ratings = split(user, item, at, is_b, asked.part)
            _describe(cut, is_b, cut_ratings)
            for seed in asked.seeds:
                for row, data, questions in _rows(
                    spark, f"{folder}/{cut}", films, is_b, cut, cut_ratings, asked.models
                ):
                    model, settings = SETTINGS[row]
                    settings = asked.settings(row, settings)
                    allowed = np.flatnonzero(is_b).astype(np.int32)
                    table.add(f"{row}, {cut}", model, settings, data, questions, seed, allowed)
                    spark.catalog.clearCache()  # the row's catalogue and queries


def _rows(
    spark: SparkSession,
    folder: str,
    films: pd.DataFrame,
    is_b: Array,
    cut_name: str,
    cut: Split,
    rows: tuple[str, ...],
) -> Iterator[tuple[str, Dataset, dict[str, Question]]]:
    """Yield each row, what it is fitted on, and the questions to cold and to other users.

    Questions of another cut have another name, so rows are compared within a cut only.
    """
    union = ml1m.log(cut.user, cut.item, cut.at)
    for row in rows:
        log = union.only(is_b[union.item_idx]) if row in ONLY_B else union
        data = ml1m.dataset(spark, log)
        data = replace(data, catalogue=catalogue(spark, films, is_b, data))
        if registry.make(*SETTINGS[row]).training_tables:
            files = synth.write_training(
                log, f"{folder}/{row}", "training_timelines", n_files=8, length=NEWEST
            )
            data = replace(data, training={files.table: files})
        queries = everybody(spark, log, union)
        questions = {
            f"{name} in b, {cut_name}": Question(queries, cut.users[asked], cut.truth[asked])
            for name, asked in (("cold", cut.is_cold), ("warm", ~cut.is_cold))
        }
        yield row, data, questions


def everybody(spark: SparkSession, log: synth.Log, union: synth.Log) -> DataFrame:
    """Return queries of all users of `union`, with the histories that `log` has of them."""
    queries = ml1m.queries(spark, log, masked=True)
    users = spark.createDataFrame(
        pa.table({"user_idx": pa.array(np.unique(union.user_idx), pa.int64())})
    )
    return users.join(queries, on="user_idx", how="left").persist()


def catalogue(spark: SparkSession, films: pd.DataFrame, is_b: Array, data: Dataset) -> DataFrame:
    """Return `schema.CONTENT` of the films with an event: title, genres and view."""
    genres = [
        [f"view {'b' if b else 'a'}", *of_film.split("|")]
        for b, of_film in zip(is_b, films["genres"], strict=True)
    ]
    rows = pa.table(
        {
            "item_idx": pa.array(np.arange(len(films)), pa.int32()),
            "item_name": pa.array(films["title"].tolist()),
            "category": pa.array(genres),
            "price": pa.array([None] * len(films), pa.float64()),
            "text": pa.array([None] * len(films), pa.string()),
        }
    )
    described = spark.createDataFrame(rows).join(
        data.items.select("item_idx"), on="item_idx", how="left_semi"
    )
    return synth.with_media(described).select(*schema.CONTENT.names).persist()


def read_films() -> pd.DataFrame:
    """Return title and genres of the films, by number."""
    path = Path(os.environ.get("RECSPARK_DATA", "../shared/data")) / "ml-1m" / "movies.dat"
    lines = path.read_text(encoding="latin-1").splitlines()
    cells = [line.split("::") for line in lines if line]
    films = pd.DataFrame(cells, columns=["movie_id", "title", "genres"])
    return films.assign(movie_id=films["movie_id"].astype(int)).set_index("movie_id")


def views(films: pd.DataFrame, cut: str) -> Array:
    """Return whether each film is in view b, bool (n_films,)."""
    if cut == "neutral":
        return np.array([zlib.crc32(f"film {n}".encode()) % 2 == 1 for n in films.index])
    return np.array([bool(_HARD & {*of_film.split("|")}) for of_film in films["genres"]])


def _of_cuts(rows: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of rows by cut: each is compared with those of its own cut."""
    return tuple(f"{row}, {cut}" for cut in CUTS for row in rows)


def _describe(cut: str, is_b: Array, ratings: Split) -> None:
    in_b = is_b[ratings.item].mean()
    print(
        f"{cut}: {(~is_b).sum()} films in view a, {is_b.sum()} in view b; {len(ratings.user):,} "
        f"ratings, {in_b:.0%} of them in view b; {ratings.is_cold.sum()} cold users and "
        f"{(~ratings.is_cold).sum()} others",
        flush=True,
    )

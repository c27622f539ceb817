"""MovieLens 1M, leave last out, the next film among all: `sasrec`, `gru4rec` and what stands beside.

Two protocols, models fitted in both on all but each user's last two ratings, whatever their value:

- `sasrec` (Kang & McAuley 2018): all ratings, users and films with 5 at least.
- `gru4rec` (RecBole's sequential one): ratings of 3 and more, users and films with 10 at least.

A third of a user's ratings share their second with the one before. In the first protocol their order
says next to nothing (56 % of users rate two films in the more usual order); in the second it is that
of the file, as RecBole's stable sort leaves it: much the same for all users (92 %), so easy to learn.

The last rating is the truth, all before it are read. `part=validation` asks for the last but one,
which is never trained on: for choosing settings; it chose size, dropout and epochs of `sasrec`
(each of few) and epochs and dropout of `gru4rec`; the others are guesses.
All films are ranked: `masked` without those that the user rated before, `unmasked` with them (as
RecBole does). `same_second` and `later` are `unmasked` of the users whose asked rating shares its
second with the one before, and of the others. Nobody is dropped; ties by the film's number. A
network trains on windows over the newest 512 ratings of each user.

    python -m benchmarks quality.movielens_next
    RECSPARK_ML='models=gru4rec:part=validation:set={"gru4rec"; {"epochs"; 3}}' \
        python -m benchmarks quality.movielens_next
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from benchmarks.quality import ml1m
from benchmarks.quality.ml1m import Asked, Question, Table
from recspark.data.dataset import Dataset
from recspark.models import registry
from recspark.testing import synth


@dataclass(frozen=True)
class Protocol:
    """Whose ratings count, of `rating` and more, users and films with `least` of them; how they lie."""

    rating: int
    least: int
    ties: Literal["rank", "file"]
    rows: tuple[str, ...]


BESIDE = ("popular", "item_knn", "ease", "session_knn")
PROTOCOLS = {
    "sasrec": Protocol(0, 5, "rank", (*BESIDE, "sasrec", "sasrec_gbce")),
    "gru4rec": Protocol(3, 10, "file", (*BESIDE, "gru4rec")),
}
# HSTU's table for sasrec, RecBole's for gru4rec.
PUBLISHED = {
    "sasrec": {"hit_rate@10": 0.3294, "ndcg@10": 0.1893},
    "gru4rec": {"hit_rate@10": 0.2844, "ndcg@10": 0.1662},
}
TARGET = {
    "sasrec": {"hit_rate@10": 0.30, "ndcg@10": 0.175},
    "gru4rec": {"hit_rate@10": 0.2776, "ndcg@10": 0.1545},
}
HISTORY: dict[str, Any] = {"train_on": "history", "context": "history"}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> model, settings
    "popular": ("popular", {"half_life_days": None}),
    "item_knn": ("item_knn", {"half_life_days": None, "n_neighbours": 200, "shrink": 50}),
    "ease": ("ease", {"half_life_days": None, "reg": 300}),
    "session_knn": (
        "session_knn",
        {**HISTORY, "method": "vsknn", "n_newest": 10_000, "n_neighbours": 500},
    ),
    "sasrec": (
        "sasrec",
        {
            **HISTORY, "length": 100, "embedding_size": 128, "n_samples": 256, "dropout": 0.3,
            "epochs": 40, "batch_size": 16, "learning_rate": 1.5e-3,
        },
    ),
    "sasrec_gbce": (
        "sasrec",
        {
            **HISTORY, "loss": "gbce", "length": 100, "embedding_size": 64, "n_samples": 256,
            "dropout": 0.2, "epochs": 40, "batch_size": 16, "learning_rate": 2e-3,
        },
    ),
    "gru4rec": (
        "gru4rec",
        {
            **HISTORY, "length": 50, "hidden_size": 128, "loss": "cross_entropy", "n_samples": 256,
            "sample_alpha": 0.5, "dropout": 0.2, "epochs": 14, "batch_size": 32,
            "learning_rate": 5e-3, "sparse": False,
        },
    ),
}  # fmt: skip


def run(*, smoke: bool) -> None:
    """Print and write the tables."""
    ratings = ml1m.ratings()
    if ratings is None:
        return
    for name, protocol in PROTOCOLS.items():
        asked = Asked.of(("popular", "session_knn") if smoke else protocol.rows, smoke=smoke)
        networks = set(asked.models) - set(BESIDE)
        if not networks or networks & set(protocol.rows):
            mine = tuple(row for row in asked.models if row in protocol.rows)
            measure(name, protocol, ratings, replace(asked, models=mine))


def measure(name: str, protocol: Protocol, ratings: pd.DataFrame, asked: Asked) -> None:
    """Print and write the table of one protocol."""
    liked = ratings[ratings["rating"] >= protocol.rating]
    if asked.smoke:
        liked = liked[liked["user_id"] <= 100]
    user, item, at = ml1m.in_time(ml1m.core(liked, protocol.least), protocol.ties)
    print(f"{len(user):,} ratings, {user.max() + 1} users, {item.max() + 1} films", flush=True)
    back = ml1m.from_end(user)
    truth = 1 if asked.part == "validation" else 0
    about = {"protocol": __doc__, "published": PUBLISHED[name], "target": TARGET[name]}
    table = Table(f"movielens_next_{name}", about, asked)
    with asked.session(table.name) as (spark, folder):
        train = ml1m.log(user[back > 1], item[back > 1], at[back > 1])
        read = ml1m.log(user[back > truth], item[back > truth], at[back > truth])
        data = ml1m.dataset(spark, train)
        asked_of = {
            key: ml1m.queries(spark, read, masked=key == "masked") for key in ("masked", "unmasked")
        }
        is_asked = back == truth
        same_second = is_asked & (np.diff(at, prepend=-1) == 0)
        rows = {
            "masked": is_asked,
            "unmasked": is_asked,
            "same_second": same_second,
            "later": is_asked & ~same_second,
        }
        questions = {
            key: Question(asked_of.get(key, asked_of["unmasked"]), user[mine], item[mine])
            for key, mine in rows.items()
        }
        for seed in asked.seeds:
            for row in asked.models:
                model, settings = SETTINGS[row]
                settings = asked.settings(row, settings)
                mine = with_training(data, train, model, settings, f"{folder}/{name}")
                table.add(row, model, settings, mine, questions, seed)


def with_training(
    data: Dataset, train: synth.Log, model: str, settings: dict[str, Any], folder: str
) -> Dataset:
    """Return `data` with windows of one film more than the model reads, if it trains on any."""
    recommender = registry.make(model, settings)
    if not recommender.training_tables:
        return data
    length = int(recommender.settings.model_dump()["length"]) + 1
    files = synth.write_training(
        train,
        f"{folder}/windows-{length}",
        recommender.training_tables[0],
        n_files=8,
        length=length,
    )
    return replace(data, training={files.table: files})

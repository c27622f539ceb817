"""MovieLens 1M by time: ratings of 3 and more, the last fifth of them all is the truth.

The fifth begins at the time of the row four fifths down the ratings in the order of time; equal times
stay together. Users and films without a rating before it are dropped from the truth (cold), films
that a user rated before are masked, all other films are ranked; ties by the film's number; NDCG@10
with binary gains over the users left. The protocol of RePlay's comparison; a third of the times here
are interpolated within a user, so the cut is approximate.

`part=validation` cuts the first four fifths in the same way: how the settings of `als` and `item2vec`
were chosen; `item_knn` and `ease` have those of the random split.

    python -m benchmarks quality.movielens_time
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.quality import ml1m, movielens
from benchmarks.quality.ml1m import Asked, Question, Table
from recspark.data.blocks import Array

# RePlay's table (its README): NDCG@10 of its own models.
PUBLISHED = {"als": 0.265, "popular": 0.244, "item2vec": 0.138}
TARGET = {"als": "1.086 times popular", "item2vec": "popular"}
SETTINGS: dict[str, dict[str, Any]] = {
    "popular": movielens.SETTINGS["popular"],
    "item_knn": movielens.SETTINGS["item_knn"],
    "ease": movielens.SETTINGS["ease"],
    "als": {
        "half_life_days": None, "embedding_size": 8, "reg": 0.3, "alpha": 2, "iterations": 10,
    },
    "item2vec": {
        "half_life_days": None, "sentence": "history", "window": 10, "epochs": 5, "n_blocks": 1,
    },
}  # fmt: skip


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    ratings = ml1m.ratings()
    if ratings is None:
        return
    asked = Asked.of(("popular", "als") if smoke else tuple(SETTINGS), smoke=smoke)
    liked = ratings[ratings["rating"] >= 3]
    if smoke:
        liked = liked[liked["user_id"] % 20 == 0]
    user, item, at = ml1m.in_time(liked)
    if asked.part == "validation":
        early = at < cut(at)
        user, item, at = user[early], item[early], at[early]
    late = at >= cut(at)
    warm = late & np.isin(user, user[~late]) & np.isin(item, item[~late])
    about = {"protocol": __doc__, "published": PUBLISHED, "target": TARGET}
    table = Table("movielens_time", about, asked)
    with asked.session("movielens_time") as (spark, _):
        train = ml1m.log(user[~late], item[~late], at[~late])
        data = ml1m.dataset(spark, train)
        question = Question(ml1m.queries(spark, train, masked=True), user[warm], item[warm])
        print(
            f"{len(train.age):,} ratings before, {warm.sum():,} of {late.sum():,} after are warm, of "
            f"{len(np.unique(user[warm]))} users",
            flush=True,
        )
        for seed in asked.seeds:
            for row in asked.models:
                table.add(
                    row, row, asked.settings(row, SETTINGS[row]), data, {"masked": question}, seed
                )


def cut(at: Array) -> int:
    """Return the time at which the last fifth begins."""
    return int(np.sort(at)[int(0.8 * len(at))])

"""MovieLens 1M, leave last out, ranked among 1 + 100 random unseen films (Rendle et al. 2021).

All ratings count alike, whatever their value. Each user's last one in time is the truth, the others
are trained on. It is ranked among itself and 100 films drawn evenly, without replacement, from
those that the user never rated (`among_100`; another draw for each seed), or 99 as in He et al.'s
files (`among_99`). Nobody is dropped; a film that nobody rated before is never listed; ties by the
film's number. A sampled figure: not to be compared with one of a full ranking.

The settings of `als` are the paper's, those of `item_knn` and `ease` the random split's;
`part=validation` leaves the last out of everything and asks for the one before.

    python -m benchmarks quality.movielens_last
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pyspark.sql import DataFrame

from benchmarks.quality import ml1m, movielens
from benchmarks.quality.ml1m import Asked, Question, Table
from recspark.data.blocks import Array

N_DRAWN = (100, 99)
# Of Rendle et al. 2021, "Revisiting the Performance of iALS on Item Recommendation Benchmarks", their
# lambda .007 and alpha_0 .3 in our words (`Objective`).
PUBLISHED = {"als": {"hit_rate@10": 0.731, "ndcg@10": 0.4521}}
TARGET = {"als": {"hit_rate@10": 0.728, "ndcg@10": 0.450}}
SETTINGS: dict[str, dict[str, Any]] = {
    "popular": movielens.SETTINGS["popular"],
    "item_knn": movielens.SETTINGS["item_knn"],
    "ease": movielens.SETTINGS["ease"],
    "als": {
        "half_life_days": None, "embedding_size": 192, "reg": 0.007 * 1.3, "reg_counts": "all",
        "alpha": 0.3, "unobserved_weight": 0.3, "iterations": 12, "cg_steps": 8,
    },
}  # fmt: skip


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    ratings = ml1m.ratings()
    if ratings is None:
        return
    asked = Asked.of(("popular", "als") if smoke else tuple(SETTINGS), smoke=smoke)
    if smoke:
        ratings = ratings[ratings["user_id"] <= 100]
    user, item, at = ml1m.in_time(ratings)
    back = ml1m.from_end(user) - (asked.part == "validation")  # 0 = the truth
    about = {"protocol": __doc__, "published": PUBLISHED, "target": TARGET}
    table = Table("movielens_last", about, asked)
    with asked.session("movielens_last") as (spark, folder):
        train = ml1m.log(user[back > 0], item[back > 0], at[back > 0])
        data = ml1m.dataset(spark, train)
        asked_of = ml1m.queries(spark, train, masked=True)
        for seed in asked.seeds:
            rated = np.zeros((user.max() + 1, item.max() + 1), bool)
            rated[user, item] = True
            truth = item[back == 0]  # (n_users,)
            questions = {
                f"among_{n}": question(asked_of, rated, truth, n, seed, f"{folder}/{seed}-{n}")
                for n in N_DRAWN
            }
            for row in asked.models:
                table.add(row, row, asked.settings(row, SETTINGS[row]), data, questions, seed)


def question(
    asked: DataFrame,
    rated: Array,
    truth: Array,
    n: int,
    seed: int,
    folder: str,
) -> Question:
    """Return the queries `asked`, which mask all films but the truth and `n` unrated ones.

    `rated` bool (n_users, n_items); `truth` int32 (n_users,).
    """
    users = np.arange(len(truth))
    draw = np.random.default_rng(seed).random(rated.shape, np.float32)
    draw[rated] = 2  # comes last
    masked = np.ones(rated.shape, bool)
    np.put_along_axis(masked, np.argpartition(draw, n, axis=1)[:, :n], False, axis=1)
    masked[users, truth] = False
    return Question(ml1m.with_seen(asked, *np.nonzero(masked), folder), users, truth)

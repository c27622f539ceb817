"""MovieLens 1M, leave last out, all films ranked: user towers and what stands beside them.

All ratings count alike, whatever their value; nobody is dropped. Each user's last one in time is
the truth, the others are trained on and read, and are masked in the lists. `part=validation` leaves
the last out of everything and asks for the one before: for choosing settings. Ties by the film's
number. Hits are also counted among the first 100.

The truth lies right after what is read, and three of five users rated all their films on one day.
So the day tells little here (steps of `tdssm` are minutes). The cutoff, after the last rating of
all, is years later than most users' last one: what the example age of `youtube_dnn` says at scoring
("now") is not true of them.

    python -m benchmarks quality.movielens_towers
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.quality import ml1m
from benchmarks.quality.ml1m import Asked, Question, Table
from recspark.models import registry
from recspark.testing import synth

LONGEST = 100
NEWEST = 512  # ratings of a user that a network trains on
# Of counts of which film follows which, made without this project.
TARGET = {"hit_rate@10": 0.1925, "ndcg@10": 0.1128, "hit_rate@100": 0.468}
_YOUTUBE: dict[str, Any] = {
    "windows": (50, 5, 1), "n_examples": 32, "batch_size": 32, "n_samples": 256, "dropout": 0.1,
    "epochs": 8, "learning_rate": 5e-3,
}  # fmt: skip
# Users rate for some minutes, mostly on one day: a step is a minute here, a slow one ten. Guesses but
# for n_examples: NDCG@10 on the validation part, after ten epochs, .1146 with 16 and .1228 with 32
# (temperature .05, .07, .1: .1121, .1146, .1166).
_TDSSM: dict[str, Any] = {
    "fast_hours": 1 / 60, "slow_hours": 1 / 6, "n_fast": 5, "n_slow": 4,
    "steps_from": "newest_event", "temperature": 0.1, "n_examples": 32, "batch_size": 32,
    "n_samples": 256, "epochs": 10,
}  # fmt: skip
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> model, settings
    "popular": ("popular", {"half_life_days": None}),
    "transitions": ("transitions", {"window": 1, "last_n": 1, "n_followers": 4000}),
    "item_knn": ("item_knn", {"half_life_days": None, "n_neighbours": 200, "shrink": 50}),
    "ease": ("ease", {"half_life_days": None, "reg": 300}),
    "youtube_dnn_no_age": ("youtube_dnn", {**_YOUTUBE, "example_age": False}),
    "youtube_dnn_one_mean": ("youtube_dnn", {**_YOUTUBE, "example_age": False, "windows": (50,)}),
    "youtube_dnn": ("youtube_dnn", _YOUTUBE),
    "tdssm_static": ("tdssm", {**_TDSSM, "parts": ("static",)}),
    "tdssm_one_rate": ("tdssm", {**_TDSSM, "parts": ("static", "fast")}),
    "tdssm": ("tdssm", _TDSSM),
}
AGAINST = (
    "popular", "transitions", "item_knn", "ease", "youtube_dnn_no_age", "tdssm_static",
    "tdssm_one_rate",
)  # fmt: skip


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    ratings = ml1m.ratings()
    if ratings is None:
        return
    asked = Asked.of(("popular", "youtube_dnn") if smoke else tuple(SETTINGS), smoke=smoke)
    if smoke:
        ratings = ratings[ratings["user_id"] <= 100]
    user, item, at = ml1m.in_time(ratings)
    back = ml1m.from_end(user) - (asked.part == "validation")  # 0 = the truth
    about = {"protocol": __doc__, "target": TARGET}
    table = Table("movielens_towers", about, asked, LONGEST, AGAINST)
    with asked.session(table.name) as (spark, folder):
        train = ml1m.log(user[back > 0], item[back > 0], at[back > 0])
        data = ml1m.dataset(spark, train)
        files = synth.write_training(
            train, f"{folder}/timelines", "training_timelines", n_files=8, length=NEWEST
        )
        timelines = replace(data, training={files.table: files})
        queries = ml1m.queries(spark, train, masked=True)
        questions = {"masked": Question(queries, user[back == 0], item[back == 0])}
        for seed in asked.seeds:
            for row in asked.models:
                model, settings = SETTINGS[row]
                settings = asked.settings(row, settings)
                is_tower = bool(registry.make(model, settings).training_tables)
                table.add(row, model, settings, timelines if is_tower else data, questions, seed)

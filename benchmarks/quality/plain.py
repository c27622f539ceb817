"""Our networks with their default settings beside a plain torch loop of the same paper and settings.

MovieLens 1M by RecBole's random split, as in `quality.movielens`: NDCG@10, test part, the items of the
other parts masked. The loops are in `plain_nets.py`, at most 60 lines each; they see a dense matrix.

    python -m benchmarks quality.plain
    RECSPARK_ML=models=mf:part=validation python -m benchmarks quality.plain
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.quality import ml1m, movielens
from benchmarks.quality.ml1m import Asked, Table
from benchmarks.quality.movielens import Split
from benchmarks.quality.plain_nets import NETS
from recspark.models import registry

# What they are measured against has the settings of `quality.movielens`; the networks their defaults.
SETTINGS = {row: movielens.SETTINGS[row] for row in ("popular", "item_knn", "ease")}


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    ratings = ml1m.ratings()
    if ratings is None:
        return
    asked = Asked.of(("popular", "mf") if smoke else (*SETTINGS, *NETS), smoke=smoke)
    ratings = ratings[ratings["rating"] > 0]
    if smoke:
        ratings = ratings[ratings["user_id"] <= 300]
    table = Table("plain", {"protocol": __doc__}, asked)
    with asked.session("plain") as (spark, scratch):
        for seed in asked.seeds:
            split = Split(ratings, seed, f"{scratch}/plain-{seed}", spark, asked.part)
            for row in asked.models:
                settings = asked.settings(row, SETTINGS.get(row, {"half_life_days": None}))
                if smoke and row in NETS:
                    settings["epochs"] = 1
                table.add(row, row, settings, split.data, {"masked": split.question}, seed)
                if row in NETS:
                    add_plain(table, row, settings, split, seed)


def add_plain(table: Table, row: str, settings: dict[str, Any], split: Split, seed: int) -> None:
    """Train the plain loop, score its lists, print and write the row."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    user, item = split.masked
    matrix = torch.zeros(int(user.max()) + 1, int(item.max()) + 1)
    matrix[
        torch.from_numpy(split.train.user_idx), torch.from_numpy(split.train.item_idx).long()
    ] = 1
    begun = time.perf_counter()
    scores = NETS[row](matrix, registry.make(row, settings).settings).numpy()
    seconds = round(time.perf_counter() - begun, 1)
    scores[user, item] = -np.inf
    name = f"{row}{ml1m.PLAIN}"
    figures = table.scored(name, "masked", split.question, ml1m.lists_of(scores), seed)
    table.write(name, seed, {"fit_seconds": seconds, "masked": figures})

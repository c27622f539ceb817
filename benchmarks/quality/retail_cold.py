"""The bundled shop, products without a sale: ranked by their names and prices for those who bought them.

A product is cold at a cutoff if its first sale lies in the 15 days after it. The users are those who
bought before the cutoff, and one of its cold products in these 15 days. Each user's truth is ranked among
all cold products of the cutoff, by what was sold before it: NDCG@10 and NDCG@3, and their mean over users.
The data describe a product by its sales only, so the name and price of its first sale stand for those of a
catalogue that came before it. Nothing else of the horizon is read.

The cutoff of the other benchmarks of this shop, 2010-11-25, has 11 cold products; so the two horizons before
it, which do not overlap with it, are reported too, and all three together. Settings were chosen by the mean
NDCG@10 of three earlier cutoffs (`SETTINGS`), none of whose horizons is reported.

- `popular_oracle` : how many users buy the cold product in the horizon. Nobody knows it in time.
- `random` : the mean of 200 orders, for each user
- `content_knn` : by the words of the names, tf-idf
- `content_factors` : on `als`, by the words of the names (tf-idf, 100 dimensions of its SVD) and the price
- `content_factors: price` : the same by the price alone

Differences to `random` are paired over users, with a bootstrap interval of 95 %.

    python -m benchmarks quality.retail_cold
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import SparkSession

from benchmarks import machine
from benchmarks.quality import cold, ml1m
from benchmarks.quality.movielens_cold import lsa, tfidf, unit_rows, words
from recspark import schema
from recspark.data.blocks import Array
from recspark.models import registry
from recspark.models.base import FitOptions
from recspark.testing import synth

RAW = Path(__file__).parents[2] / "data" / "online_retail_ii" / "online_retail_2009_2010.parquet"
HORIZON = pd.Timedelta(days=15)
SETTINGS = ("2010-08-12", "2010-09-09", "2010-10-07")
REPORTED = ("2010-10-26", "2010-11-10", "2010-11-25")
KS = (10, 3)
N_ORDERS = 200  # of the row `random`
# Of `als`: the defaults of its class. Those of conf/models were chosen at one of the reported cutoffs.
ALS: dict[str, Any] = {}
GRID: dict[str, list[dict[str, Any]]] = {
    "content_knn": [
        {"n_neighbours": n, "half_life_days": days}
        for n, days in itertools.product((10, 50, None), (None, 60))
    ],
    "content_factors": [
        {"fields": fields, "weighting": weighting}
        for fields, weighting in itertools.product(([], ["price"]), ("items", "users"))
    ],
}


@dataclass(frozen=True)
class Cutoff:
    """The question of one cutoff.

    `log` : sales before it, users and products numbered from 0; ages count from it. `names`, `price` :
    of all products, the cold ones too; `truth` bool (n_users_asked, n_cold), `asked` : the users' numbers,
    ascending; `cold_items` : the products' numbers, ascending.
    """

    day: str
    log: synth.Log
    names: list[str]
    price: Array
    asked: Array
    cold_items: Array
    truth: Array

    @cached_property
    def asked_log(self) -> synth.Log:
        """The sales of the users who are asked."""
        return self.log.only(np.isin(self.log.user_idx, self.asked))

    def figures(self, scores: Array) -> dict[str, Array]:
        """Return each asked user's NDCG; `scores` (n_users_asked, n_cold)."""
        order = np.argsort(-scores, axis=1, kind="stable")
        hits = np.take_along_axis(self.truth, order, axis=1)
        out = {}
        for k in KS:
            discount = 1 / np.log2(np.arange(2, min(k, hits.shape[1]) + 2))
            best = np.cumsum(discount)[np.minimum(len(discount), self.truth.sum(axis=1)) - 1]
            out[f"ndcg@{k}"] = hits[:, : len(discount)] @ discount / best
        return out


def sales() -> pd.DataFrame:
    """Return the sales of the bundled data: user, item, name, price, at."""
    raw = pd.read_parquet(RAW)
    code = raw["StockCode"].astype(str)
    is_sale = (
        raw["Customer ID"].notna()
        & (raw["Quantity"] > 0)
        & (raw["Price"] > 0)
        & ~raw["Invoice"].astype(str).str.upper().str.startswith("C")
        & code.str.match(r"^\d{5}")
    )
    raw = raw[is_sale]
    rows = pd.DataFrame(
        {
            "user": raw["Customer ID"].astype(int),
            "item": raw["StockCode"].astype(str),
            "name": raw["Description"].fillna("").astype(str),
            "price": raw["Price"].astype(float),
            "at": pd.to_datetime(raw["InvoiceDate"]),
        }
    )
    return rows.sort_values("at", kind="stable")


def question(rows: pd.DataFrame, day: str) -> Cutoff:
    """Return the question of a cutoff."""
    cutoff = pd.Timestamp(day)
    before = rows[rows["at"] < cutoff]
    after = rows[(rows["at"] >= cutoff) & (rows["at"] < cutoff + HORIZON)]
    is_cold = ~after["item"].isin(before["item"]) & after["user"].isin(before["user"])
    bought = after[is_cold].drop_duplicates(["user", "item"])
    described = pd.concat([before, after[is_cold]]).drop_duplicates("item").sort_values("item")
    users, user = np.unique(before["user"], return_inverse=True)
    item = np.searchsorted(described["item"], before["item"]).astype(np.int32)
    age = (cutoff - before["at"]).dt.total_seconds().to_numpy() / 86_400
    asked = np.unique(np.searchsorted(users, bought["user"]))
    cold_items = np.unique(np.searchsorted(described["item"], bought["item"]))
    truth = np.zeros((len(asked), len(cold_items)), bool)
    truth[
        np.searchsorted(asked, np.searchsorted(users, bought["user"])),
        np.searchsorted(cold_items, np.searchsorted(described["item"], bought["item"])),
    ] = True
    return Cutoff(
        day,
        synth.Log(user.astype(np.int64), item, age, np.ones(len(user), np.float32)),
        described["name"].tolist(),
        described["price"].to_numpy(),
        asked,
        cold_items.astype(np.int32),
        truth,
    )


class Fits:
    """The models of one cutoff, with the scores that they give to its cold products."""

    def __init__(self, spark: SparkSession, cutoff: Cutoff, als: dict[str, Any]) -> None:
        self.cutoff, self.als_settings = cutoff, als
        n = len(cutoff.names)
        columns = {
            "item_idx": pa.array(np.arange(n), pa.int32()),
            "item_name": pa.array(cutoff.names),
            "category": pa.nulls(n, pa.list_(pa.string())),
            "price": pa.array(cutoff.price),
            "text": pa.nulls(n, pa.string()),
            "media": pa.nulls(n, pa.list_(pa.string())),
        }
        catalogue = pa.table({name: columns[name] for name in schema.CONTENT.names})
        matrix = tfidf(map(words, cutoff.names))
        vectors = {"names": unit_rows(matrix), "topics": lsa(matrix, 100)}
        self.data = cold.dataset(spark, cutoff.log, catalogue, vectors)

    @cached_property
    def als(self) -> Any:
        """Fitted `als`."""
        return registry.make("als", self.als_settings).fit(self.data, FitOptions())

    def scores(self, model: str, settings: dict[str, Any], *, names: bool = True) -> Array:
        """Return the scores of a content model for the users who are asked."""
        if model == "content_knn":
            fitted = cold.fit(model, {**settings, "items": "cold"}, self.data, ["names"])
        else:
            encoders = ["topics"] if names else []
            fitted = cold.fit(
                model, {**settings, "items": "cold"}, self.data, encoders, {"als": self.als}
            )
        return cold.scores(fitted, self.cutoff.asked_log, self.cutoff.cold_items)


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    rows = sales()
    print(__doc__, flush=True)
    settings, reported = (SETTINGS[-1:], REPORTED[-1:]) if smoke else (SETTINGS, REPORTED)
    als = ALS | ({"iterations": 1, "embedding_size": 8} if smoke else {})
    with machine.session("retail_cold", ["master=local[2]"], smoke=smoke) as spark:
        chosen = chosen_settings([Fits(spark, question(rows, day), als) for day in settings], smoke)
        figures = figures_of([Fits(spark, question(rows, day), als) for day in reported], chosen)
    if not smoke:
        about = {"protocol": __doc__, "settings": chosen, "rows": figures}
        machine.write("retail_cold", "python -m benchmarks quality.retail_cold", about)


def chosen_settings(fits: list[Fits], smoke: bool) -> dict[str, dict[str, Any]]:
    """Return the settings of each model with the best mean NDCG@10 over all users of `fits`."""
    chosen = {}
    for model, grid in GRID.items():
        values = []
        for settings in grid[: 1 if smoke else None]:
            of_users = [fit.cutoff.figures(fit.scores(model, settings))["ndcg@10"] for fit in fits]
            values.append(float(np.concatenate(of_users).mean()))
            print(f"settings: {model} {settings}: {values[-1]:.4f}", flush=True)
        chosen[model] = grid[int(np.argmax(values))]
    return chosen


def figures_of(fits: list[Fits], chosen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print and return cutoff -> row -> figures; `all` are the users of all cutoffs together."""
    price_only = {**chosen["content_factors"], "fields": ["price"]}
    of_rows: dict[str, dict[str, dict[str, Array]]] = {}  # row -> cutoff -> metric -> users
    for fit in fits:
        cutoff = fit.cutoff
        made = {
            "popular_oracle": cutoff.figures(
                np.broadcast_to(cutoff.truth.sum(axis=0), cutoff.truth.shape)
            ),
            "random": random_figures(cutoff),
            "content_knn": cutoff.figures(fit.scores("content_knn", chosen["content_knn"])),
            "content_factors": cutoff.figures(
                fit.scores("content_factors", chosen["content_factors"])
            ),
            "content_factors: price": cutoff.figures(
                fit.scores("content_factors", price_only, names=False)
            ),
        }
        for row, values in made.items():
            of_rows.setdefault(row, {})[cutoff.day] = values
    figures: dict[str, Any] = {}
    days = [fit.cutoff.day for fit in fits]
    for day in [*days, "all"]:
        part = days if day == "all" else [day]
        n_items = {fit.cutoff.day: len(fit.cutoff.cold_items) for fit in fits}
        for row, by_day in of_rows.items():
            found = {
                f"ndcg@{k}": summary([by_day[d][f"ndcg@{k}"] for d in part],
                                     [of_rows["random"][d][f"ndcg@{k}"] for d in part])
                for k in KS
            }  # fmt: skip
            found["users"] = sum(len(by_day[d][f"ndcg@{KS[0]}"]) for d in part)
            found["cold_items"] = [n_items[d] for d in part]
            figures.setdefault(day, {})[row] = found
            print(f"{day} {row}: {json.dumps(found)}", flush=True)
    return figures


def random_figures(cutoff: Cutoff) -> dict[str, Array]:
    """Return the mean figures of each user over random orders."""
    rng = np.random.default_rng(0)
    drawn = [cutoff.figures(rng.random(cutoff.truth.shape)) for _ in range(N_ORDERS)]
    return {name: np.mean([values[name] for values in drawn], axis=0) for name in drawn[0]}


def summary(values: Iterable[Array], others: Iterable[Array]) -> dict[str, Any]:
    """Return the mean, and the mean difference to `others` with the ends of its interval."""
    mine, theirs = np.concatenate([*values]), np.concatenate([*others])
    users = np.arange(len(mine))
    return {
        "mean": round(float(mine.mean()), 4),
        "minus_random": ml1m.interval(users, mine - theirs),
    }

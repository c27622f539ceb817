"""Click data by published protocols: classifiers of fields, AUC and log loss on the test part.

The data may not be redistributed: it is looked for below RECSPARK_DATA (default `../shared/data`).

- `frappe`: Frappe as BARS splits it (Frappe_x1), all ten columns as fields. Of the training part the
  items of the negatives were drawn again, among items that the user never used.
- `adult`: Adult census, the official test file; a tenth of the training file, drawn at random, is the
  validation part. Six numbers, the others fields.
- `ml1m`: MovieLens 1M without ratings of 3, a rating of 4 or 5 is a click; fields user, age, gender,
  occupation, film, its first three genres and its year; a random 8:1:1 of the rows.

The rows are trained on through the same files, feed and launcher as a night's examples. Training ends
by the loss on the validation part. Settings are chosen by `validation_auc`. `wide_deep without crosses` is its row
without crosses; `minus` is the difference of AUC to it and its paired bootstrap interval over rows (95 %).

    python -m benchmarks quality.clicks
    RECSPARK_ML=models=frappe pnn,adult wide_deep:seeds=3 python -m benchmarks quality.clicks

`part=validation` scores the validation part alone, and writes nothing.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from benchmarks.quality.ml1m import Asked, Table
from recspark.config import digest
from recspark.data.blocks import Array
from recspark.data.dataset import Examples
from recspark.data.feature_encoding import parse_encoded
from recspark.data.training_fields import examples_of_table
from recspark.models import registry
from recspark.models.base import FitOptions, PairBlock
from recspark.models.rankers.fields import FieldsAlgorithm, FieldsRankerModel
from recspark.models.rankers.wide_deep import WideDeepModel
from recspark.train.curve import Curve

N_BOOTSTRAP = 1000
PARTS = ("train", "validation", "test")
# BARS (Frappe_x1): IPNN, Wide & Deep. ML-1M clicks: RecBole's table.
PUBLISHED = {
    "frappe pnn": 0.9841,
    "frappe wide_deep": 0.9841,
    "ml1m pnn": 0.8967,
    "ml1m wide_deep": 0.8987,
}
TARGET = {
    "frappe pnn": 0.982,
    "frappe wide_deep": 0.982,
    "ml1m pnn": 0.8967,
    "ml1m wide_deep": 0.8987,
    "adult wide_deep": 0.925,
}
# Those of BARS on Frappe_x1, but for the wide part and for a higher rate, which falls linearly. After 15
# epochs pnn has a validation AUC of .9832 (BARS .9849 after 33), wide_deep after 12 one of .9780.
_BARS = {
    "embedding_size": 10, "hidden_sizes": [400, 400, 400], "batch_size": 4096, "epochs": 25,
    "learning_rate": 3e-3, "embedding_reg": 0.03, "patience": 3,
}  # fmt: skip
_FRAPPE_WIDE = {**_BARS, "dropout": 0.4, "batch_norm": True}
_FRAPPE_CROSSES = [
    ["user", "item"], ["item", "daytime"], ["item", "weekday"], ["item", "homework"],
    ["item", "weather"], ["item", "city"],
]  # fmt: skip
# With a bucket for each of the 1,000 most even steps of a number: validation AUC of pnn .9155 with
# 100 buckets, .9189 with 1,000 (most people have no capital gain; what the others have tells much).
_ADULT = {
    "embedding_size": 8, "hidden_sizes": [64, 32], "batch_size": 256, "epochs": 15, "dropout": 0.2,
    "learning_rate": 1e-3, "embedding_reg": 1e-3, "patience": 3, "n_buckets": 1000,
    "n_quantiles": 10_000,
}  # fmt: skip
_ADULT_CROSSES = [
    ["education", "occupation"], ["marital_status", "occupation"], ["age", "occupation"],
    ["relationship", "sex"], ["age", "education", "occupation"], ["capital_gain", "capital_loss"],
]  # fmt: skip
_ML1M = {
    "embedding_size": 16, "hidden_sizes": [128, 64], "batch_size": 2048, "epochs": 10,
    "dropout": 0.2, "learning_rate": 2e-3, "embedding_reg": 1e-5, "patience": 2,
}  # fmt: skip
_ML1M_CROSSES = [["user", "genres_1"], ["user", "year"], ["age", "item"], ["occupation", "item"]]
NO_CROSSES = " without crosses"
SETTINGS: dict[str, dict[str, Any]] = {
    "frappe wide_deep without crosses": {**_FRAPPE_WIDE, "crosses": []},
    "frappe wide_deep": {**_FRAPPE_WIDE, "crosses": _FRAPPE_CROSSES},
    "frappe pnn": {**_BARS, "layer": "concat", "dropout": 0.3},
    "adult wide_deep without crosses": {**_ADULT, "crosses": []},
    "adult wide_deep": {**_ADULT, "crosses": _ADULT_CROSSES},
    "adult pnn": {**_ADULT, "layer": "concat"},
    "adult youtube_rank": {
        **{name: value for name, value in _ADULT.items() if name != "n_buckets"},
        "weigh_by": "one",
    },
    "ml1m wide_deep without crosses": {**_ML1M, "crosses": []},
    "ml1m wide_deep": {**_ML1M, "crosses": _ML1M_CROSSES},
    "ml1m pnn": {**_ML1M, "layer": "concat"},
}


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    root = Path(os.environ.get("RECSPARK_DATA", "../shared/data"))
    if not root.exists():
        print(f"no data at {root}: set RECSPARK_DATA to the folder that holds frappe_x1")
        return
    rows = ("adult wide_deep without crosses", "adult pnn") if smoke else tuple(SETTINGS)
    asked = Asked.of(rows, smoke=smoke)
    about = {"protocol": __doc__, "published": PUBLISHED, "target": TARGET}
    results = Table("clicks", about, asked)
    with asked.session("clicks") as (spark, folder):
        for seed in asked.seeds:
            tables: dict[str, dict[str, Examples]] = {}
            scored: dict[str, tuple[Array, Array]] = {}
            for row in asked.models:
                name, model = row.removesuffix(NO_CROSSES).split(" ")
                if name not in tables:
                    tables[name] = examples(spark, LOADERS[name](root), seed, smoke=smoke)
                settings = asked.settings(row, SETTINGS[row])
                place = f"{folder}/{digest([row, settings, seed])}"
                figures = fit(asked, tables[name], model, settings, seed, place)
                label, logits = figures.pop("scored")
                scored[row] = label, logits
                plain = f"{name} {model}{NO_CROSSES}"
                if plain in scored and plain != row:
                    figures["minus"] = {plain: difference(label, logits, scored[plain][1])}
                results.write(row, seed, figures)


def fit(
    asked: Asked,
    parts: dict[str, Examples],
    model: str,
    settings: dict[str, Any],
    seed: int,
    folder: str,
) -> dict[str, Any]:
    """Return the figures of one training, with label and logit of each row scored."""
    curves: list[Curve] = []
    options = FitOptions(
        train=asked.train.model_copy(update={"seed": seed}),
        progress=lambda text: print(f"  {text}", flush=True),
        record=curves.append,
        scratch=folder,
    )
    algorithm = registry.make(model, settings)
    assert isinstance(algorithm, FieldsAlgorithm)
    begun = time.perf_counter()
    fitted = algorithm.learn(parts["train"], options, held_out=parts["validation"])
    seconds = time.perf_counter() - begun
    label, logits = logits_of(fitted, parts[asked.part])
    [curve] = curves
    figures = {
        "settings": algorithm.settings.model_dump(),
        "auc": round(auc(label, logits), 5),
        "validation_auc": round(auc(*logits_of(fitted, parts["validation"])), 5),
        "log_loss": round(float(np.logaddexp(0, np.where(label > 0, -logits, logits)).mean()), 5),
        "n_rows": len(label),
        "epochs": len(curve.epochs),
        "best_epoch": curve.best,
        "fit_seconds": round(seconds, 1),
        "scored": (label, logits),
    }
    if isinstance(fitted, WideDeepModel):
        figures["wide_seen"] = fitted.n_wide_seen
        figures["wide_zero_share"] = round(fitted.zero_share, 4)
    return figures


def logits_of(model: FieldsRankerModel, examples: Examples) -> tuple[Array, Array]:
    """Return label and logit of each row, on the driver."""
    labels, logits = [], []
    for batch in examples.rows.toArrow().to_batches():
        numbers, fields = parse_encoded(batch, model.encoding)
        nobody = np.zeros(batch.num_rows, np.int64)
        block = PairBlock(nobody, nobody.astype(np.int32), numbers, fields)
        labels.append(batch.column("label").to_numpy())
        logits.append(model.pair_scorer().logits(block))
    return np.concatenate(labels), np.concatenate(logits)


@dataclass(frozen=True)
class Ranks:
    """Rows in the order of their scores: `group` of equal scores, and whether they are positive."""

    order: Array
    group: Array
    is_positive: Array

    @classmethod
    def of(cls, label: Array, score: Array) -> Ranks:
        order = np.argsort(score, kind="stable")
        group = np.unique(score[order], return_inverse=True)[1]
        return cls(order, group, label[order] > 0)

    def auc(self, weight: Array) -> float:
        """Return the weighted share of pairs in order; an equal pair counts half."""
        ordered = weight[self.order]
        positive = np.bincount(self.group, ordered * self.is_positive)
        negative = np.bincount(self.group, ordered * ~self.is_positive)
        below = np.cumsum(negative) - negative / 2
        return float((positive * below).sum() / (positive.sum() * negative.sum()))


def auc(label: Array, score: Array) -> float:
    """Return the area under the ROC curve of all rows together.

    >>> auc(np.array([0, 1, 0, 1]), np.array([1.0, 2.0, 2.0, 3.0]))
    0.875
    """
    return Ranks.of(label, score).auc(np.ones(len(label)))


def difference(label: Array, score: Array, other: Array) -> list[float]:
    """Return AUC less that of `other`, and the ends of its paired bootstrap interval over rows."""
    ours, others = Ranks.of(label, score), Ranks.of(label, other)
    rng, ones = np.random.default_rng(1), np.ones(len(label))
    drawn = []
    for _ in range(N_BOOTSTRAP):
        weight = rng.poisson(1.0, len(label)).astype(float)
        drawn.append(ours.auc(weight) - others.auc(weight))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return [round(float(value), 5) for value in (ours.auc(ones) - others.auc(ones), low, high)]


# ------------------------------------------------------------------------------------------- data


def examples(
    spark: SparkSession, frame: pd.DataFrame, seed: int, *, smoke: bool
) -> dict[str, Examples]:
    """Return the examples of each part; vocabularies are those of the training part.

    `frame` has a column `part`, one of `PARTS`; where it is missing, rows of the training part are
    drawn for validation.
    """
    if smoke:
        frame = frame.sample(2000, random_state=1)
    part = frame.pop("part").to_numpy(object)
    rng = np.random.default_rng(seed)
    if (part == "any").any():
        part = np.array(PARTS, object)[np.searchsorted([0.8, 0.9], rng.random(len(part)), "right")]
    elif "validation" not in part:
        part[(part == "train") & (rng.random(len(part)) < 0.1)] = "validation"

    def rows(name: str) -> DataFrame:
        return spark.createDataFrame(
            pa.Table.from_pandas(frame[part == name], preserve_index=False)
        )

    train = examples_of_table(rows("train"))
    return {
        "train": train,
        **{name: examples_of_table(rows(name), encoding=train.encoding) for name in PARTS[1:]},
    }


def frappe(root: Path) -> pd.DataFrame:
    """Return Frappe_x1; every column is a field."""
    files = {"train": "train", "validation": "valid", "test": "test"}
    parts = [
        pd.read_parquet(root / "frappe_x1" / f"{file}.parquet").astype(str).assign(part=part)
        for part, file in files.items()
    ]
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(label=frame["label"].astype(float))


ADULT = (
    "age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation",
    "relationship", "race", "sex", "capital_gain", "capital_loss", "hours_per_week",
    "native_country", "label",
)  # fmt: skip


def adult(root: Path) -> pd.DataFrame:
    """Return the census; `?` is missing."""
    parts = [
        pd.read_csv(
            root / "adult" / f"adult.{part}.gz", names=list(ADULT), skipinitialspace=True,
            na_values="?", comment="|",
        ).assign(part=name)
        for name, part in (("train", "data"), ("test", "test"))
    ]  # fmt: skip
    frame = pd.concat(parts, ignore_index=True).dropna(subset="label")
    numbers = {n: frame[n].astype(float) for n in frame.select_dtypes("number").columns}
    return frame.assign(**numbers, label=frame["label"].str.startswith(">50K").astype(float))


def ml1m(root: Path) -> pd.DataFrame:
    """Return the ratings with users and films; all columns are fields."""
    folder = root / "ml-1m"
    ratings = pd.read_parquet(folder / "ratings.parquet")[["user_id", "movie_id", "rating"]]
    ratings = ratings[(ratings["rating"] > 0) & (ratings["rating"] != 3)]

    def read(name: str, columns: list[str]) -> pd.DataFrame:
        [path] = folder.glob(f"{name}.dat*")
        return pd.read_csv(
            path, sep="::", names=columns, engine="python", encoding="latin-1", dtype=str
        )

    users = read("users", ["user", "gender", "age", "occupation", "zip"]).drop(columns="zip")
    films = read("movies", ["item", "title", "genres"])
    films["year"] = films["title"].str.extract(r"\((\d{4})\)\s*$")[0]
    genres = films["genres"].str.split("|", expand=True).reindex(columns=range(3))
    films = films.drop(columns=["title", "genres"]).join(genres.add_prefix("genres_"))
    films = films.rename(columns={f"genres_{n}": f"genres_{n + 1}" for n in (2, 1, 0)})
    frame = pd.DataFrame(
        {
            "label": (ratings["rating"] >= 4).astype(float),
            "user": ratings["user_id"].astype(str),
            "item": ratings["movie_id"].astype(str),
            "part": "any",
        }
    )
    return frame.merge(users, on="user", how="left").merge(films, on="item", how="left")


LOADERS = {"frappe": frappe, "adult": adult, "ml1m": ml1m}

"""MovieLens 1M, films without an event, by their posters alone: the encoders `colours` and `image`.

The protocol, the data and the bars are those of `quality.movielens_cold`: 458 cold films, NDCG@10.
Rows by `colours`: `knn50` and `mean_sim` rank by cosines, `ridge` by regression on the factors.
`image` learns the same factors as `ridge`, on posters of warm films only, and ranks by user factor .
predicted factor; `image + colours ridge` is the regression on the vectors of both.

The settings of `image` were chosen by its error on the warm films that it holds out, never on cold
ones.

    python -m benchmarks quality.posters
    RECSPARK_POSTERS='seed=2:set={"epochs";10}' python -m benchmarks quality.posters
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession

from benchmarks import machine
from benchmarks.quality.movielens_cold import ColdFilms, cold_films
from recspark import schema
from recspark.config import Train
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.models import registry
from recspark.models.base import EncoderModel, FitOptions
from recspark.models.factors.als import AlsModel, AlsSettings
from recspark.testing import synth

IMAGE: dict[str, Any] = {"network": "small", "image_size": 64, "width": 16, "epochs": 30}


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    question = cold_films()
    if question is None:
        return
    chosen = dict(
        part.split("=", 1) for part in os.environ.get("RECSPARK_POSTERS", "").split(":") if part
    )
    changed = {"epochs": 1} if smoke else json.loads(chosen.get("set", "{}").replace(";", ":"))
    seed = int(chosen.get("seed", "1"))
    figures: dict[str, dict[str, float]] = {}

    def add(row: str, scores: Array, **more: float) -> None:
        means = {name: round(float(v.mean()), 4) for name, v in question.figures(scores).items()}
        figures[row] = {**means, **more}
        print(f"{row:24s} {figures[row]}", flush=True)

    with (
        tempfile.TemporaryDirectory() as folder,
        machine.session("posters", ["master=local[2]"], smoke=smoke) as spark,
    ):
        data = _dataset(spark, question, Path(folder))
        options = FitOptions(
            train=Train(ranks=2, threads=1, seed=seed, timeout_s=3000),  # type: ignore[call-arg]
            progress=lambda text: print(f"  {text}", flush=True),
        )
        colours = _vectors(registry.make("colours", {}).fit(data, options), data)
        add("colours knn50", question.knn(colours))
        add("colours mean_sim", question.knn(colours, None))
        add("colours ridge", question.ridge(colours))
        users, factors = question.factors
        warm = np.flatnonzero(~question.is_cold).astype(np.int32)
        needed = {"factors": AlsModel(AlsSettings(), data.cutoff, warm, factors)}  # type: ignore[call-arg]
        begun = time.perf_counter()
        image = registry.make("image", {**IMAGE, **changed}).fit(data, options, needed)
        seconds = round(time.perf_counter() - begun, 1)
        vectors = _vectors(image, data)
        add("image", users @ vectors[question.is_cold].T, fit_s=seconds)
        add("image + colours ridge", question.ridge(vectors, colours))
    if not smoke and not chosen:
        machine.write(
            "posters",
            "python -m benchmarks quality.posters",
            {"settings": IMAGE, "figures": figures},
        )


def _dataset(spark: SparkSession, question: ColdFilms, folder: Path) -> Dataset:
    """Return films as items, in the order of the question; warm ones have an event."""
    n = len(question.films)
    paths = [folder / f"{film}.jpg" for film in question.films["movie_id"]]
    for path, jpeg in zip(paths, question.films["jpeg"], strict=True):
        path.write_bytes(jpeg)
    warm = np.flatnonzero(~question.is_cold).astype(np.int32)
    ones = np.ones(len(warm))
    log = synth.Log(np.zeros(len(warm), np.int64), warm, ones, ones.astype(np.float32))
    rows = pa.table(
        {
            "item_idx": pa.array(np.arange(n), pa.int32()),
            "item_name": pa.array(question.films["title"]),
            "category": pa.nulls(n, pa.list_(pa.string())),
            "price": pa.nulls(n, pa.float64()),
            "text": pa.nulls(n, pa.string()),
            "media": pa.array([[str(path)] for path in paths]),
        }
    )
    return replace(synth.dataset(spark, log), catalogue=spark.createDataFrame(rows, schema.CONTENT))


def _vectors(model: Any, data: Dataset) -> Array:
    """Return the vector of each film, (n_films, size)."""
    assert isinstance(model, EncoderModel)
    assert data.catalogue is not None
    rows = model.encode(data.catalogue).toArrow().sort_by("item_idx")
    assert rows.num_rows == data.catalogue.count()
    return np.array(rows.column("vector").to_pylist(), np.float64)

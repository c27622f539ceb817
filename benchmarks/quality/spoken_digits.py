"""Spoken digits as items, planted preferences: does `audio` place recordings that nobody knows yet?

Free Spoken Digit Dataset (Jackson et al., CC BY-SA 4.0): 3,000 recordings at 8 kHz, ten digits, six
speakers. The archive `fsdd/fsdd.tar.xz` is looked for below RECSPARK_DATA (default
`../shared/data`). The sounds are real; who likes which is planted, because no public data have both.

Protocol: an item is a recording. Recordings 0 to 4 of each digit and speaker (the data's own test
part, 300) are cold: nobody acts on them. Each of 3,000 users likes two digits (population `digits`)
or two speakers (`speakers`), drawn at random, and acts on 20 of the liked warm recordings. A user's
factor is folded in from these acts, and ranks the 300 cold recordings by predicted factors. Truth
are all cold recordings that the user likes: NDCG@10, where an oracle that knows the digit (the
speaker) has 1. `shuffled` gives every item the recording of another, before training and at scoring.

Rows: `random`; `mean_spectrum`: ridge regression from the mean and the deviation of each mel band to
the factors, lambda chosen on a tenth of the warm items; `audio` with its default settings but an
excerpt of one second.

    python -m benchmarks quality.spoken_digits
    RECSPARK_DIGITS=populations=digits:seed=2 python -m benchmarks quality.spoken_digits
"""

from __future__ import annotations

import os
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark.sql import SparkSession

from benchmarks import machine
from recspark import schema
from recspark.config import Train
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.engines.als_kernels import fold_in
from recspark.models import registry
from recspark.models.base import EncoderModel, FitOptions
from recspark.models.content.audio import AudioModel
from recspark.models.factors.als import AlsModel
from recspark.testing import synth

N_USERS, N_ACTS, N_TEST, K = 3000, 20, 5, 10
ALS = {"embedding_size": 16, "iterations": 8, "half_life_days": None, "alpha": 10.0, "n_blocks": 2}
AUDIO: dict[str, Any] = {"excerpt_seconds": 1.0}
POPULATIONS = ("digits", "speakers", "shuffled")


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    archive = Path(os.environ.get("RECSPARK_DATA", "../shared/data")) / "fsdd" / "fsdd.tar.xz"
    if not archive.exists():
        print(f"no data at {archive}: set RECSPARK_DATA to the folder that holds fsdd")
        return
    chosen = dict(
        part.split("=", 1) for part in os.environ.get("RECSPARK_DIGITS", "").split(":") if part
    )
    populations = chosen.get("populations", "digits" if smoke else ",".join(POPULATIONS)).split(",")
    first = int(chosen.get("seed", "1"))
    seeds = range(first, first + int(chosen.get("seeds", "1")))
    audio = {**AUDIO, "epochs": 1} if smoke else AUDIO
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        machine.session("spoken digits", ["master=local[2]"], smoke=smoke) as spark,
    ):
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        sounds = sorted(Path(folder, "recordings").glob("*.wav"))
        for population in populations:
            for seed in seeds:
                world = World(spark, sounds[::10] if smoke else sounds, population, seed)
                for row, values in world.rows(audio).items():
                    figures.setdefault(population, {}).setdefault(row, []).append(values)
                    print(f"{population:9s} seed {seed} {row:14s} {values}", flush=True)
    if not smoke and not chosen:
        about = {"settings": {"als": ALS, "audio": audio}, "k": K, "users": N_USERS}
        machine.write(
            "spoken_digits",
            "python -m benchmarks quality.spoken_digits",
            {**about, "figures": figures},
        )


class World:
    """The recordings as items, and users who like some of them."""

    def __init__(self, spark: SparkSession, sounds: list[Path], population: str, seed: int) -> None:
        rng = np.random.default_rng([seed, 1])
        parts = [sound.stem.split("_") for sound in sounds]  # digit, speaker, number
        kind = 1 if population == "speakers" else 0
        names, group = np.unique([part[kind] for part in parts], return_inverse=True)
        self.group = group.ravel()  # (n_items,)
        self.is_cold = np.array([int(part[2]) < N_TEST for part in parts])
        self.likes = np.zeros((N_USERS, len(names)), bool)
        for row in self.likes:
            row[rng.choice(len(names), 2, replace=False)] = True
        acts = []
        for liked in self.likes:
            items = np.flatnonzero(liked[self.group] & ~self.is_cold)
            acts.append(np.sort(rng.choice(items, min(N_ACTS, len(items)), replace=False)))
        self.start = np.cumsum([0, *map(len, acts)])
        self.acts = np.concatenate(acts).astype(np.int32)
        # The sound of each item; shuffled among the warm items and among the cold ones.
        order = np.arange(len(sounds))
        if population == "shuffled":
            for is_part in (self.is_cold, ~self.is_cold):
                order[is_part] = rng.permutation(order[is_part])
        addresses = [str(sounds[n]) for n in order]
        self.spark, self.seed, self.rng = spark, seed, rng
        self.data = self._dataset(addresses)

    def _dataset(self, addresses: list[str]) -> Dataset:
        n_acts = len(self.acts)
        users = np.repeat(np.arange(N_USERS), np.diff(self.start))
        log = synth.Log(users, self.acts, np.ones(n_acts), np.ones(n_acts, np.float32))
        n = len(addresses)
        rows = pa.table(
            {
                "item_idx": pa.array(np.arange(n), pa.int32()),
                "item_name": pa.nulls(n, pa.string()),
                "category": pa.nulls(n, pa.list_(pa.string())),
                "price": pa.nulls(n, pa.float64()),
                "text": pa.nulls(n, pa.string()),
                "media": pa.array([[address] for address in addresses]),
            }
        )
        data = synth.dataset(self.spark, log)
        return replace(data, catalogue=self.spark.createDataFrame(rows, schema.CONTENT))

    def rows(self, audio: dict[str, Any]) -> dict[str, dict[str, float]]:
        """Return the figures of each row."""
        options = FitOptions(
            train=Train(ranks=2, threads=1, seed=self.seed, timeout_s=3000),  # type: ignore[call-arg]
            progress=lambda text: print(f"  {text}", flush=True),
        )
        als = registry.make("als", ALS).fit(self.data, options)
        assert isinstance(als, AlsModel)
        local = np.searchsorted(als.items, self.acts).astype(np.int32)
        weights = np.ones(len(local), np.float32)
        users = fold_in(self.start, local, weights, als.factors, als.settings.objective)  # type: ignore[attr-defined]
        rows = {"random": {"ndcg": self.ndcg(self.rng.random((N_USERS, self.is_cold.sum())))}}
        begun = time.perf_counter()
        model = registry.make("audio", audio).fit(self.data, options, {"als": als})
        seconds = time.perf_counter() - begun
        assert isinstance(model, AudioModel)
        for row, vectors in (
            ("mean_spectrum", self.mean_spectrum(model, als)),
            ("audio", self.vectors(model)),
        ):
            rows[row] = {"ndcg": self.ndcg(users @ vectors[self.is_cold].T)}
        rows["audio"]["fit_s"] = round(seconds, 1)
        return rows

    def vectors(self, model: EncoderModel) -> Array:
        """Return the vector of each item, (n_items, K)."""
        assert self.data.catalogue is not None
        rows = model.encode(self.data.catalogue).toArrow().sort_by("item_idx")
        assert rows.num_rows == len(self.group)
        return np.array(rows.column("vector").to_pylist(), np.float32)

    def mean_spectrum(self, model: AudioModel, als: AlsModel) -> Array:
        """Return the factors as ridge regression predicts them, (n_items, K)."""
        assert self.data.catalogue is not None
        reader, n_bands = model.reader(), model.settings.n_bands
        features = []
        for row in self.data.catalogue.toArrow().sort_by("item_idx").column("media").to_pylist():
            inputs = reader.read(Path(row[0]).read_bytes())
            frames = inputs["frames"].reshape(-1, n_bands)[: int(inputs["n_frames"])]
            features.append(np.concatenate([frames.mean(axis=0), frames.std(axis=0)]))
        x = np.array(features, np.float64)
        x = (x - x[als.items].mean(axis=0)) / x[als.items].std(axis=0)
        y = als.factors.astype(np.float64)
        centre = y.mean(axis=0)
        is_held_out = np.random.default_rng(self.seed).random(len(y)) < 0.1

        def solved(rows: Array, reg: float) -> Array:
            mine, targets = x[als.items][rows], (y - centre)[rows]
            gram = mine.T @ mine + reg * np.eye(mine.shape[1])
            return np.asarray(np.linalg.solve(gram, mine.T @ targets))

        def error(reg: float) -> float:
            predicted = x[als.items][is_held_out] @ solved(~is_held_out, reg)
            return float(((predicted - (y - centre)[is_held_out]) ** 2).mean())

        best = min((0.1, 1.0, 10.0, 100.0, 1000.0), key=error)
        return np.asarray(x @ solved(np.ones(len(y), bool), best) + centre)

    def ndcg(self, scores: Array) -> float:
        """Return the mean NDCG@10 of `scores` (N_USERS, n_cold)."""
        truth = self.likes[:, self.group[self.is_cold]]  # (N_USERS, n_cold)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        discounts = 1 / np.log2(np.arange(2, K + 2))
        gains = np.take_along_axis(truth, best, axis=1) @ discounts
        n_best = np.minimum(truth.sum(axis=1), K)
        return round(float((gains / np.cumsum(discounts)[n_best - 1]).mean()), 4)

"""Vectors of words: `word_vectors` beside gensim, on the same words, with the same settings.

The plots of the films of `quality.movielens_cold`, whose data it needs. Both: skip-gram, 100 dimensions,
window 8 drawn anew for each target, 5 negatives by uses^.75, subsampling 1e-3, 30 epochs, rate .025.
gensim gets the words that our dictionary knows, as lists. Seconds and CPU seconds of a fit; ours also
cuts the texts into words and counts them within that time, on Spark. Quality: the cold films of
`quality.movielens_cold` by the 50 nearest films (`knn50`), NDCG@10; the vector of a film is the mean of its
words' vectors, weighted by idf, made by the same code for both.

    RECSPARK_ML=seeds=5 python -m benchmarks words
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.memory import cpu_seconds
from benchmarks.quality import cold
from benchmarks.quality.ml1m import Asked
from benchmarks.quality.movielens_cold import ColdFilms, catalogue, cold_films
from recspark.data.dataset import Dataset
from recspark.models.base import FitOptions
from recspark.models.content.word_vectors import WordVectors, WordVectorsModel, WordVectorsSettings
from recspark.testing import synth

SETTINGS = WordVectorsSettings(parts=("text",), epochs=30)
WORKERS = (1, 2)  # blocks of ours, threads of gensim


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    question = cold_films()
    if question is None:
        return
    print(__doc__, flush=True)
    asked = Asked.of(("ours", "gensim"), smoke=smoke)
    settings = SETTINGS.model_copy(update={"epochs": 1}) if smoke else SETTINGS
    if smoke:
        question = question.of_users(200)
    spark_settings = ["master=local[2]", "driver_memory=4g", "shuffle_partitions=2"]
    rows = []
    with machine.session("words", spark_settings, smoke=smoke, env="cluster") as spark:
        nobody = synth.log([(0, 0, 1.0)])
        data = cold.dataset(spark, nobody, catalogue(question.films), {})
        workers = WORKERS[-1:] if smoke else WORKERS
        fits = [(name, n, seed) for seed in asked.seeds for n in workers for name in asked.models]
        warm = ours(data, settings.model_copy(update={"epochs": 2}), 2, 1)
        words = known_words(question, warm)
        for name, n, seed in fits:
            fit = (
                partial(ours, data, settings, n, seed)
                if name == "ours"
                else partial(gensim, warm, words, settings, n, seed)
            )
            row = measured(question, fit)
            rows.append({"name": name, "workers": n, "seed": seed, **row})
            print(rows[-1], flush=True)
    figures = summary(rows)
    print(figures)
    if not smoke:
        about = {"protocol": __doc__, "settings": settings.model_dump(mode="json")}
        command = "RECSPARK_ML=seeds=5 python -m benchmarks words"
        machine.write("words", command, {**about, **figures, "rows": rows})


def measured(question: ColdFilms, fit: Callable[[], WordVectorsModel]) -> dict[str, float]:
    """Return what a fit takes, and how good its vectors are."""
    begun, cpu = time.perf_counter(), cpu_seconds()
    model = fit()
    taken = {"seconds": time.perf_counter() - begun, "cpu_seconds": cpu_seconds() - cpu}
    [batch] = catalogue(question.films).combine_chunks().to_batches()
    vectors = np.nan_to_num(model.coder().encode(batch))  # a film without a known word: 0
    figures = question.figures(question.knn(vectors))
    return {**taken, **{name: float(values.mean()) for name, values in figures.items()}}


def ours(data: Dataset, settings: WordVectorsSettings, n: int, seed: int) -> WordVectorsModel:
    """Fit `word_vectors` in n blocks."""
    options = FitOptions()
    options = replace(options, train=options.train.model_copy(update={"seed": seed}))
    return WordVectors(settings.model_copy(update={"n_blocks": n})).fit(data, options)


def known_words(question: ColdFilms, model: WordVectorsModel) -> list[list[int]]:
    """Return the numbers of the known words of each film's plot, in their order."""
    [batch] = catalogue(question.films).combine_chunks().to_batches()
    start, numbers = model.dictionary.numbers(batch, SETTINGS.parts)
    return [numbers[a:b].tolist() for a, b in itertools.pairwise(start)]


def gensim(
    model: WordVectorsModel,
    words: list[list[int]],
    settings: WordVectorsSettings,
    workers: int,
    seed: int,
) -> WordVectorsModel:
    """Return `model` with vectors that gensim has trained, in one process with `workers` threads."""
    from gensim.models import Word2Vec as GensimWord2Vec

    trained: Any = GensimWord2Vec(
        words,
        vector_size=settings.embedding_size,
        window=settings.window,
        shrink_windows=True,
        sg=1,
        negative=settings.n_negatives,
        ns_exponent=settings.ns_exponent,
        sample=settings.subsample or 0,
        min_count=1,
        epochs=settings.epochs,
        alpha=settings.learning_rate,
        min_alpha=0.0001,
        workers=workers,
        seed=seed,
    )
    vectors = np.stack([trained.wv[word] for word in range(len(model.dictionary))])
    return WordVectorsModel(settings, model.cutoff, model.dictionary, vectors)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds by name and workers, and ours' CPU seconds over gensim's."""
    cases = dict.fromkeys((row["name"], row["workers"]) for row in rows)
    figures = ("seconds", "cpu_seconds", "ndcg@10")
    means = {
        f"{name} {n}": {
            figure: round(
                statistics.fmean(
                    row[figure] for row in rows if (row["name"], row["workers"]) == (name, n)
                ),
                4,
            )
            for figure in figures
        }
        for name, n in cases
    }
    ratios = {
        f"cpu of ours over gensim, {n}": round(
            means[f"ours {n}"]["cpu_seconds"] / means[f"gensim {n}"]["cpu_seconds"], 2
        )
        for name, n in cases
        if name == "ours" and ("gensim", n) in cases
    }
    return {"means": means, "ratios": ratios}

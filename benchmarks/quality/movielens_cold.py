"""MovieLens 1M, films without an event: ranked by their posters, plots, genres and people.

The data may not be redistributed: the folders `ml-1m` and `posters_ml1m` are looked for below
RECSPARK_DATA (default `../shared/data`).

Ratings of 4 and more count alike. Of the films with a known rating, a poster and a plot of more than 20
characters (2,290), 458 are cold: a fixed draw. None of their ratings is trained on. A user with at
least 5 warm films and one cold film (5,988 users) is asked for the best of the 458: NDCG@10 with
min(10, |truth|), HR@10; ties by the film's number. The tenths of a percent of rows by similarity
depend on how ties are broken: films share their genres.

Rows of numpy, which learn nothing of the cold films:

- `knn50`: sum over the user's warm films of the cosine; a cold film keeps the 50 most similar ones
- `mean_sim`: the same with all warm films
- `ridge`: regression from content to the item factors of an SVD (48 factors) of the warm matrix, one
  penalty, chosen on 15 % of the warm films; the score is user factor . predicted factor

Rows of our models, all retrievers as a night fits them, with the same vectors as encoders: `content_knn`
with its defaults, and `content_factors` on `als` (settings of `quality.movielens`, chosen on another
split). Beside the blocks of the ridge rows there are the colours of the poster, a histogram of
4 x 4 x 4. All differences are paired, with a bootstrap interval of 95 %.

`popular_oracle` counts the ratings of the cold films themselves, which nobody knows in time.

    python -m benchmarks quality.movielens_cold
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from PIL import Image
from scipy import sparse

from benchmarks import machine
from benchmarks.quality import cold, ml1m, movielens
from recspark import schema
from recspark.data.blocks import Array
from recspark.models import registry
from recspark.models.base import FitOptions
from recspark.testing import synth

K = 10
N_COLD, LEAST_WARM, LEAST_PLOT = 458, 5, 20
N_FACTORS, VALIDATION = 48, 0.15
PENALTIES = 10.0 ** np.arange(-2, 5, 0.5)
# Measured once by another script with the same protocol; its genres and people were cut into words
# in another way.
EARLIER = {
    "popular_oracle": 0.352, "random": 0.0457, "genres knn50": 0.1187, "plot knn50": 0.1318,
    "people knn50": 0.1790, "genres ridge": 0.1426, "people ridge": 0.1693,
    "genres + plot + people + year ridge": 0.2199,
}  # fmt: skip
FIELDS = (
    "movie_id", "title", "year", "rated", "released", "genres", "director", "writer", "cast",
    "plot", "poster",
)  # fmt: skip


@dataclass(frozen=True)
class ColdFilms:
    """The question: films, which of them are cold, what users liked.

    Parameters
    ----------
    films : `FIELDS` and `jpeg`, a row per film, ascending by `movie_id`
    is_cold : bool (n_films,)
    user_id : (n_users,), ascending: the users asked
    warm : CSR (n_users, n_warm), 1 where the user liked the film
    truth : bool (n_users, n_cold)

    Warm and cold films are numbered in the order of `films`.
    """

    films: pd.DataFrame
    is_cold: Array
    user_id: Array
    warm: sparse.csr_matrix
    truth: Array

    def of_users(self, n: int) -> ColdFilms:
        """Return the question of the first `n` users."""
        return replace(self, user_id=self.user_id[:n], warm=self.warm[:n], truth=self.truth[:n])

    def figures(self, scores: Array) -> dict[str, Array]:
        """Return each user's `ndcg@10` and `hit_rate@10`; `scores` (n_users, n_cold)."""
        top = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        hits = np.take_along_axis(self.truth, top, axis=1)
        discount = 1 / np.log2(np.arange(2, K + 2))
        best = np.cumsum(discount)[np.minimum(K, self.truth.sum(axis=1)) - 1]
        return {f"ndcg@{K}": hits @ discount / best, f"hit_rate@{K}": hits.any(axis=1) * 1.0}

    def knn(self, vectors: Array | sparse.csr_matrix, n: int | None = 50) -> Array:
        """Return scores by similarity; `vectors` (n_films, size). `n` = None keeps all warm films."""
        units = unit_rows(vectors)
        cosines = units[self.is_cold] @ units[~self.is_cold].T  # (n_cold, n_warm)
        if n is not None:
            nearest = np.argsort(-cosines, axis=1, kind="stable")
            np.put_along_axis(cosines, nearest[:, n:], 0.0, axis=1)
        return np.asarray(self.warm @ cosines.T)

    @cached_property
    def factors(self) -> tuple[Array, Array]:
        """The user factors (n_users, 48) and the factors of warm films (n_warm, 48)."""
        _, vectors = np.linalg.eigh((self.warm.T @ self.warm).toarray())
        items = vectors[:, ::-1][:, :N_FACTORS]  # of length 1
        return np.asarray(self.warm @ items), items

    def ridge(self, *blocks: Array) -> Array:
        """Return scores by regression on the factors; each block is (n_films, size)."""
        users, items = self.factors
        content = np.hstack(blocks)
        warm = content[~self.is_cold]
        is_held = np.random.default_rng(1).random(len(warm)) < VALIDATION
        errors = [
            np.square(
                solved(warm[~is_held], items[~is_held], penalty)(warm[is_held]) - items[is_held]
            ).sum()
            for penalty in PENALTIES
        ]
        penalty = PENALTIES[int(np.argmin(errors))]
        return np.asarray(users @ solved(warm, items, penalty)(content[self.is_cold]).T)


def solved(content: Array, targets: Array, penalty: float) -> Callable[[Array], Array]:
    """Return the ridge regression from `content` to `targets`, with an intercept."""
    mean, target_mean = content.mean(axis=0), targets.mean(axis=0)
    centred = content - mean
    gram = centred.T @ centred + penalty * np.eye(content.shape[1])
    weights = np.linalg.solve(gram, centred.T @ (targets - target_mean))
    return lambda rows: np.asarray((rows - mean) @ weights + target_mean)


def cold_films() -> ColdFilms | None:
    """Return the protocol's data, or say that it is missing."""
    folder = Path(os.environ.get("RECSPARK_DATA", "../shared/data"))
    ratings = ml1m.ratings()
    if ratings is None or not (folder / "posters_ml1m").exists():
        print(f"no data at {folder}: set RECSPARK_DATA to the folder with ml-1m and posters_ml1m")
        return None
    posters = pd.read_parquet(folder / "posters_ml1m" / "posters.parquet")
    path = folder / "ml-1m" / "movies_extrainfos.dat.gz"
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as lines:
        films = pd.DataFrame([line.rstrip("\n").split("::") for line in lines], columns=FIELDS)
    films["movie_id"] = films["movie_id"].astype(int)
    films = films.merge(posters, on="movie_id", how="inner").sort_values("movie_id")
    is_rated = films["movie_id"].isin(ratings.loc[ratings["rating"] > 0, "movie_id"])
    films = films[is_rated & (films["plot"].str.len() > LEAST_PLOT)].reset_index(drop=True)
    is_cold = np.zeros(len(films), bool)
    is_cold[np.random.default_rng(0).permutation(len(films))[:N_COLD]] = True
    liked = ratings[(ratings["rating"] >= 4) & ratings["movie_id"].isin(films["movie_id"])]
    user_id, user = np.unique(liked["user_id"], return_inverse=True)
    film = np.searchsorted(films["movie_id"], liked["movie_id"])
    pairs = sparse.csr_matrix((np.ones(len(liked)), (user, film)), (len(user_id), len(films)))
    warm, cold = pairs[:, ~is_cold], pairs[:, is_cold]
    is_asked = (warm.getnnz(axis=1) >= LEAST_WARM) & (cold.getnnz(axis=1) >= 1)
    truth = cold[is_asked].toarray() > 0
    return ColdFilms(films, is_cold, user_id[is_asked], warm[is_asked].tocsr(), truth)


# --- content of the films ------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def people(film: Any) -> list[str]:
    """Return the names of director, writers and cast, without what they did."""
    names = f"{film.director},{film.writer},{film.cast}".split(",")
    return [name for part in names if (name := re.sub(r"\(.*?\)", "", part).strip())]


def tfidf(documents: Iterable[Sequence[str]], least: int = 2) -> sparse.csr_matrix:
    """Return (1 + log tf) log(n / df) of words that `least` documents have."""
    counts = [Counter(document) for document in documents]
    n_documents = Counter(word for count in counts for word in count)
    vocabulary = sorted(word for word, n in n_documents.items() if n >= least)
    idf = {word: np.log(len(counts) / n_documents[word]) for word in vocabulary}
    column = {word: index for index, word in enumerate(vocabulary)}
    entries = [
        (row, column[word], (1 + np.log(n)) * idf[word])
        for row, count in enumerate(counts)
        for word, n in count.items()
        if word in column
    ]
    rows, columns, values = (np.array(part) for part in zip(*entries, strict=True))
    return sparse.csr_matrix((values, (rows, columns)), (len(counts), len(vocabulary)))


def unit_rows(vectors: Array | sparse.csr_matrix) -> Array:
    """Return the rows, float64, each divided by its length; a row of zeros stays."""
    dense = vectors.toarray() if sparse.issparse(vectors) else np.asarray(vectors, np.float64)
    return dense / np.maximum(np.sqrt((dense**2).sum(axis=1, keepdims=True)), 1e-12)


def lsa(matrix: sparse.csr_matrix, size: int) -> Array:
    """Return rows of length 1 of the truncated SVD of `matrix`, (n, size)."""
    squares, vectors = np.linalg.eigh((matrix @ matrix.T).toarray())
    return unit_rows(vectors[:, ::-1][:, :size] * np.sqrt(np.maximum(squares[::-1][:size], 0)))


@dataclass(frozen=True)
class Content:
    """What is known of a film before anyone rates it, one row per film."""

    films: pd.DataFrame

    @cached_property
    def genres(self) -> sparse.csr_matrix:
        """The words of the genres (25), tf-idf."""
        return tfidf(map(words, self.films["genres"]), 1)

    @cached_property
    def plot(self) -> sparse.csr_matrix:
        """The words of the plot, tf-idf."""
        return tfidf(map(words, self.films["plot"]))

    @cached_property
    def people(self) -> sparse.csr_matrix:
        """The names of director, writers and cast, tf-idf."""
        return tfidf(map(people, self.films.itertuples()))

    @cached_property
    def decade(self) -> Array:
        """The decade of the film, one hot; (n_films, n_decades)."""
        decade = self.films["year"].str[:4].astype(int) // 10
        return np.equal.outer(decade.to_numpy(), np.unique(decade)).astype(float)

    @cached_property
    def colours(self) -> Array:
        """The share of each of 4 x 4 x 4 colours of the poster; (n_films, 64)."""
        return np.stack([histogram(jpeg) for jpeg in self.films["jpeg"]])

    @cached_property
    def dense(self) -> dict[str, Array]:
        """Blocks for a regression, name -> (n_films, size); rows have the length 1."""
        return {
            "genres": unit_rows(self.genres),
            "plot": lsa(self.plot, 200),
            "people": lsa(self.people, 300),
            "year": self.decade,
        }


def histogram(jpeg: bytes) -> Array:
    """Return the share of each of 4 x 4 x 4 colours, (64,)."""
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")).reshape(-1, 3) // 64
    codes = pixels @ np.array([16, 4, 1])
    return np.bincount(codes, minlength=64) / len(codes)


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    question = cold_films()
    if question is None:
        return
    print(__doc__, flush=True)
    if smoke:
        question = question.of_users(200)
    table = Table(question, smoke)
    reference_rows(question, table)
    model_rows(question, table)


@dataclass
class Table:
    """Rows of figures; `results/movielens_cold.json` is written after each row, but in smoke mode."""

    question: ColdFilms
    smoke: bool

    def __post_init__(self) -> None:
        self._of_rows: dict[str, dict[str, Array]] = {}

    def ndcg(self, row: str) -> float:
        """Return the NDCG@10 of a row that was added."""
        return float(self._of_rows[row][f"ndcg@{K}"].mean())

    def add(self, row: str, scores: Array, against: Sequence[str] = (), **more: Any) -> None:
        """Print and write the figures of `scores` (n_users, n_cold), and what they differ by from
        the rows `against`, with the ends of a paired interval (95 %).
        """
        values = self._of_rows[row] = self.question.figures(scores)
        figures: dict[str, Any] = {name: round(float(v.mean()), 4) for name, v in values.items()}
        if against:
            figures["minus"] = {
                other: {
                    name: ml1m.interval(self.question.user_id, value - self._of_rows[other][name])
                    for name, value in values.items()
                }
                for other in against
            }
        figures |= more
        print(f"{row}: {json.dumps(figures)}", flush=True)
        if self.smoke:
            return
        path = machine.RESULTS / "movielens_cold.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else {}
        rows[row] = figures
        about = {"protocol": __doc__, "earlier": EARLIER, "rows": rows}
        machine.write("movielens_cold", "python -m benchmarks quality.movielens_cold", about)


def reference_rows(question: ColdFilms, table: Table) -> None:
    """Add the rows of numpy."""
    content = Content(question.films)
    n_ratings = question.truth.sum(axis=0)
    table.add("popular_oracle", np.broadcast_to(n_ratings, question.truth.shape))
    table.add("random", np.random.default_rng(0).random(question.truth.shape))
    for name in ("genres",) if table.smoke else ("genres", "plot", "people"):
        vectors = getattr(content, name)
        table.add(f"{name} knn50", question.knn(vectors))
        table.add(f"{name} mean_sim", question.knn(vectors, None))
    if table.smoke:
        return
    blocks = content.dense
    for name, block in blocks.items():
        table.add(f"{name} ridge", question.ridge(block))
    names = ("genres", "plot", "people")
    table.add(" + ".join(names) + " ridge", question.ridge(*(blocks[name] for name in names)))
    table.add(" + ".join(blocks) + " ridge", question.ridge(*blocks.values()))


def model_rows(question: ColdFilms, table: Table) -> None:
    """Add the rows of our models."""
    content = Content(question.films)
    if table.smoke:
        blocks = {"genres": unit_rows(content.genres), "year": content.decade}
    else:
        blocks = {**content.dense, "colours": content.colours}
    user, film = question.warm.nonzero()
    item = np.flatnonzero(~question.is_cold)[film].astype(np.int32)
    ones = np.ones(len(user))
    log = synth.Log(user.astype(np.int64), item, ones, ones.astype(np.float32))
    cold_items = np.flatnonzero(question.is_cold).astype(np.int32)
    every = tuple(name for name in blocks if name != "colours")
    combinations = [(name,) for name in blocks]
    if not table.smoke:
        combinations += [every[:3], every, (*every, "colours")]
    als_settings = movielens.SETTINGS["als"] | ({"iterations": 1} if table.smoke else {})
    with machine.session("movielens_cold", ["master=local[2]"], smoke=table.smoke) as spark:
        data = cold.dataset(spark, log, catalogue(question.films), blocks)
        for name in every[:1] if table.smoke else every[:3]:
            model = cold.fit("content_knn", {"items": "cold"}, data, [name])
            table.add(f"content_knn: {name}", cold.scores(model, log, cold_items))
        als = registry.make("als", als_settings).fit(data, FitOptions())
        best = ""
        for names in combinations:
            row = f"content_factors: {' + '.join(names)}"
            settings = {"fields": [], "items": "cold"}
            model = cold.fit("content_factors", settings, data, names, {"als": als})
            against = [] if len(names) == 1 else ["genres + plot + people + year ridge"]
            if len(names) > 1:
                against.append(best)
            if len(names) > len(every):
                against.append(f"content_factors: {' + '.join(every)}")
            table.add(row, cold.scores(model, log, cold_items), against)
            if len(names) == 1 and (not best or table.ndcg(row) > table.ndcg(best)):
                best = row


def catalogue(films: pd.DataFrame) -> pa.Table:
    """Return the films as `schema.CONTENT`; their item_idx is their row."""
    n = len(films)
    columns = {
        "item_idx": pa.array(np.arange(n), pa.int32()),
        "item_name": pa.array(films["title"].tolist()),
        "category": pa.array([[g.strip() for g in text.split(",")] for text in films["genres"]]),
        "price": pa.nulls(n, pa.float64()),
        "text": pa.array(films["plot"].tolist()),
        "media": pa.nulls(n, pa.list_(pa.string())),
    }
    return pa.table({name: columns[name] for name in schema.CONTENT.names})

"""MovieLens 1M, which films go together: `content2vec` by its mergers, beside each module alone.

Films, ratings of 4 and more, and the 458 cold films are those of `quality.movielens_cold`. A pair of
films is positive if 20 users or more like both, and twice as many as by chance. For a negative pair one
film of a positive one gives way to one of the 20 that are as cold and whose numbers of users are
nearest. Films, not pairs, are split: pairs of two warm films are trained on, and not asked.

- `one cold`: pairs of a cold and a warm film
- `both cold`: pairs of two cold films
- `all`: both kinds

The ratings of cold films are known to the truth alone, and to how popular the film of a negative is:
models and training pairs have no event on them. Figure: AUC of link prediction. Modules: genres, plot
(200 topics), people (300 topics), colours of the poster, and item vectors of `als` (warm films only).
Rows: the cosine by each module, and `content2vec` with each merger, on the content alone and with
`als`. Differences to the best single module are paired, with an interval of 95 % by a bootstrap of
*films*: a pair counts as often as both its films are drawn together. Which module is the best is seen
on these same pairs, which favours it.

Last, the cold films are ranked for 5,988 users as in `quality.movielens_cold`: NDCG@10, HR@10. The
settings are the defaults; none was chosen here.

    python -m benchmarks quality.movielens_pairs
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks import machine
from benchmarks.quality import cold, movielens
from benchmarks.quality.movielens_cold import ColdFilms, Content, catalogue, cold_films, unit_rows
from recspark.data.blocks import Array
from recspark.data.training_pairs import as_popular, in_order_of_popularity
from recspark.models import registry
from recspark.models.base import FitOptions
from recspark.models.content.content2vec import Content2VecModel
from recspark.testing import synth

MIN_USERS, MIN_LIFT, N_MATCHED = 20, 2.0, 20
N_DRAWS = 1000
BARS = {
    "both cold: residual over the best single module, AUC": 0.01,
    "ndcg@10: director, writers, cast by similarity": 0.179,
    "ndcg@10: strongest known, ridge on genres, plot, people, year": 0.2199,
}
MERGERS = ("linear", "crossfeat", "residual")


@dataclass(frozen=True)
class Pairs:
    """Pairs of films, as rows of `ColdFilms.films`; `label` float64 (p,), 1 = positive, else 0."""

    a: Array
    b: Array
    label: Array

    def auc(self, score: Array, weight: Array | None = None) -> float:
        """Return the probability that a positive pair scores above a negative one; ties count half.

        `weight` (p,) : how often each pair counts; None = once.
        """
        weight = np.ones(len(score)) if weight is None else weight
        values, level = np.unique(score, return_inverse=True)
        negative = np.bincount(level, weight * (1 - self.label), len(values))
        beaten = np.cumsum(negative) - negative / 2
        positive = weight * self.label
        n_both = positive.sum() * negative.sum()
        return float(positive @ beaten[level] / n_both) if n_both > 0 else float("nan")

    def interval(self, score: Array, other: Array, n_films: int, n_draws: int) -> list[float]:
        """Return the ends of the interval of AUC(score) - AUC(other), by a bootstrap of films."""
        rng = np.random.default_rng(1)
        differences = []
        for _ in range(n_draws):
            times = np.bincount(rng.integers(0, n_films, n_films), minlength=n_films)
            weight = (times[self.a] * times[self.b]).astype(np.float64)
            differences.append(self.auc(score, weight) - self.auc(other, weight))
        return [round(float(end), 4) for end in np.nanpercentile(differences, [2.5, 97.5])]


def pairs_of(question: ColdFilms, min_users: int) -> dict[str, Pairs]:
    """Return the pairs of each part of the question."""
    in_parts = sparse.hstack([question.warm, sparse.csr_matrix(question.truth * 1.0)], "csr")
    place = np.argsort(np.argsort(question.is_cold, kind="stable"), kind="stable")
    users = in_parts[:, place]  # (n_users, n_films)
    together = (users.T @ users).toarray()
    n_users = np.diag(together)
    lift = together * users.shape[0] / np.maximum(np.outer(n_users, n_users), 1)
    is_positive = (together >= min_users) & (lift >= MIN_LIFT)
    a, b = np.nonzero(np.triu(is_positive, 1))
    n_cold = question.is_cold[a].astype(int) + question.is_cold[b]
    rng = np.random.default_rng(2)
    parts = {}
    for name, is_part in (("one cold", n_cold == 1), ("both cold", n_cold == 2)):
        own_a, own_b = a[is_part], b[is_part]
        is_swapped = rng.random(len(own_a)) < 0.5
        stays, goes = np.where(is_swapped, own_b, own_a), np.where(is_swapped, own_a, own_b)
        other = goes.copy()
        for group in (np.flatnonzero(question.is_cold), np.flatnonzero(~question.is_cold)):
            chosen = np.flatnonzero(np.isin(goes, group))
            other[chosen] = group[
                as_popular(
                    np.searchsorted(group, goes[chosen]),
                    rng.integers(0, 2**62, len(chosen)).astype(np.uint64),
                    in_order_of_popularity(n_users[group], 1),
                    N_MATCHED,
                )
            ]
        is_negative = (stays != other) & ~is_positive[stays, other]
        label = np.repeat([1.0, 0.0], [len(own_a), is_negative.sum()])
        parts[name] = Pairs(
            np.append(own_a, stays[is_negative]), np.append(own_b, other[is_negative]), label
        )
    both = parts.values()
    parts["all"] = Pairs(
        *(np.concatenate([getattr(p, name) for p in both]) for name in ("a", "b", "label"))
    )
    return parts


def run(*, smoke: bool) -> None:
    """Print and write the table."""
    question = cold_films()
    if question is None:
        return
    print(__doc__, flush=True)
    if smoke:
        question = question.of_users(300)
    content = Content(question.films)
    if smoke:
        blocks = {"genres": unit_rows(content.genres), "year": content.decade}
    else:
        blocks = {n: v for n, v in content.dense.items() if n != "year"}
        blocks["colours"] = content.colours
    min_users = 8 if smoke else MIN_USERS
    parts = pairs_of(question, min_users)
    n_positive = {name: int(part.label.sum()) for name, part in parts.items()}
    print(f"positive pairs: {n_positive}; bars: {BARS}", flush=True)
    table: dict[str, Any] = {}
    scores: dict[str, dict[str, Array]] = {}

    def add(row: str, of_parts: dict[str, Array], against: str = "", **more: Any) -> None:
        scores[row] = of_parts
        figures: dict[str, Any] = {
            f"auc, {name}": round(part.auc(of_parts[name]), 4) for name, part in parts.items()
        }
        if against:
            n_films, n_draws = len(question.films), 20 if smoke else N_DRAWS
            figures["minus"] = {
                against: {
                    name: part.interval(of_parts[name], scores[against][name], n_films, n_draws)
                    for name, part in parts.items()
                }
            }
        table[row] = figures | more
        print(f"{row}: {json.dumps(table[row])}", flush=True)

    for name, block in blocks.items():
        units = unit_rows(block)
        cosines = {p: (units[part.a] * units[part.b]).sum(axis=1) for p, part in parts.items()}
        add(name, cosines)
    best = max(blocks, key=lambda name: table[name]["auc, both cold"])
    user, film = question.warm.nonzero()
    item = np.flatnonzero(~question.is_cold)[film].astype(np.int32)
    ones = np.ones(len(user))
    log = synth.Log(user.astype(np.int64), item, ones, ones.astype(np.float32))
    cold_items = np.flatnonzero(question.is_cold).astype(np.int32)
    als_settings = movielens.SETTINGS["als"] | ({"iterations": 1} if smoke else {})
    short = {"epochs": 1, "min_users": min_users} if smoke else {}
    with machine.session("movielens_pairs", ["master=local[2]"], smoke=smoke) as spark:
        data = cold.dataset(spark, log, catalogue(question.films), blocks)
        als = registry.make("als", als_settings).fit(data, FitOptions())
        for merger in MERGERS[::2] if smoke else MERGERS:
            for others in ({}, {"als": als}):
                settings = {"merger": merger, "items": "cold", **short}
                model = cold.fit("content2vec", settings, data, blocks, others)
                assert isinstance(model, Content2VecModel)
                of_parts = {
                    name: model.pair_probabilities(part.a, part.b) for name, part in parts.items()
                }
                lists = question.figures(cold.scores(model, log, cold_items))
                means = {name: round(float(v.mean()), 4) for name, v in lists.items()}
                row = f"content2vec, {merger}{', with als' if others else ''}"
                add(row, of_parts, best, **means)
    if not smoke:
        about = {"protocol": __doc__, "bars": BARS, "positive pairs": n_positive, "rows": table}
        machine.write("movielens_pairs", "python -m benchmarks quality.movielens_pairs", about)

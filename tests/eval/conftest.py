"""An oracle of every figure: plain Python on dicts, sharing no code with recspark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import pytest


def list_figures(
    listed: Sequence[int],
    truth: set[int],
    k: int,
    n_users_of: Mapping[int, int],
    cosine: Callable[[int, int], float] | None,
) -> dict[str, float | None]:
    """Every metric of one list; None where it is not defined. Unknown items hold their rank."""
    top = [i if i in n_users_of else None for i in listed[:k]]
    hit_ranks = [r for r, i in enumerate(top, 1) if i is not None and i in truth]
    best = min(k, len(truth))
    known = [i for i in top if i is not None]
    total = sum(n_users_of.values())
    place = {
        i: (
            sum(m < n for m in n_users_of.values())
            + (sum(m == n for m in n_users_of.values()) + 1) / 2
        )
        / len(n_users_of)
        for i, n in n_users_of.items()
    }
    pairs = [(a, b) for x, a in enumerate(known) for b in known[x + 1 :]]
    return {
        "ndcg": sum(1 / math.log2(r + 1) for r in hit_ranks)
        / sum(1 / math.log2(r + 1) for r in range(1, best + 1)),
        "recall": len(hit_ranks) / len(truth),
        "recall_capped": len(hit_ranks) / best,
        "precision": len(hit_ranks) / k,
        "map": sum(n / r for n, r in enumerate(hit_ranks, 1)) / best,
        "mrr": 1 / hit_ranks[0] if hit_ranks else 0.0,
        "hit_rate": float(bool(hit_ranks)),
        "novelty": sum(-math.log2(n_users_of[i] / total) for i in known) / len(known)
        if known
        else None,
        "popularity_bias": sum(place[i] for i in known) / len(known) if known else None,
        "intra_list_diversity": 1 - sum(cosine(a, b) for a, b in pairs) / len(pairs)
        if pairs and cosine
        else None,
    }


def poisson_weight(user: int, replicate: int, seed: int) -> int:
    """The weight of one user in one replicate, in Python integers."""
    word = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    start = mix((mix((seed * gamma) & word) + user) & word)
    hashed = mix((start + (replicate // 4 + 1) * gamma) & word)
    draw = ((hashed >> 16 * (replicate % 4)) & 0xFFFF) + 0.5
    weight, below = 0, math.exp(-1)
    while draw / 2**16 > below:
        weight += 1
        below += math.exp(-1) / math.factorial(weight)
    return weight


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    return SimpleNamespace(list_figures=list_figures, poisson_weight=poisson_weight)

"""The compiled kernels alone, one thread, CPU seconds: ours against `implicit`'s. No Spark.

What is left when the machine's other work and Spark's own cost are taken away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks import machine
from recspark.data.blocks import Histories, QueryBlock, Ragged
from recspark.engines.als_kernels import eigenbasis, fold_in, solve
from recspark.engines.als_objective import Objective, gramian
from recspark.models.scoring import topk

REPEATS = 3


def run(*, smoke: bool) -> None:
    """Print and write nanoseconds; about a minute of one core."""
    scale = 20 if smoke else 1
    figures: dict[str, Any] = {
        "als": [half_step(6_000 // scale, 20_000, 200, rank) for rank in (64, 128)],
        "fold_in_ms_a_user": {
            n: fold_in_ms(1_000 // scale, 20_000, n, 64) for n in (20, 500)
        },
        "topn": [
            lists(4_000 // scale, 20_000, 64, 100),
            lists(1_024 // scale, 1_000_000 // scale, 64, 100),
        ],
    }  # fmt: skip
    for name, found in figures.items():
        print(name, found)
    if not smoke:
        machine.write("kernels", "python -m benchmarks kernels", figures)


def half_step(n: int, m: int, per_row: int, rank: int) -> dict[str, Any]:
    """ALS: n rows of `per_row` entries each (some fall together) against m factors."""
    from implicit.cpu._als import _least_squares_cg

    rng = np.random.default_rng(0)
    at = np.minimum((m * rng.random((n, per_row)) ** 2.5).astype(np.int32), m - 1)
    at.sort(axis=1)
    rows = sparse.csr_matrix(
        (np.ones(at.size, np.float32), at.ravel(), np.arange(n + 1) * per_row), shape=(n, m)
    )
    rows.sum_duplicates()
    others = rng.standard_normal((m, rank), np.float32) * np.float32(0.1)
    objective = Objective(0.01, 5.0)
    gram, basis = eigenbasis(gramian(others))
    turned, start = others @ basis, rows.indptr.astype(np.int64)
    x = np.zeros((n, rank), np.float32)

    def ours() -> None:
        x[:] = 0
        solve(start, rows.indices, rows.data, turned, gram, objective, m, x, "cg", 4)

    confidence = 1 + objective.alpha * rows.data

    def theirs() -> None:
        x[:] = 0
        _least_squares_cg(
            rows.indptr, rows.indices, confidence, x, others, 0.01, num_threads=1, cg_steps=3
        )

    each = {
        "ours, 4 steps": 1e9 * cpu(ours) / rows.nnz,
        "implicit, 3": 1e9 * cpu(theirs) / rows.nnz,
    }
    return {
        "rank": rank, "interactions": rows.nnz, "ns_an_interaction": each,
        "ours_to_implicit": each["ours, 4 steps"] / each["implicit, 3"],
    }  # fmt: skip


def fold_in_ms(n: int, m: int, per_row: int, rank: int) -> float:
    """A user folded in exactly, from `per_row` interactions, milliseconds."""
    rng = np.random.default_rng(0)
    others = rng.standard_normal((m, rank), np.float32)
    at = rng.integers(0, m, n * per_row).astype(np.int32)
    start, weight = np.arange(n + 1) * per_row, np.ones(n * per_row, np.float32)
    gram = gramian(others)
    return 1e3 * cpu(lambda: fold_in(start, at, weight, others, Objective(0.1, 5.0), gram)) / n


def lists(n: int, m: int, rank: int, k: int) -> dict[str, Any]:
    """Top k of m items for n users, 50 seen items masked."""
    from implicit.cpu.topk import topk as find

    rng = np.random.default_rng(0)
    users = rng.standard_normal((n, rank), np.float32) * rng.gamma(1, 1, (n, 1)).astype(np.float32)
    items = rng.standard_normal((m, rank), np.float32) * rng.gamma(1, 1, (m, 1)).astype(np.float32)
    seen = np.sort(rng.integers(0, m, (n, 50)).astype(np.int32), axis=1)
    start = np.arange(n + 1) * 50
    none, nothing = np.zeros(n + 1, np.int64), np.zeros(0, np.int32)
    block = QueryBlock(
        np.arange(n),
        Histories(none, nothing, np.zeros(0, np.int64), np.zeros(0, np.float32)),
        Ragged(start, seen.ravel()),
    )
    masked = sparse.csr_matrix(
        (np.ones(seen.size, np.float32), seen.ravel(), start.astype(np.int32)), shape=(n, m)
    )
    vocabulary = np.arange(m, dtype=np.int32)

    class Factors:
        def score(self, _block: QueryBlock) -> topk.Scores:
            return topk.DotScores(users, items, None, np.ones(n, bool))

    each = {
        "ours": cpu(lambda: topk.answer(block, vocabulary, Factors(), k)),
        "implicit": cpu(lambda: find(items, users, k, filter_query_items=masked, num_threads=1)),
        "the product alone": cpu(lambda: [users[b : b + 512] @ items.T for b in range(0, n, 512)]),
    }
    return {
        "users": n, "items": m, "rank": rank, "k": k,
        "ns_a_score": {name: 1e9 * seconds / (n * m) for name, seconds in each.items()},
        "ours_to_implicit": each["ours"] / each["implicit"],
    }  # fmt: skip


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this process, the least of a few runs after one that warms up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        begun = time.process_time()
        work()
        seconds.append(time.process_time() - begun)
    return min(seconds)

"""What one task of the evaluation holds at a million items and 27 models.

The task runs in this process, on planted lists: each user gets a list of 20 from every model in both
modes, and is in one of the four segments of users. Reported are the bytes of the sums, with a bit per
item, model, mode, segment and k, what a byte for each would take, and how far the memory of the
process rises above what the catalogue takes.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from benchmarks import machine
from recspark.eval.kernel import SEGMENT_PART, SEGMENTS_OF_USERS, Plan, sum_users
from recspark.eval.metrics import Catalogue


def run(*, smoke: bool) -> None:
    """Print and write the figures."""
    n_items, n_models, n_users = (10_000, 3, 200) if smoke else (1_000_000, 27, 2_000)
    catalogue = Catalogue(np.arange(n_items, dtype=np.int32), np.ones(n_items, np.int64))
    plan = Plan(
        tuple(f"model_{i}" for i in range(n_models)),
        ("novel", "repeat"),
        (10, 20),
        catalogue,
        n_bootstrap=1000,
        seed=1,
    )
    before = resident_mb()
    begun = time.process_time()
    n_bytes, n_sums = 0, 0
    for batch in sum_users(batches(plan, n_users), plan):
        (row,) = batch.to_pylist()
        n_bytes += len(row["listed"])
        n_sums += 1
    figures = {
        "items": n_items,
        "models": n_models,
        "users": n_users,
        "modes_and_segments": n_sums,
        "listed_mb": round(n_bytes / 2**20, 1),
        "listed_mb_with_a_byte_each": round(n_bytes * 8 / 2**20, 1),
        "peak_above_the_catalogue_mb": round(resident_mb() - before),
        "cpu_seconds": round(time.process_time() - begun, 1),
    }
    print(figures)
    if not smoke:
        machine.write("evaluation_memory", "python -m benchmarks evaluation_memory", figures)


def batches(plan: Plan, n_users: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of 50 users at a time: segment, ten items of truth, and all lists."""
    rng = np.random.default_rng(1)
    n_modes, n_models, longest = len(plan.modes), len(plan.models), plan.longest
    n_truth = 10
    parts = np.concatenate(
        [
            [SEGMENT_PART],
            np.repeat([plan.truth_part(mode) for mode in range(n_modes)], n_truth),
            np.repeat(plan.first_list_part(0) + np.arange(n_modes * n_models), longest),
        ]
    )
    ranks = np.concatenate(
        [np.ones(1 + n_modes * n_truth), np.tile(np.arange(1, longest + 1), n_modes * n_models)]
    )
    for begin in range(0, n_users, 50):
        users = np.arange(begin, min(begin + 50, n_users))
        items = rng.integers(0, len(plan.catalogue), (len(users), len(parts)))
        items[:, 0] = users % len(SEGMENTS_OF_USERS)
        yield pa.RecordBatch.from_arrays(
            [
                pa.array(np.repeat(users, len(parts)), pa.int64()),
                pa.array(np.tile(parts, len(users)), pa.int32()),
                pa.array(np.tile(ranks, len(users)).astype(np.int32)),
                pa.array(items.ravel().astype(np.int32)),
            ],
            names=["user_idx", "part", "rank", "item_idx"],
        )


def resident_mb() -> float:
    """Return the most memory that this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

"""What one worker of `lambdamart` holds while it reads its examples and while its trees grow.

The worker runs in this process, on planted examples: users with 60 candidates each, 100 features.
Reported is how far the memory of the process rises, per feature and example: at its highest, and in
the last trees, when only the bins and the gradients are left.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pyarrow as pa

from benchmarks import machine
from recspark.config import Train
from recspark.data.feature_encoding import Encoding
from recspark.engines.boosting import Boosting, grow_on_share, read_share

_CANDIDATES = 60
_PARAMS = {
    "objective": "rank:ndcg", "tree_method": "hist", "grow_policy": "lossguide", "max_depth": 0,
    "max_leaves": 15, "max_bin": 256, "subsample": 0.7, "colsample_bytree": 0.3,
}  # fmt: skip


def run(*, smoke: bool) -> None:
    """Print and write the figures."""
    n_rows, n_features = (6_000, 10) if smoke else (200_000, 100)
    encoding = Encoding(tuple(f"number_{n}" for n in range(n_features)), {})
    grow_on_share(read_share(batches(600, n_features), ["user_idx"], encoding), encoding, how(1))
    samples: list[int] = []
    ended = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not ended.wait(0.005):
            samples.append(me.memory_info().rss)

    before = psutil.Process().memory_info().rss
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    begun = time.process_time()
    share = read_share(batches(n_rows, n_features), ["user_idx"], encoding)
    grow_on_share(share, encoding, how(10))
    ended.set()
    watcher.join()
    n_values = n_rows * n_features
    figures = {
        "examples": n_rows,
        "features": n_features,
        "peak_bytes_per_value": round((max(samples) - before) / n_values, 1),
        "bytes_per_value_in_the_last_trees": round((samples[-1] - before) / n_values, 1),
        "cpu_seconds": round(time.process_time() - begun, 1),
    }
    print(figures)
    if not smoke:
        machine.write("trees_memory", "python -m benchmarks trees_memory", figures)


def how(n_trees: int) -> Boosting:
    """Return how the trees are grown: by one worker."""
    return Boosting(_PARAMS, n_trees, Train(ranks=1))  # type: ignore[call-arg]


def batches(n_rows: int, n_features: int) -> Iterator[pa.RecordBatch]:
    """Yield examples as Spark sends them, 10,000 at a time: user_idx, label, numbers, fields."""
    rng = np.random.default_rng(1)
    for begin in range(0, n_rows, 10_000):
        rows = np.arange(begin, min(begin + 10_000, n_rows))
        numbers = pa.array(rng.random(len(rows) * n_features, np.float32))
        yield pa.RecordBatch.from_arrays(
            [
                pa.array(rows // _CANDIDATES),
                pa.array((rng.random(len(rows)) < 0.1).astype(np.float32)),
                lists(numbers, len(rows), n_features),
                lists(pa.array([], pa.int32()), len(rows), 0),
            ],
            names=["user_idx", "label", "numbers", "fields"],
        )


def lists(values: pa.Array, n_rows: int, length: int) -> pa.ListArray:
    """Return the values as `n_rows` lists of one length."""
    start = np.arange(n_rows + 1, dtype=np.int32) * length
    return pa.ListArray.from_arrays(pa.array(start), values)

"""Spark's Python workers: what recspark changes in them, and a daemon that forks them ready to work.

Spark starts a worker by a fork of one small daemon, and each worker then imports for itself what its
tasks need: pandas, numba, and what numba sets up at its first call. That is about two seconds of a
core, again for every worker, and Spark ends one that was idle for a minute. Where recspark is installed
on the executors, `spark.python.daemon.module: recspark.workers` makes all of it once, before the fork;
the workers share its memory. Not with `--py-files`, which the daemon does not see. torch is left to
the tasks of neural models: it takes as long again, and 200 MB.
"""

from __future__ import annotations

import gc
import zipimport
from typing import Any


def settle() -> None:
    """Spare this process, a Python worker or the daemon, work that Spark asks for around every task."""
    # At the start of every task a worker drops all import caches, and Python 3.11 then reads the
    # directories of pyspark.zip and of Spark's jar again, once for each package imported from them:
    # most of a short task. Nothing changes a zip under a running worker; one that a job adds later
    # is another path, and is found as before.
    zipimport.zipimporter.invalidate_caches = lambda _self: None  # type: ignore[method-assign,assignment]

    # After every task a worker collects garbage, and walks all that numba, scipy and torch have made
    # at import: 0.1 s a task. What has lived through one collection is not looked at again.
    def let_be(phase: str, about: dict[str, Any]) -> None:
        if phase == "stop" and about["generation"] == 2:
            gc.freeze()

    gc.callbacks.append(let_be)


def prepare() -> None:
    """Import what tasks import, and let numba set itself up, which its first call otherwise does."""
    import numpy as np
    import pandas  # noqa: F401

    from recspark.engines import als, word2vec  # noqa: F401
    from recspark.engines.word2vec_kernels import alias_table
    from recspark.models.scoring import topk  # noqa: F401

    alias_table(np.ones(2))
    gc.collect()


if __name__ == "__main__":  # as Spark starts its own: `python -m MODULE pyspark.worker`
    from pyspark.daemon import manager

    settle()
    prepare()
    manager()

"""Spark's Python workers: a daemon that forks them with their imports done, and two repairs.

Spark starts a worker by a fork of one small daemon. Each worker then imports what its tasks need
(pandas, numba, and what numba sets up at its first call), which takes about two seconds of a core.
This is paid again for every worker, and Spark ends a worker that was idle for a minute. Where
recspark is installed on the executors, `spark.python.daemon.module: recspark.worker_daemon` does all of it
once, before the fork, and the workers share its memory. It does not work with `--py-files`, which the
daemon does not see. torch is left to the tasks of neural models: it takes as long again, and 200 MB.
"""

from __future__ import annotations

import gc
import zipimport


def keep_zip_directories() -> None:
    """Keep the directories of zips that this process has read, which Spark drops at every task.

    At the start of every task a worker drops all import caches. Python 3.11 then reads the
    directories of pyspark.zip and of Spark's jar again, once for each package imported from them,
    which is most of a short task's time. Nothing changes a zip under a running worker, and a zip
    that a job adds later has another path, so it is read as before.
    """
    zipimport.zipimporter.invalidate_caches = lambda _self: None  # type: ignore[method-assign,assignment]


def prepare() -> None:
    """Import what tasks import, set numba up by a first call, and freeze what that left in memory."""
    import numpy as np
    import pandas  # noqa: F401

    from recspark.engines import als, word2vec  # noqa: F401
    from recspark.engines.word2vec_kernels import alias_table
    from recspark.models.scoring import topk  # noqa: F401

    alias_table(np.ones(2))  # numba's first call
    # After every task a worker collects garbage, and would walk all that numba and scipy made when
    # they were imported: 0.1 s per task. What is frozen here is not walked again, in any fork.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":  # as Spark starts its own daemon: `python -m MODULE pyspark.worker`
    from pyspark.daemon import manager

    keep_zip_directories()
    prepare()
    manager()

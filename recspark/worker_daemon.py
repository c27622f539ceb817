"""A daemon for Spark's Python workers: the workers start with all imports done.

Spark starts a worker by a fork of one small daemon. Each worker then imports the modules of its
tasks (pandas and numba) and sets up numba by a first call, which takes about two seconds on one
core. Every new worker takes this time again, and Spark ends a worker that was idle for a minute.

With the Spark setting `spark.python.daemon.module: recspark.worker_daemon`, the daemon imports
these modules once, before the fork, and the workers share its memory. recspark must be installed on
the executors: the daemon does not see the files of `--py-files`.

The daemon does not import torch, which would take another two seconds, and 200 MB. The tasks of
neural models import torch themselves.

The daemon also keeps two repeated costs of every task away: see `keep_zip_directories`, `prepare`
and `freeze_after_the_first_task`.
"""

from __future__ import annotations

import gc
import zipimport
from types import SimpleNamespace


def keep_zip_directories() -> None:
    """Keep the zip directories that this process has read. Spark would drop them at every task.

    At the start of every task a worker drops all import caches. Python 3.11 then reads the
    directories of pyspark.zip and of Spark's jar again, once for each package imported from them,
    which is most of a short task's time. No zip changes while a worker runs. A zip that a job
    adds later has another path, so its directory is read in any case.
    """
    zipimport.zipimporter.invalidate_caches = lambda _self: None  # type: ignore[method-assign,assignment]


def prepare() -> None:
    """Import the modules of the tasks, set numba up by a first call, and freeze all objects."""
    import numpy as np
    import pandas  # noqa: F401

    from recspark.engines import als, word2vec  # noqa: F401
    from recspark.engines.word2vec_kernels import alias_table
    from recspark.models.scoring import topk  # noqa: F401

    alias_table(np.ones(2))  # numba's first call
    # After every task a worker collects garbage. The collector would go through all objects that
    # numba and scipy made at their import, which takes 0.1 s per task. The collector skips objects
    # that are frozen here, in every fork.
    gc.collect()
    gc.freeze()


def freeze_after_the_first_task() -> None:
    """Let each worker freeze once more, after its first task, what that task imported (torch).

    Later tasks are not frozen: what they leave behind in circles is still collected.
    """
    import pyspark.daemon

    is_frozen = False  # a worker has its own, by the fork

    def collect() -> int:
        nonlocal is_frozen
        n_unreachable = gc.collect()
        if not is_frozen:
            gc.freeze()
            is_frozen = True
        return n_unreachable

    pyspark.daemon.gc = SimpleNamespace(collect=collect)  # type: ignore[assignment,attr-defined]


if __name__ == "__main__":  # as Spark starts its own daemon: `python -m MODULE pyspark.worker`
    from pyspark.daemon import manager

    keep_zip_directories()
    prepare()
    freeze_after_the_first_task()
    manager()

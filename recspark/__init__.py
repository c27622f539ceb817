"""recspark: raw events in, fresh top-N lists in Delta tables, every night."""

import gc
import sys
import zipimport
from typing import Any

__version__ = "0.1.0"

if "pyspark.worker" in sys.modules:  # a Python worker of Spark, not the driver
    # At the start of every task a worker drops all import caches, and Python 3.11 then reads the
    # directories of pyspark.zip and of Spark's jar again, once for each package imported from them:
    # most of a short task. Nothing changes a zip under a running worker; one that a job adds later
    # is another path, and is found as before.
    zipimport.zipimporter.invalidate_caches = lambda _self: None  # type: ignore[method-assign,assignment]

    # After every task a worker collects garbage, and walks all that numba, scipy and torch have made
    # at import: 0.1 s a task. What has lived through one collection is not looked at again.
    def _let_be(phase: str, about: dict[str, Any]) -> None:
        if phase == "stop" and about["generation"] == 2:
            gc.freeze()

    gc.callbacks.append(_let_be)

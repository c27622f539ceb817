"""How much memory the scoring of a block of queries may take."""

from __future__ import annotations

import os

# Bytes of approximate scores held at once. Measured: with smaller blocks the GEMM packs the item
# matrix too often, larger ones do not fit in the cache.
BLOCK_BYTES = 32 << 20


def block_bytes() -> int:
    """Return the most bytes that a block of scores may take.

    It is `BLOCK_BYTES`, or a 32nd of the memory that Spark grants a Python worker, if that is less.
    The grant is Spark's setting `spark.executor.pyspark.memory`, shared among the task slots of an
    executor; Spark tells its workers by an environment variable.
    """
    granted_bytes = int(os.environ.get("PYSPARK_EXECUTOR_MEMORY_MB") or 0) << 20
    return min(BLOCK_BYTES, granted_bytes // 32) if granted_bytes else BLOCK_BYTES

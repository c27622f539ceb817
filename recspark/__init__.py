"""recspark: raw events in, fresh top-N lists in Delta tables, every night."""

import sys
from typing import Any

from recspark.version import __version__ as __version__

if "pyspark.worker" in sys.modules:  # a Python worker of Spark, not the driver
    from recspark import worker_daemon

    worker_daemon.keep_zip_directories()


def __getattr__(name: str) -> Any:
    """Give `recspark.fit`, and import Spark only then."""
    if name in ("fit", "Fitted"):
        from recspark import api

        return getattr(api, name)
    raise AttributeError(f"module 'recspark' has no attribute '{name}'")

"""recspark: raw events in, fresh top-N lists in Delta tables, every night."""

import sys

__version__ = "0.1.0"

if "pyspark.worker" in sys.modules:  # a Python worker of Spark, not the driver
    from recspark import workers

    workers.settle()

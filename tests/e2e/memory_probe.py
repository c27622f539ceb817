"""Run by test_driver_memory in a process of its own: a night's heavy stages on planted users.

    memory_probe.py USERS ROOT [collect]

Prints the peak of what the driver's JVM holds live, and the peak memory of the driver's Python, MB.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

N_ITEMS = 300
EVENTS_PER_USER = 12


def plant(spark: SparkSession, path: str, n_users: int) -> None:
    """Write events of `n_users` users over 60 days, made in the executors."""
    base = spark.range(n_users * EVENTS_PER_USER, numPartitions=4)
    item = F.pmod(F.xxhash64("id"), F.lit(N_ITEMS))
    minutes = F.pmod(F.xxhash64("id", F.lit(1)), F.lit(60 * 24 * 60))
    (
        base.select(
            F.concat(F.lit("user"), F.floor(F.col("id") / EVENTS_PER_USER)).alias("user_id"),
            F.concat(F.lit("item"), item).alias("item_id"),
            (
                F.lit("2020-01-01 00:00:00").cast("timestamp")
                + F.make_dt_interval(mins=minutes.cast("int"))
            ).alias("event_at"),
        )
        .write.mode("overwrite")
        .parquet(path)
    )


def main() -> None:
    n_users, root, collects = int(sys.argv[1]), sys.argv[2], "collect" in sys.argv[3:]
    from recspark.cli.common import parse_date
    from recspark.pipeline.run import night, open_night
    from recspark.pipeline.stages import recommend

    if collects:  # the defect that the test must notice
        lists = recommend.backtest_users

        def leaky(*arguments: object) -> object:
            frame = lists(*arguments)  # type: ignore[arg-type]
            leaky.kept = frame.collect()  # type: ignore[attr-defined]
            return frame

        recommend.backtest_users = leaky  # type: ignore[assignment]
    settings = [
        f"paths.root={root}/night", f"source.path={root}/raw", "spark.master=local-cluster[2,1,1024]",
        "models=[popular, item_knn, ease]", "evaluate.n_bootstrap=20", "train.ranks=1", "n_candidates=20",
        "features.history_buckets=4", "spark.driver_memory=1g", "source=planted",
    ]  # fmt: skip
    os.environ.setdefault("SPARK_WORKER_DIR", f"{root}/work")
    context = open_night("test", parse_date("2020-02-29"), settings)
    plant(context.spark, f"{root}/raw", n_users)
    live = LiveHeap(context.spark)
    live.start()
    night(context)
    python_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"users": n_users, "python_mb": python_mb, "jvm_mb": live.peak_mb()}))
    context.spark.stop()


class LiveHeap(threading.Thread):
    """Samples what the driver's JVM still held after its last collection, in MB."""

    def __init__(self, spark: SparkSession) -> None:
        super().__init__(daemon=True)
        self.jvm = spark.sparkContext._jvm
        factory = self.jvm.java.lang.management.ManagementFactory  # type: ignore[union-attr]
        self.pools = [p for p in factory.getMemoryPoolMXBeans() if "Old" in p.getName()]
        self.most = 0.0

    def run(self) -> None:
        while True:
            self.sample()
            time.sleep(1)

    def sample(self) -> None:
        self.jvm.java.lang.System.gc()  # type: ignore[union-attr]
        self.most = max(self.most, sum(p.getUsage().getUsed() for p in self.pools) / 2**20)

    def peak_mb(self) -> float:
        self.sample()
        return self.most


if __name__ == "__main__":
    main()

"""The Spark session: the only module that names a Spark conf key."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pyspark
from pyspark import inheritable_thread_target
from pyspark.sql import SparkSession

from recspark.config import Spark
from recspark.errors import SetupError

# True wherever recspark runs: tables are wrong or unreadable with anything else.
ALWAYS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    # Else Delta reads the folder of a cutoff in the zone of the machine that writes it.
    "spark.databricks.delta.write.utcTimestampPartitionValues": "false",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.databricks.delta.retentionDurationCheck.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "4096",
}
# Profile of a training job: one rank gets one executor, and a second attempt of a rank would hang
# all.
TRAINING = {
    "spark.speculation": "false",
    "spark.dynamicAllocation.enabled": "false",
    "spark.task.maxFailures": "1",
}
_AT_ONCE = 4  # pieces of work that one driver plans at a time
_T = TypeVar("_T")
# Python workers compute with one thread each: a task owns one core.
WORKER_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def build_session(
    settings: Spark, app: str, extra: Mapping[str, str] | None = None
) -> SparkSession:
    """Return the Spark session of this process, started with recspark's own settings.

    `settings.master` null leaves master, memory and executors to spark-submit. Raises SetupError
    when Java or the Delta jars are missing.
    """
    # Executors otherwise start whatever `python3` is first on their PATH.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(app)
    if settings.master and "PYSPARK_GATEWAY_PORT" not in os.environ:
        builder = builder.master(settings.master).config(
            "spark.driver.memory", settings.driver_memory
        )
        _check_java()
    conf = {
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        "spark.sql.adaptive.coalescePartitions.initialPartitionNum": str(
            settings.shuffle_partitions
        ),
        **{f"spark.executorEnv.{name}": "1" for name in WORKER_THREADS},
        "spark.executorEnv.PYTHONHASHSEED": "0",
        # Else PySpark tells the JVM, before each call on a column or frame, the line that makes it:
        # an eighth of a small night. Python's traceback says the same.
        "spark.python.sql.dataFrameDebugging.enabled": "false",
        **settings.conf,
        **ALWAYS,
        **(extra or {}),
    }
    for key, value in conf.items():
        builder = builder.config(key, value)
    spark: SparkSession = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    _check_delta(spark)
    return spark


def executor_slots(spark: SparkSession) -> int:
    """Return how many tasks the cluster runs at once, as far as the driver knows."""
    return int(spark.sparkContext.defaultParallelism)


def together(spark: SparkSession, *work: Callable[[], _T]) -> Sequence[_T]:
    """Run pieces of work in threads of their own; return their results in the order given.

    Planning a small Spark job costs the driver more than the job costs the executors, so writes to
    different tables go side by side. All pieces end before the first error among them is raised.
    """
    with ThreadPoolExecutor(_AT_ONCE, "together") as pool:
        inherit = inheritable_thread_target(spark)
        futures = [pool.submit(inherit(piece)) for piece in work]
    return [future.result() for future in futures]


def find_java() -> str | None:
    """Return the Java that Spark will start: of JAVA_HOME, of `make setup`, or on PATH."""
    # `make setup` notes a Java that is not on PATH where Spark's own scripts look for it.
    notes = Path(pyspark.__file__).parent / "conf" / "spark-env.sh"
    noted = re.findall(r"JAVA_HOME=[\"']?([^\"'\n]+)", notes.read_text()) if notes.exists() else []
    for home in (*noted, os.environ.get("JAVA_HOME")):
        if home and (Path(home) / "bin" / "java").exists():
            return str(Path(home) / "bin" / "java")
    return shutil.which("java")


def _check_java() -> None:
    if find_java() is None:
        raise SetupError(
            "no `java` on PATH and no JAVA_HOME: install Java 17 or 21 "
            "(Debian 12: apt-get install -y openjdk-17-jre-headless)"
        )


def _check_delta(spark: SparkSession) -> None:
    jvm = spark.sparkContext._jvm
    try:
        jvm.java.lang.Class.forName(  # type: ignore[union-attr]
            "io.delta.sql.DeltaSparkSessionExtension",
            True,
            jvm.Thread.currentThread().getContextClassLoader(),  # type: ignore[union-attr]
        )
    except Exception:
        raise SetupError(
            "the Delta jars are not on Spark's class path: run `make setup`, or pass "
            "--jars delta-spark_2.13-4.0.1.jar,delta-storage-4.0.1.jar to spark-submit"
        ) from None

"""The Spark session: the only module that names a Spark conf key."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyspark
from pyspark import SparkConf, SparkContext, inheritable_thread_target
from pyspark.sql import SparkSession

from recspark import masking
from recspark.config import Spark
from recspark.errors import SetupError

# Settings that hold wherever recspark runs. With other values, tables would be wrong or unreadable.
ALWAYS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    # Otherwise Delta would read a cutoff's folder name in the time zone of the writing machine.
    "spark.databricks.delta.write.utcTimestampPartitionValues": "false",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # Values in folder names are text. Spark would turn `user=00123/` into 123 and `user=1e3/` into
    # 1000.0.
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
    "spark.databricks.delta.retentionDurationCheck.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "4096",
    # Without these two, Spark 4 would read text in only seven encodings, without windows-1252. And
    # bytes that are no text in the encoding would end the job for JSON lines, though not for CSV.
    # With them, U+FFFD replaces such bytes.
    "spark.sql.legacy.javaCharsets": "true",
    "spark.sql.legacy.codingErrorAction": "true",
}
# If this is off, Delta lists the files of all slices even where a query is for one slice.
FILE_SKIPPING = "spark.databricks.delta.stats.skipping"
# A property of a thread: the label of the jobs that the thread starts.
JOB_GROUP = "spark.jobGroup.id"
# Settings of a training job. Each rank gets one executor, and a second attempt of one rank would
# make all ranks hang.
TRAINING = {
    "spark.speculation": "false",
    "spark.dynamicAllocation.enabled": "false",
    "spark.task.maxFailures": "1",
}
# Without this, Python puts the working folder first on its path when it starts a module by name, as
# Spark and Horovod do. A file `numpy.py` in that folder would then be run, and a folder `recspark`
# would be imported instead of the package.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
LOOPBACK = "127.0.0.1"
JAVA_VERSIONS = (17, 21)
_MAX_PARALLEL_CALLS = 4  # how many calls of `together` run at a time
_T = TypeVar("_T")
# Set to 1, so that each Python worker computes with one thread, since a Spark task has one core.
WORKER_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def build_session(
    settings: Spark, app: str, extra: Mapping[str, str] | None = None
) -> SparkSession:
    """Return the Spark session of this process, started with recspark's settings.

    `extra` are Spark settings that take precedence over all others. Where `settings.master` is
    null, spark-submit decides on master, memory and executors. With a local master, Spark listens
    on the loopback address only, unless `spark.driver.host` or `spark.driver.bindAddress` is set.
    Secrets in `settings.conf` are passed to Spark after its JVM has started, so that no command
    line shows them. Raises SetupError where Java or the Delta jars are missing.
    """
    # Otherwise executors would start the `python3` that is first on their PATH.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(app)
    is_submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # by spark-submit: its JVM runs already
    if settings.master and not is_submitted:
        builder = builder.master(settings.master).config(
            "spark.driver.memory", settings.driver_memory
        )
        check_java()
    conf = {
        "spark.sql.shuffle.partitions": str(settings.shuffle_partitions),
        "spark.sql.adaptive.coalescePartitions.initialPartitionNum": str(
            settings.shuffle_partitions
        ),
        **{f"spark.executorEnv.{name}": "1" for name in WORKER_THREADS},
        "spark.executorEnv.PYTHONHASHSEED": "0",
        # So Spark hides the same secrets as recspark, where Spark itself shows settings and plans.
        "spark.redaction.regex": masking.SECRET_KEYS,
        # Otherwise PySpark sends the line of Python code to the JVM before each call on a column or
        # DataFrame. That takes an eighth of the time of a small night, and Python's traceback gives
        # the same line.
        "spark.python.sql.dataFrameDebugging.enabled": "false",
        **settings.conf,
        **{f"spark.executorEnv.{name}": value for name, value in SAFE_PATH.items()},
        **ALWAYS,
        **(extra or {}),
    }
    set_keys = {*conf, *(name for name, _ in SparkConf().getAll())}
    with _on_loopback(_master(settings, is_submitted), set_keys) as loopback_conf:
        conf = {**conf, **loopback_conf}
        for key, value in conf.items():
            builder = builder.config(key, value)
        if settings.master and not is_submitted:
            _start_java(settings, conf)
        spark: SparkSession = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    _check_delta(spark)
    return spark


def listening_address(spark: SparkSession) -> tuple[str, str]:
    """Return the address to which this driver binds its listeners, and the address that executors
    call.

    The driver announces `spark.driver.host` to the executors. The driver binds to
    `spark.driver.bindAddress` or, where that is not set, to `spark.driver.host`. Spark's own
    listeners follow the same rule.
    """
    conf = spark.sparkContext.getConf()
    announced_address = str(conf.get("spark.driver.host", LOOPBACK))
    return str(conf.get("spark.driver.bindAddress", announced_address)), announced_address


def is_on_loopback(spark: SparkSession) -> bool:
    """Return whether the driver can be reached from this machine only. The executors are then on
    this machine too.
    """
    bind_address, _ = listening_address(spark)
    return _is_loopback(bind_address)


def is_local(spark: SparkSession) -> bool:
    """Return whether Spark runs in local mode: the driver is the executor, and both share a working
    folder.
    """
    return bool(spark.sparkContext._jsc.sc().isLocal())


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _master(settings: Spark, is_submitted: bool) -> str:
    if not is_submitted:
        return settings.master or ""
    SparkContext._ensure_initialized()
    return str(SparkConf().get("spark.master", ""))


@contextmanager
def _on_loopback(master: str, set_keys: Collection[str]) -> Iterator[dict[str, str]]:
    """Give the settings with which a session on one machine listens on the loopback address only.

    Gives no settings where the master is not local, or where one of the settings is among
    `set_keys` or SPARK_LOCAL_IP is in the environment. Within the block, SPARK_LOCAL_IP is set. A
    JVM that is started there uses the loopback address also where no setting exists (the UI, a
    `local-cluster`).
    """
    loopback_conf = {"spark.driver.host": LOOPBACK, "spark.driver.bindAddress": LOOPBACK}
    if (
        not master.startswith("local")
        or {*loopback_conf} & {*set_keys}
        or "SPARK_LOCAL_IP" in os.environ
    ):
        yield {}
        return
    os.environ["SPARK_LOCAL_IP"] = LOOPBACK
    try:
        yield loopback_conf
    finally:
        del os.environ["SPARK_LOCAL_IP"]


def _start_java(settings: Spark, conf: Mapping[str, str]) -> None:
    """Start the JVM with all settings except secrets, because every user of the machine can read
    its command line.
    """
    if SparkContext._gateway is not None:
        return
    public_conf = SparkConf(loadDefaults=False)
    for key, value in {**conf, "spark.driver.memory": settings.driver_memory}.items():
        if not masking.is_secret(key) and masking.mask(value) == value:
            public_conf.set(key, value)
    SparkContext._ensure_initialized(conf=public_conf)


def executor_slots(spark: SparkSession) -> int:
    """Return how many tasks the cluster can run at once, as far as the driver knows."""
    return int(spark.sparkContext.defaultParallelism)


def most_slots(settings: Spark) -> int | None:
    """Return the largest number of tasks that Spark may run at once by `settings`; None where the
    settings do not tell.

    The true number may be smaller, since a container may use fewer cores than its machine has.
    Under spark-submit the result is None, since spark-submit decides and not the settings.

    >>> most_slots(Spark(master="local[3]")), most_slots(Spark(master="local-cluster[2,4,1024]"))
    (3, 8)
    >>> most_slots(Spark(master="local[6,2]", conf={"spark.task.cpus": "4"})), most_slots(Spark())
    (1, None)
    """
    if settings.master is None or "PYSPARK_GATEWAY_PORT" in os.environ:
        return None
    match = re.fullmatch(
        r"local(-cluster)?(?:\[\s*(\d+|\*)\s*(?:,\s*(\d+))?.*\])?", settings.master
    )
    if match is None:
        return None
    cluster_suffix, first_number, second_number = match.groups()
    cores = len(os.sched_getaffinity(0)) if first_number == "*" else int(first_number or 1)
    if cluster_suffix:
        cores *= int(second_number or 1)
    return cores // int(settings.conf.get("spark.task.cpus", "1"))


def together(spark: SparkSession, *calls: Callable[[], _T]) -> Sequence[_T]:
    """Make all `calls` at the same time, each in its own thread, and return their results in order.

    Used for writes to different tables: planning a small Spark job takes the driver more time than
    the job takes the executors. At most 4 calls run at a time. An error is raised only after all
    calls have ended; of several errors, the one of the first call in order is raised.
    """
    with ThreadPoolExecutor(_MAX_PARALLEL_CALLS, "together") as pool:
        # Each call gets the Spark properties of this thread, such as JOB_GROUP.
        with_thread_properties = inheritable_thread_target(spark)
        futures = [pool.submit(with_thread_properties(call)) for call in calls]
    return [future.result() for future in futures]


@contextmanager
def lenient(spark: SparkSession) -> Iterator[None]:
    """Make SQL from the settings give null where Spark 4 would raise an error for a row.

    This holds for expressions that Spark analyses within the block; they keep it when they run
    later. Do not use this in several threads at the same time, because it changes a setting of the
    session.
    """
    ansi_key = "spark.sql.ansi.enabled"
    spark.conf.set(ansi_key, "false")
    try:
        yield
    finally:
        spark.conf.set(ansi_key, ALWAYS[ansi_key])


def find_java() -> str | None:
    """Return the path of the Java that Spark will start; None where there is none.

    That is the Java noted by `make setup`, else the one in JAVA_HOME, else the one on PATH. Raises
    SetupError where the first of them that is set has no runnable bin/java, since Spark would not
    look further.
    """
    # `make setup` notes a Java that is not on PATH in this file, where Spark's scripts look for it.
    noted_file = Path(pyspark.__file__).parent / "conf" / "spark-env.sh"
    noted_homes = (
        re.findall(r"JAVA_HOME=[\"']?([^\"'\n]+)", noted_file.read_text())
        if noted_file.exists()
        else []
    )
    for name, home in (
        *((str(noted_file), home) for home in noted_homes),
        ("JAVA_HOME", os.environ.get("JAVA_HOME")),
    ):
        if home:
            java = Path(home) / "bin" / "java"
            if not os.access(java, os.X_OK) or not java.is_file():
                raise SetupError(
                    f"{name} says {home}, where no bin/java can be run: correct it, or unset it to take "
                    "the `java` on PATH"
                )
            return str(java)
    return shutil.which("java")


def java_version(java: str) -> str:
    """Return the version of `java`, such as 17.0.15; "" where it cannot be found out.

    The version is read from the file `release` in the home of `java`. Where that file does not give
    a version, a process `java -version` is run.
    """
    release_file = Path(java).resolve().parents[1] / "release"
    if release_file.is_file():
        versions = re.findall(
            r'^JAVA_VERSION="([^"]+)"', release_file.read_text(errors="replace"), re.M
        )
        if versions:
            return str(versions[0])
    printed_text = subprocess.run(
        [java, "-version"], capture_output=True, text=True, check=False
    ).stderr
    quoted_versions = re.findall(r'version "([^"]+)"', printed_text)
    return str(quoted_versions[0]) if quoted_versions else ""


def check_java() -> str:
    """Return the path and version of Java as a text. Raises SetupError where there is no Java, or
    one on which Spark does not run.
    """
    java = find_java()
    if java is None:
        raise SetupError(
            "no `java` on PATH and no JAVA_HOME: install Java 17 or 21 "
            "(Debian 12: apt-get install -y openjdk-17-jre-headless)"
        )
    version = java_version(java)
    if not any(version.split(".")[0] == str(major) for major in JAVA_VERSIONS):
        raise SetupError(
            f"{java} is Java {version or 'that does not run'}; Spark runs on 17 and 21: install one of "
            "them, and point JAVA_HOME at it"
        )
    return f"{java} ({version})"


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

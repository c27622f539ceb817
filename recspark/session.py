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

# True wherever recspark runs: tables are wrong or unreadable with anything else.
ALWAYS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    # Else Delta reads the folder of a cutoff in the zone of the machine that writes it.
    "spark.databricks.delta.write.utcTimestampPartitionValues": "false",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # `user=00123/` is text: Spark would make 123 of it, and 1000.0 of `user=1e3/`.
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
    "spark.databricks.delta.retentionDurationCheck.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "4096",
    # Else Spark 4 reads text in seven encodings, windows-1252 not among them; and bytes that are no
    # text in one end the job where JSON lines are decoded, not so in CSV: U+FFFD stands for them.
    "spark.sql.legacy.javaCharsets": "true",
    "spark.sql.legacy.codingErrorAction": "true",
}
# Off, Delta names the files of all slices where one was asked for.
FILE_SKIPPING = "spark.databricks.delta.stats.skipping"
JOB_GROUP = "spark.jobGroup.id"  # a property of a thread: the label of the jobs that it starts
# Profile of a training job: one rank gets one executor, and a second attempt of a rank would hang
# all.
TRAINING = {
    "spark.speculation": "false",
    "spark.dynamicAllocation.enabled": "false",
    "spark.task.maxFailures": "1",
}
# Python puts the working folder first on its path when it starts a module by name, as Spark and Horovod
# do: a `numpy.py` that lies there would be run, and a folder `recspark` found instead of the package.
SAFE_PATH = {"PYTHONSAFEPATH": "1"}
LOOPBACK = "127.0.0.1"
JAVA_VERSIONS = (17, 21)
_AT_ONCE = 4  # pieces of work that one driver plans at a time
_T = TypeVar("_T")
# Python workers compute with one thread each: a task owns one core.
WORKER_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def build_session(
    settings: Spark, app: str, extra: Mapping[str, str] | None = None
) -> SparkSession:
    """Return the Spark session of this process, started with recspark's own settings.

    `settings.master` null leaves master, memory and executors to spark-submit. With a local master
    Spark listens on the loopback address only, unless `spark.driver.host` or
    `spark.driver.bindAddress` says otherwise. Secrets of `settings.conf` are given to Spark when its
    JVM runs, so that they stand in no command line. Raises SetupError when Java or the Delta jars are
    missing.
    """
    # Executors otherwise start whatever `python3` is first on their PATH.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(app)
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # by spark-submit, whose JVM runs already
    if settings.master and not submitted:
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
        # What Spark itself shows of settings and plans hides what recspark hides.
        "spark.redaction.regex": masking.SECRET_KEYS,
        # Else PySpark tells the JVM, before each call on a column or frame, the line that makes it:
        # an eighth of a small night. Python's traceback says the same.
        "spark.python.sql.dataFrameDebugging.enabled": "false",
        **settings.conf,
        **{f"spark.executorEnv.{name}": value for name, value in SAFE_PATH.items()},
        **ALWAYS,
        **(extra or {}),
    }
    given = {*conf, *(name for name, _ in SparkConf().getAll())}
    with _on_loopback(_master(settings, submitted), given) as added:
        conf = {**conf, **added}
        for key, value in conf.items():
            builder = builder.config(key, value)
        if settings.master and not submitted:
            _start_java(settings, conf)
        spark: SparkSession = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    _check_delta(spark)
    return spark


def listening_address(spark: SparkSession) -> tuple[str, str]:
    """Return what this driver's own listeners bind to, and the address that executors call.

    As Spark does: `spark.driver.bindAddress`, else the announced `spark.driver.host`.
    """
    conf = spark.sparkContext.getConf()
    announced = str(conf.get("spark.driver.host", LOOPBACK))
    return str(conf.get("spark.driver.bindAddress", announced)), announced


def is_on_loopback(spark: SparkSession) -> bool:
    """Return whether the driver listens to this machine only: then the executors are on it too."""
    bound, _ = listening_address(spark)
    return _is_loopback(bound)


def is_local(spark: SparkSession) -> bool:
    """Return whether the executors are the driver itself: they share its working folder."""
    return bool(spark.sparkContext._jsc.sc().isLocal())


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _master(settings: Spark, submitted: bool) -> str:
    if not submitted:
        return settings.master or ""
    SparkContext._ensure_initialized()
    return str(SparkConf().get("spark.master", ""))


@contextmanager
def _on_loopback(master: str, given: Collection[str]) -> Iterator[dict[str, str]]:
    """Give the settings that keep a session of one machine to itself, unless they are among the names
    `given`; within the block, the JVM that starts does the same with what has no setting (the UI, a
    `local-cluster`).
    """
    wanted = {"spark.driver.host": LOOPBACK, "spark.driver.bindAddress": LOOPBACK}
    if not master.startswith("local") or {*wanted} & {*given} or "SPARK_LOCAL_IP" in os.environ:
        yield {}
        return
    os.environ["SPARK_LOCAL_IP"] = LOOPBACK
    try:
        yield wanted
    finally:
        del os.environ["SPARK_LOCAL_IP"]


def _start_java(settings: Spark, conf: Mapping[str, str]) -> None:
    """Start the JVM with all settings but the secrets: its command line is everybody's to read."""
    if SparkContext._gateway is not None:
        return
    public = SparkConf(loadDefaults=False)
    for key, value in {**conf, "spark.driver.memory": settings.driver_memory}.items():
        if not masking.is_secret(key) and masking.mask(value) == value:
            public.set(key, value)
    SparkContext._ensure_initialized(conf=public)


def executor_slots(spark: SparkSession) -> int:
    """Return how many tasks the cluster runs at once, as far as the driver knows."""
    return int(spark.sparkContext.defaultParallelism)


def most_slots(settings: Spark) -> int | None:
    """Return how many tasks Spark may run at once, as far as the settings say; None = they do not.

    At most: of a machine's cores a container may have fewer. Under spark-submit it says, not these.

    >>> most_slots(Spark(master="local[3]")), most_slots(Spark(master="local-cluster[2,4,1024]"))
    (3, 8)
    >>> most_slots(Spark(master="local[6,2]", conf={"spark.task.cpus": "4"})), most_slots(Spark())
    (1, None)
    """
    if settings.master is None or "PYSPARK_GATEWAY_PORT" in os.environ:
        return None
    form = re.fullmatch(r"local(-cluster)?(?:\[\s*(\d+|\*)\s*(?:,\s*(\d+))?.*\])?", settings.master)
    if form is None:
        return None
    cluster, first, second = form.groups()
    cores = len(os.sched_getaffinity(0)) if first == "*" else int(first or 1)
    if cluster:
        cores *= int(second or 1)
    return cores // int(settings.conf.get("spark.task.cpus", "1"))


def together(spark: SparkSession, *work: Callable[[], _T]) -> Sequence[_T]:
    """Run pieces of work in threads of their own; return their results in the order given.

    Planning a small Spark job costs the driver more than the job costs the executors, so writes to
    different tables go side by side. All pieces end before the first error among them is raised.
    """
    with ThreadPoolExecutor(_AT_ONCE, "together") as pool:
        inherit = inheritable_thread_target(spark)
        futures = [pool.submit(inherit(piece)) for piece in work]
    return [future.result() for future in futures]


@contextmanager
def lenient(spark: SparkSession) -> Iterator[None]:
    """Within the block, SQL of others is taken up so that it gives null where Spark 4 raises an
    error: what is analysed here keeps that when it runs.

    Not for threads side by side: the setting is the session's.
    """
    key = "spark.sql.ansi.enabled"
    spark.conf.set(key, "false")
    try:
        yield
    finally:
        spark.conf.set(key, ALWAYS[key])


def find_java() -> str | None:
    """Return the Java that Spark will start: of JAVA_HOME, of `make setup`, or on PATH.

    Raises SetupError where JAVA_HOME leads nowhere: Spark would look nowhere else.
    """
    # `make setup` notes a Java that is not on PATH where Spark's own scripts look for it.
    notes = Path(pyspark.__file__).parent / "conf" / "spark-env.sh"
    noted = re.findall(r"JAVA_HOME=[\"']?([^\"'\n]+)", notes.read_text()) if notes.exists() else []
    for name, home in (
        *((str(notes), home) for home in noted),
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
    """Return the version that `java` says it is, such as 17.0.15; "" where it says none.

    The file `release` of its home tells without a process.
    """
    release = Path(java).resolve().parents[1] / "release"
    if release.is_file():
        found = re.findall(r'^JAVA_VERSION="([^"]+)"', release.read_text(errors="replace"), re.M)
        if found:
            return str(found[0])
    said = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    quoted = re.findall(r'version "([^"]+)"', said)
    return str(quoted[0]) if quoted else ""


def check_java() -> str:
    """Return Java's place and version; SetupError where there is none that Spark runs on."""
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

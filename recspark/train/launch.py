"""Where training ranks run: Horovod on Spark executors, one Spark task, or this process.

A launcher has one method, `run(fn, *args)`, which calls `fn(comm, *args)` once per rank and returns
the results in rank order. `comm` is all that a rank knows of the others. All launchers fail alike:
the first error of a rank is raised on the driver, with that rank's number, place and traceback.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import cloudpickle
import psutil
import torch
from pyspark import SparkFiles
from pyspark.sql import SparkSession

from recspark.config import Train
from recspark.errors import NoSlotsError, RankFailedError
from recspark.session import (
    LOOPBACK,
    SAFE_PATH,
    WORKER_THREADS,
    is_local,
    is_on_loopback,
)
from recspark.train.comm import HorovodComm, Meeting, Tell, ThreadComm
from recspark.train.rank import (
    Listener,
    Pulse,
    RankResult,
    Teller,
    attempt,
    once_a_second,
    results,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

_HEAD_START_S = 5  # of a rank that hangs over the driver, to end itself and say where it hung
_ENDING_S = 20  # for a rank to be ended: Horovod waits 5 s twice before it kills
_SETTLED_S = 10  # executors are still arriving while the number of slots changed this recently


class Launcher(Protocol):
    """Runs a function on `ranks` ranks."""

    @property
    def ranks(self) -> int: ...

    def run(self, fn: Callable[..., T], *args: Any) -> list[RankResult[T]]:
        """Return `fn(comm, *args)` of each rank, in rank order.

        `fn` and `args` travel to executors: module-level functions of an installed package, and
        small values; results are small too. Raises the first error of any rank: a `RecsparkError`
        as its own class, anything else, a killed or a hung rank as RankFailedError; NoSlotsError
        where ranks find no place. The Spark session is usable afterwards.
        """


def launcher(
    spark: SparkSession, train: Train, *, in_process: bool = False, tell: Tell = log.info
) -> Launcher:
    """Return what runs `train.ranks` ranks: on executors, or within this process."""
    if in_process:
        return LocalLauncher(train.ranks, train.timeout_s, tell)
    if train.ranks == 1:
        return TaskLauncher(spark, train, tell)
    return HorovodLauncher(spark, train, tell)


class HorovodLauncher:
    """Ranks are processes beside Spark's Python workers, one per task; gloo connects them.

    A rank that exchanged nothing for `train.timeout_s` prints the stacks of its threads and ends
    itself, so that a hung collective ends too. A rank that cannot do that (its process is stopped,
    its machine paused) is ended by the driver, which hears of every rank once a second; where even
    that does not help, the driver goes on without it. Cost: about 10 s to start, most of it imports.
    """

    def __init__(self, spark: SparkSession, train: Train, tell: Tell = log.info) -> None:
        self._spark = spark
        self._train = train
        self._tell = tell

    @property
    def ranks(self) -> int:
        return self._train.ranks

    def run(self, fn: Callable[..., T], *args: Any) -> list[RankResult[T]]:
        """See `Launcher`."""
        import horovod.spark
        from horovod.runner.common.util.timeout import TimeoutException

        train = self._train
        _await_slots(self._spark, train)
        start_s, timeout_s = train.start_timeout_s, train.timeout_s
        shipped, own_folder = [SparkFiles.getRootDirectory()], not is_local(self._spark)
        output = _Output()
        silent: list[str] = []
        try:
            with (
                Listener(self._spark, self._tell) as listener,
                _without_side_effects() as stop,
                _services_bound(self._spark) as nics,
            ):
                payload = cloudpickle.dumps((fn, args, train.threads, listener.address))

                def boot() -> dict[str, Any]:
                    # Travels by value and imports recspark itself: a rank is a new process, which
                    # does not know the `--py-files` of the Spark worker that started it.
                    import os
                    import sys
                    from glob import glob

                    # An executor's own folder holds what Spark brought there; a local session's is
                    # whatever folder the night was started in.
                    work = [os.environ.get("HOROVOD_SPARK_WORK_DIR", ".")] if own_folder else []
                    for root in [*shipped, *work]:
                        sys.path[:0] = [root, *glob(f"{root}/*.zip"), *glob(f"{root}/*.whl")]
                    from recspark.train.launch import horovod_rank

                    return horovod_rank(payload, start_s, timeout_s)

                training = _in_background(
                    partial(
                        horovod.spark.run,
                        boot,
                        num_proc=train.ranks,
                        start_timeout=train.start_timeout_s,
                        use_gloo=True,
                        env={**_thread_env(train.threads), **SAFE_PATH},
                        nics=nics,
                        stdout=output,
                        stderr=output,
                        verbose=0,
                        executable=os.environ.get("PYSPARK_PYTHON", sys.executable),
                    )
                )
                try:
                    silent = _watch(training, listener, train)
                finally:
                    if not training.done():
                        self._end(training, stop)
                outcomes = training.result(timeout=0)
        except TimeoutException as error:
            raise NoSlotsError(
                f"{train.ranks} ranks found no slot within {train.start_timeout_s} s "
                f"(train.start_timeout_s): is another job using them? {error}"
            ) from None
        except Exception as error:
            which = f": {'; '.join(silent)}" if silent else ""
            raise RankFailedError(
                f"a rank ended without an answer: killed, or hung for {timeout_s} s "
                f"(train.timeout_s){which}. {error}\nlast output of the ranks:\n{output.tail()}"
            ) from error
        return results(outcomes)

    def _end(self, training: Future[Any], stop: threading.Event) -> None:
        """End ranks and Spark job of a training that does not end itself."""
        from horovod.spark.driver import job_id

        stop.set()  # Horovod asks each task to end its rank, by SIGKILL where SIGTERM does nothing
        if not wait([training], _ENDING_S).done:
            self._spark.sparkContext.cancelJobGroup(f"horovod.spark.run.{job_id.JOB_ID}")
            wait([training], _ENDING_S)


class TaskLauncher:
    """One rank, in a Spark task: needs no Horovod, and the driver holds nothing.

    The task is cancelled where the driver heard nothing of it for `train.timeout_s`, or for
    `train.start_timeout_s` more at its start.
    """

    ranks = 1

    def __init__(self, spark: SparkSession, train: Train, tell: Tell = log.info) -> None:
        self._spark = spark
        self._train = train
        self._tell = tell

    def run(self, fn: Callable[..., T], *args: Any) -> list[RankResult[T]]:
        """See `Launcher`."""
        sc, train = self._spark.sparkContext, self._train
        tag = f"recspark-train-{uuid.uuid4().hex}"
        ended = threading.Event()
        sc.addJobTag(tag)
        try:
            with Listener(self._spark, self._tell) as listener:

                def watch() -> None:
                    start_s, timeout_s = train.start_timeout_s, train.timeout_s
                    while (left := listener.left(1, start_s, timeout_s)) > 0:
                        if ended.wait(min(left, 1)):  # shorter once the rank was heard of
                            return
                    sc.cancelJobsWithTag(tag)

                threading.Thread(target=watch, daemon=True).start()
                payload = cloudpickle.dumps((fn, args, train.threads, listener.address))
                outcomes = sc.parallelize([payload], 1).map(task_rank).collect()
        except Exception as error:
            raise RankFailedError(
                f"the rank ended without an answer: killed, or hung for {train.timeout_s} s "
                f"(train.timeout_s), or it found no free slot for {train.start_timeout_s} s more "
                f"(train.start_timeout_s). {error}"
            ) from error
        finally:
            ended.set()
            sc.removeJobTag(tag)
        return results(outcomes)


class LocalLauncher:
    """Ranks are threads of this process, with a true allreduce between them: for tests."""

    def __init__(self, ranks: int, timeout_s: float = 600, tell: Tell = log.info) -> None:
        self._ranks = ranks
        self._timeout_s = timeout_s
        self._tell = tell

    @property
    def ranks(self) -> int:
        return self._ranks

    def run(self, fn: Callable[..., T], *args: Any) -> list[RankResult[T]]:
        """See `Launcher`."""
        pulse = Pulse()
        meeting = Meeting(self._ranks, pulse.beat)
        comms = [ThreadComm(rank, meeting, self._tell) for rank in range(self._ranks)]
        outcomes: list[dict[str, Any] | None] = [None] * self._ranks

        def rank_main(rank: int) -> None:
            outcomes[rank] = attempt(comms[rank], fn, args)
            if "error" in outcomes[rank]:  # type: ignore[operator]
                meeting.barrier.abort()

        threads = [
            threading.Thread(target=rank_main, args=(rank,), daemon=True)
            for rank in range(self._ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and (left := pulse.left(self._timeout_s)) > 0:
                thread.join(left)
        hung = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
        if hung:
            meeting.barrier.abort()
            raise RankFailedError(
                f"ranks {hung} hung for {self._timeout_s} s (train.timeout_s); in\n"
                + "\n".join(_stack(threads[rank]) for rank in hung)
            )
        return results([outcome for outcome in outcomes if outcome is not None])


def horovod_rank(payload: bytes, start_s: int, timeout_s: int) -> dict[str, Any]:
    """Run one rank in the process that Horovod started for it; an error is returned, not raised.

    A failing rank answers and shuts Horovod down; the others, waiting for it, then fail and answer
    too. So the answers of all ranks reach the driver, and with them the first error's own
    traceback.
    """
    # A watchdog in C: it fires even where Python hangs in a collective. Winding it up takes .4 ms.
    watch = partial(faulthandler.dump_traceback_later, exit=True)
    watch(start_s + timeout_s)
    import horovod.torch as hvd

    fn, args, threads, address = cloudpickle.loads(payload)
    torch.set_num_threads(threads)
    hvd.init()
    tell = Teller(address)

    def beat() -> None:
        watch(timeout_s)
        tell("")

    beat()
    try:
        return attempt(HorovodComm(hvd, tell, once_a_second(beat)), fn, args)
    finally:
        hvd.shutdown()
        faulthandler.cancel_dump_traceback_later()


def task_rank(payload: bytes) -> dict[str, Any]:
    """Run the only rank in a Spark task; an error is returned, so that Spark does not try again."""
    fn, args, threads, address = cloudpickle.loads(payload)
    torch.set_num_threads(threads)
    tell = Teller(address)
    meeting = Meeting(1, once_a_second(partial(tell, "")))
    return attempt(ThreadComm(0, meeting, tell), fn, args)


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a thread that nobody has to wait for, not even the end of this process."""
    future: Future[T] = Future()

    def main() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=main, daemon=True, name="training").start()
    return future


def _watch(training: Future[Any], listener: Listener, train: Train) -> list[str]:
    """Wait until `training` has ended, [], or ranks have been silent for too long; return which.

    A rank that hangs ends itself a little earlier, and says where it hung.
    """
    start_s, timeout_s = train.start_timeout_s, train.timeout_s + _HEAD_START_S
    while (left := listener.left(train.ranks, start_s, timeout_s)) > 0:
        if wait([training], min(left, 1)).done:
            return []
    return listener.silent(timeout_s) or ["a rank that was never heard of"]


@contextmanager
def _without_side_effects() -> Iterator[threading.Event]:
    """Yield the event that ends Horovod's ranks, which it would otherwise tie to signals of this
    process; and keep its job's own thread quiet.

    Where a rank is killed, Horovod cancels its Spark job; the thread that waits for the job then
    dies with an error that says nothing more.
    """
    from horovod.runner import gloo_run

    stop = threading.Event()
    register, hook = gloo_run.register_shutdown_event, threading.excepthook

    def quiet(args: threading.ExceptHookArgs) -> None:
        if args.thread is not None and "run_spark" in args.thread.name:
            log.debug("Horovod's Spark job: %s", args.exc_value)
        else:
            hook(args)

    gloo_run.register_shutdown_event = lambda: stop
    threading.excepthook = quiet
    try:
        yield stop
    finally:
        gloo_run.register_shutdown_event, threading.excepthook = register, hook


@contextmanager
def _services_bound(spark: SparkSession) -> Iterator[set[str] | None]:
    """Give the network interfaces that Horovod uses, None = all; on a machine that keeps to itself
    the loopback one, and Horovod's services, the driver's and those of its tasks, bind to it.

    Horovod has no setting for it: they listen on every address. Each worker changes itself, before
    its first task, and the driver for the length of the block.
    """
    if not is_on_loopback(spark):
        yield None
        return
    import horovod.spark.runner as horovod_runner

    make_mapper = horovod_runner._make_mapper

    def make_bound_mapper(*args: Any) -> Callable[[int, Any], Any]:
        mapper = make_mapper(*args)

        def bound(index: int, rows: Any) -> Any:
            from recspark.train.launch import bind_services

            bind_services(LOOPBACK)
            return mapper(index, rows)

        return bound

    horovod_runner._make_mapper = make_bound_mapper
    undo = bind_services(LOOPBACK)
    try:
        yield {
            name
            for name, addresses in psutil.net_if_addrs().items()
            if any(a.family == socket.AF_INET and a.address == LOOPBACK for a in addresses)
        }
    finally:
        undo()
        horovod_runner._make_mapper = make_mapper


def bind_services(host: str) -> Callable[[], None]:
    """Let Horovod's services that this process starts from now on bind to `host`; return what undoes
    it.
    """
    from horovod.runner.common.util import network
    from horovod.runner.http import http_server
    from horovod.runner.util.network import find_port

    def find_port_of_host(factory: Callable[[tuple[str, int]], Any]) -> Any:
        return find_port(lambda address: factory((host, address[1])))

    def put(function: Callable[..., Any]) -> None:
        network.find_port = http_server.find_port = function

    put(find_port_of_host)
    return partial(put, find_port)


class _Output:
    """Takes what the ranks print, which Horovod hands on only when they end; keeps the last lines."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=200)

    def write(self, text: str) -> None:
        self._lines.extend(line for line in text.splitlines() if line.strip())

    def flush(self) -> None:
        pass

    def tail(self) -> str:
        return "\n".join(self._lines)


def _await_slots(spark: SparkSession, train: Train) -> None:
    """Wait until the cluster has a slot per rank; NoSlotsError once no more are on their way."""
    jsc: Any = spark.sparkContext._jsc.sc()
    profile = jsc.resourceProfileManager().defaultResourceProfile()
    begun = changed = time.monotonic()
    before = -1
    while (slots := int(jsc.maxNumConcurrentTasks(profile))) < train.ranks:
        now = time.monotonic()
        if slots != before:
            before, changed = slots, now
        settled = jsc.isLocal() or now - changed > _SETTLED_S
        if settled or now - begun > train.start_timeout_s:
            raise NoSlotsError(
                f"{train.ranks} ranks need as many task slots, the cluster has {slots}: give the "
                "training job more executors, with one slot each, or lower train.ranks"
            )
        time.sleep(0.2)


def _thread_env(threads: int) -> dict[str, str]:
    return {name: str(threads) for name in WORKER_THREADS}


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else ""

"""Launchers run a training on its ranks: with Horovod on executors, in one Spark task, or in
threads.

A launcher has one method, `run(fn, *args)`. It calls `fn(comm, *args)` once per rank and returns
the results in rank order. `comm` is a rank's only connection to the other ranks. All launchers
report errors alike: the first error of a rank is raised on the driver, with that rank's number,
place and traceback.
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

# A hung rank ends itself and reports where it hung. The driver waits this much longer for it.
_HEAD_START_S = 5
_ENDING_S = 20  # time for Horovod to end its ranks: it waits 5 s twice before it kills
# If the number of task slots has not changed for this time, no more executors are expected.
_STABLE_S = 10


class Launcher(Protocol):
    """Runs a function on `ranks` ranks."""

    @property
    def ranks(self) -> int: ...

    def run(self, fn: Callable[..., T], *args: Any) -> list[RankResult[T]]:
        """Call `fn(comm, *args)` on each rank, and return the results in rank order.

        `fn` and `args` are pickled and sent to executors. `fn` should be a module-level function of
        an installed package; `args` and the results should be small.

        Raises the first error of any rank. A `RecsparkError` keeps its class. Any other error, a
        killed rank and a hung rank are raised as RankFailedError. Raises NoSlotsError where the
        cluster has too few free task slots. The Spark session is usable after an error.
        """


def launcher(
    spark: SparkSession, train: Train, *, in_process: bool = False, tell: Tell = log.info
) -> Launcher:
    """Return a launcher of `train.ranks` ranks: on executors, or as threads of this process."""
    if in_process:
        return LocalLauncher(train.ranks, train.timeout_s, tell)
    if train.ranks == 1:
        return TaskLauncher(spark, train, tell)
    return HorovodLauncher(spark, train, tell)


class HorovodLauncher:
    """Ranks are processes beside Spark's Python workers, one per Spark task. gloo connects them.

    A rank that exchanged nothing for `train.timeout_s` prints the stacks of its threads and ends
    itself. So a hung collective call ends too. Some ranks cannot end themselves, because their
    process is stopped or their machine paused. The driver, which hears from every working rank once
    a second, then ends the ranks. Where even that fails, the driver goes on without them.

    Cost: about 10 s to start, most of it for imports.
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
        await_slots(self._spark, train)
        start_s, timeout_s = train.start_timeout_s, train.timeout_s
        shipped_folders, has_own_folder = [SparkFiles.getRootDirectory()], not is_local(self._spark)
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
                    # This function is pickled by value, and imports recspark itself: a rank is a
                    # new process, which does not know the `--py-files` of the Spark worker that
                    # started it. So the folders of those files are put on the import path first.
                    import os
                    import sys
                    from glob import glob

                    # The working folder of an executor holds the files that Spark shipped to it. A
                    # local session's is whatever folder it was started in, and is left out.
                    work_folders = (
                        [os.environ.get("HOROVOD_SPARK_WORK_DIR", ".")] if has_own_folder else []
                    )
                    for root in [*shipped_folders, *work_folders]:
                        sys.path[:0] = [root, *glob(f"{root}/*.zip"), *glob(f"{root}/*.whl")]
                    from recspark.train.launch import horovod_rank

                    return horovod_rank(payload, start_s, timeout_s)

                training = _run_in_background(
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
            silent_text = f": {'; '.join(silent)}" if silent else ""
            raise RankFailedError(
                f"a rank ended without an answer: killed, or hung for {timeout_s} s "
                f"(train.timeout_s){silent_text}. {error}\n"
                f"last output of the ranks:\n{output.tail()}"
            ) from error
        return results(outcomes)

    def _end(self, training: Future[Any], stop: threading.Event) -> None:
        """End the ranks and the Spark job of a training that does not end by itself."""
        from horovod.spark.driver import job_id

        stop.set()  # makes Horovod end each rank: by SIGTERM, then by SIGKILL
        if not wait([training], _ENDING_S).done:
            self._spark.sparkContext.cancelJobGroup(f"horovod.spark.run.{job_id.JOB_ID}")
            wait([training], _ENDING_S)


class TaskLauncher:
    """One rank, which runs in a Spark task. It needs no Horovod, and no data on the driver.

    The task is cancelled once the driver has heard nothing from it for `train.timeout_s`. For its
    first sign of life the task has `train.start_timeout_s` more.
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
                    # Wait at most 1 s at a time: less time remains once the rank has connected.
                    while (remaining_s := listener.remaining_s(1, start_s, timeout_s)) > 0:
                        if ended.wait(min(remaining_s, 1)):
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
    """Ranks are threads of this process that really exchange tensors. Made for tests."""

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
            while thread.is_alive() and (remaining_s := pulse.remaining_s(self._timeout_s)) > 0:
                thread.join(remaining_s)
        hung = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
        if hung:
            meeting.barrier.abort()
            raise RankFailedError(
                f"ranks {hung} hung for {self._timeout_s} s (train.timeout_s); in\n"
                + "\n".join(_stack_of(threads[rank]) for rank in hung)
            )
        return results([outcome for outcome in outcomes if outcome is not None])


def horovod_rank(payload: bytes, start_s: int, timeout_s: int) -> dict[str, Any]:
    """Run one rank in the process that Horovod started for it; an error is returned, not raised.

    A failing rank returns its error and shuts Horovod down. The others, which wait for it, then
    fail and return their errors. So the outcomes of all ranks reach the driver, among them the
    first error with its traceback.
    """
    # faulthandler's watchdog is written in C. It fires even while Python hangs in a collective
    # call. Each call of `watch` restarts the countdown, and takes 0.4 ms.
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
    """Run the only rank, in a Spark task. An error is returned, so that Spark does not retry."""
    fn, args, threads, address = cloudpickle.loads(payload)
    torch.set_num_threads(threads)
    tell = Teller(address)
    meeting = Meeting(1, once_a_second(partial(tell, "")))
    return attempt(ThreadComm(0, meeting, tell), fn, args)


def _run_in_background(function: Callable[[], T]) -> Future[T]:
    """Start `function` in a thread that nothing waits for, not even the end of this process."""
    future: Future[T] = Future()

    def main() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=main, daemon=True, name="training").start()
    return future


def _watch(training: Future[Any], listener: Listener, train: Train) -> list[str]:
    """Wait until `training` has ended, or a rank has been silent for too long.

    Returns [] if the training has ended, else descriptions of the silent ranks. A rank that hangs
    but can still end itself does so `_HEAD_START_S` earlier, and prints where it hung.
    """
    start_s, timeout_s = train.start_timeout_s, train.timeout_s + _HEAD_START_S
    while (remaining_s := listener.remaining_s(train.ranks, start_s, timeout_s)) > 0:
        if wait([training], min(remaining_s, 1)).done:
            return []
    return listener.silent(timeout_s) or ["a rank that was never heard of"]


@contextmanager
def _without_side_effects() -> Iterator[threading.Event]:
    """Keep Horovod from handling this process's signals and from printing a needless traceback.

    Yields an event: setting it makes Horovod end its ranks. Without this function Horovod would set
    its own event when this process gets SIGINT or SIGTERM.

    Where a rank is killed, Horovod cancels its Spark job. The thread that waits for the job then
    dies with an error that adds nothing, so this error is only logged at level DEBUG.
    """
    from horovod.runner import gloo_run

    stop = threading.Event()
    register_event, excepthook = gloo_run.register_shutdown_event, threading.excepthook

    def log_horovod_quietly(args: threading.ExceptHookArgs) -> None:
        if args.thread is not None and "run_spark" in args.thread.name:
            log.debug("Horovod's Spark job: %s", args.exc_value)
        else:
            excepthook(args)

    gloo_run.register_shutdown_event = lambda: stop
    threading.excepthook = log_horovod_quietly
    try:
        yield stop
    finally:
        gloo_run.register_shutdown_event, threading.excepthook = register_event, excepthook


@contextmanager
def _services_bound(spark: SparkSession) -> Iterator[set[str] | None]:
    """Yield the names of the network interfaces for Horovod to use; None = all.

    Where the session is on the loopback address only, the loopback interface is yielded, and
    Horovod's services bind to it, those of the driver and those of the tasks. Horovod has no
    setting for this: its services listen on every address. So its functions are replaced: on the
    driver for the length of the `with` block, and in each Spark worker, before its first Horovod
    task, for good.
    """
    if not is_on_loopback(spark):
        yield None
        return
    import horovod.spark.runner as horovod_runner

    make_mapper = horovod_runner._make_mapper

    def make_bound_mapper(*args: Any) -> Callable[[int, Any], Any]:
        mapper = make_mapper(*args)

        def bound_mapper(index: int, rows: Any) -> Any:
            from recspark.train.launch import bind_services

            bind_services(LOOPBACK)
            return mapper(index, rows)

        return bound_mapper

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
    """Make the Horovod services that this process starts later bind to `host`.

    Returns a function that undoes this.
    """
    from horovod.runner.common.util import network
    from horovod.runner.http import http_server
    from horovod.runner.util.network import find_port

    def find_port_on_host(factory: Callable[[tuple[str, int]], Any]) -> Any:
        return find_port(lambda address: factory((host, address[1])))

    def set_find_port(function: Callable[..., Any]) -> None:
        network.find_port = http_server.find_port = function

    set_find_port(find_port_on_host)
    return partial(set_find_port, find_port)


class _Output:
    """A file-like object that keeps the last lines printed by the ranks.

    Horovod writes a rank's output to it only when the rank ends.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=200)

    def write(self, text: str) -> None:
        self._lines.extend(line for line in text.splitlines() if line.strip())

    def flush(self) -> None:
        pass

    def tail(self) -> str:
        return "\n".join(self._lines)


def await_slots(spark: SparkSession, train: Train, *, after_a_loss: bool = False) -> None:
    """Wait until the cluster has a task slot per rank.

    Raises NoSlotsError once the number of slots has not grown for `_STABLE_S`, or in a local
    session at once, as no more slots are expected then; also after `train.start_timeout_s`. Pass
    `after_a_loss` where an executor was lost: the cluster may need longer to start another one, so
    only `train.start_timeout_s` counts then.
    """
    jsc: Any = spark.sparkContext._jsc.sc()
    profile = jsc.resourceProfileManager().defaultResourceProfile()
    started_at = changed_at = time.monotonic()
    previous_slots = -1
    while (slots := int(jsc.maxNumConcurrentTasks(profile))) < train.ranks:
        checked_at = time.monotonic()
        if slots != previous_slots:
            previous_slots, changed_at = slots, checked_at
        is_stable = not after_a_loss and checked_at - changed_at > _STABLE_S
        is_stable = is_stable or jsc.isLocal()
        if is_stable or checked_at - started_at > train.start_timeout_s:
            raise NoSlotsError(
                f"{train.ranks} ranks need as many task slots, the cluster has {slots}: give the "
                "training job more executors, with one slot each, or lower train.ranks"
            )
        time.sleep(0.2)


def _thread_env(threads: int) -> dict[str, str]:
    return {name: str(threads) for name in WORKER_THREADS}


def _stack_of(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else ""

"""Where training ranks run: Horovod on Spark executors, one Spark task, or this process.

A launcher has one method, `run(fn, *args)`, which calls `fn(comm, *args)` once per rank and returns
the results in rank order. `comm` is all that a rank knows of the others. All launchers fail alike:
the first error of a rank is raised on the driver, with that rank's number, place and traceback.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import cloudpickle
import psutil
import torch
from pyspark import SparkFiles
from pyspark.sql import SparkSession

from recspark import errors
from recspark.config import Train
from recspark.errors import NoSlotsError, RankFailedError, RecsparkError

log = logging.getLogger(__name__)
T = TypeVar("T")
Tell = Callable[[str], None]

_SETTLED_S = 10  # executors are still arriving while the number of slots changed this recently
# What a rank sees when another one failed: never the cause.
_SECONDARY = ("HorovodInternalError", "BrokenBarrierError")


class Comm(Protocol):
    """What a rank knows of the others. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def allreduce(self, tensor: torch.Tensor, op: Literal["sum", "mean"] = "sum") -> torch.Tensor:
        """Return the sum or mean over all ranks, the same bits on each; `tensor` stays as it is."""

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return rank 0's tensor; the others pass one of the same shape and type."""

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks, in rank order, joined along their first axis.

        Lengths along it may differ, also from call to call.
        """

    def tell(self, text: str) -> None:
        """Say a line to whoever watches the driver."""


@dataclass(frozen=True)
class Place:
    """Where a rank ran; `executor` is Spark's executor id, `driver` in the driver's own process."""

    rank: int
    host: str
    executor: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host}, executor {self.executor}, pid {self.pid}"


@dataclass(frozen=True)
class RankResult(Generic[T]):
    """What `fn` returned on one rank, and where that was."""

    value: T
    place: Place


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

    Must be called from the main thread (Horovod sets signal handlers). A rank that runs longer than
    `train.timeout_s` prints the stacks of its threads and ends itself, so that a hung collective
    ends too. Cost: about 10 s to start, most of it imports.
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
        roots, timeout_s = [SparkFiles.getRootDirectory()], train.timeout_s
        output = _Output()
        try:
            with _Listener(self._spark, self._tell) as listener, _side_effects_undone():
                payload = cloudpickle.dumps((fn, args, train.threads, listener.address))

                def boot() -> dict[str, Any]:
                    # Travels by value and imports recspark itself: a rank is a new process, which
                    # does not know the `--py-files` of the Spark worker that started it.
                    import os
                    import sys
                    from glob import glob

                    for root in [*roots, os.environ.get("HOROVOD_SPARK_WORK_DIR", ".")]:
                        sys.path[:0] = [root, *glob(f"{root}/*.zip"), *glob(f"{root}/*.whl")]
                    from recspark.train.launch import horovod_rank

                    return horovod_rank(payload, timeout_s)

                outcomes = horovod.spark.run(
                    boot,
                    num_proc=train.ranks,
                    start_timeout=train.start_timeout_s,
                    use_gloo=True,
                    env=_thread_env(train.threads),
                    stdout=output,
                    stderr=output,
                    verbose=0,
                    executable=os.environ.get("PYSPARK_PYTHON", sys.executable),
                )
        except TimeoutException as error:
            raise NoSlotsError(
                f"{train.ranks} ranks found no slot within {train.start_timeout_s} s "
                f"(train.start_timeout_s): is another job using them? {error}"
            ) from None
        except Exception as error:
            raise RankFailedError(
                f"a rank ended without an answer: killed, or hung for {timeout_s} s "
                f"(train.timeout_s). {error}\nlast output of the ranks:\n{output.tail()}"
            ) from error
        return _results(outcomes)


class TaskLauncher:
    """One rank, in a Spark task: needs no Horovod, and the driver holds nothing."""

    ranks = 1

    def __init__(self, spark: SparkSession, train: Train, tell: Tell = log.info) -> None:
        self._spark = spark
        self._train = train
        self._tell = tell

    def run(self, fn: Callable[..., T], *args: Any) -> list[RankResult[T]]:
        """See `Launcher`."""
        sc, train = self._spark.sparkContext, self._train
        tag = f"recspark-train-{uuid.uuid4().hex}"
        watchdog = threading.Timer(train.timeout_s, sc.cancelJobsWithTag, [tag])
        sc.addJobTag(tag)
        watchdog.start()
        try:
            with _Listener(self._spark, self._tell) as listener:
                payload = cloudpickle.dumps((fn, args, train.threads, listener.address))
                outcomes = sc.parallelize([payload], 1).map(task_rank).collect()
        except Exception as error:
            raise RankFailedError(
                f"the rank ended without an answer: killed, or hung for {train.timeout_s} s "
                f"(train.timeout_s). {error}"
            ) from error
        finally:
            watchdog.cancel()
            sc.removeJobTag(tag)
        return _results(outcomes)


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
        meeting = _Meeting(self._ranks)
        comms = [_ThreadComm(rank, meeting, self._tell) for rank in range(self._ranks)]
        outcomes: list[dict[str, Any] | None] = [None] * self._ranks

        def rank_main(rank: int) -> None:
            outcomes[rank] = _attempt(comms[rank], fn, args)
            if "error" in outcomes[rank]:  # type: ignore[operator]
                meeting.barrier.abort()

        threads = [
            threading.Thread(target=rank_main, args=(rank,), daemon=True)
            for rank in range(self._ranks)
        ]
        deadline = time.monotonic() + self._timeout_s
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, outcome in enumerate(outcomes) if outcome is None]
        if hung:
            meeting.barrier.abort()
            raise RankFailedError(
                f"ranks {hung} hung for {self._timeout_s} s (train.timeout_s); in\n"
                + "\n".join(_stack(threads[rank]) for rank in hung)
            )
        return _results([outcome for outcome in outcomes if outcome is not None])


def horovod_rank(payload: bytes, timeout_s: int) -> dict[str, Any]:
    """Run one rank in the process that Horovod started for it; an error is returned, not raised.

    A failing rank answers and shuts Horovod down; the others, waiting for it, then fail and answer
    too. So the answers of all ranks reach the driver, and with them the first error's own
    traceback.
    """
    # A watchdog in C: it fires even where Python hangs in a collective.
    faulthandler.dump_traceback_later(timeout_s, exit=True)
    import horovod.torch as hvd

    fn, args, threads, address = cloudpickle.loads(payload)
    torch.set_num_threads(threads)
    hvd.init()
    try:
        return _attempt(_HorovodComm(hvd, _Teller(address)), fn, args)
    finally:
        hvd.shutdown()
        faulthandler.cancel_dump_traceback_later()


def task_rank(payload: bytes) -> dict[str, Any]:
    """Run the only rank in a Spark task; an error is returned, so that Spark does not try again."""
    fn, args, threads, address = cloudpickle.loads(payload)
    torch.set_num_threads(threads)
    return _attempt(_ThreadComm(0, _Meeting(1), _Teller(address)), fn, args)


class _HorovodComm:
    def __init__(self, hvd: Any, tell: Tell) -> None:
        self._hvd = hvd
        self.tell = tell
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()

    def allreduce(self, tensor: torch.Tensor, op: Literal["sum", "mean"] = "sum") -> torch.Tensor:
        if tensor.is_cuda:  # gloo knows no GPU: through the host
            return self.allreduce(tensor.cpu(), op).to(tensor.device)
        kind = self._hvd.Sum if op == "sum" else self._hvd.Average
        # A name that repeats lets Horovod skip its negotiation after the first step.
        return self._hvd.allreduce(
            tensor, op=kind, name=f"{op} {tensor.dtype} {tuple(tensor.shape)}"
        )

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            return self.broadcast(tensor.cpu()).to(tensor.device)
        return self._hvd.broadcast(
            tensor, root_rank=0, name=f"{tensor.dtype} {tuple(tensor.shape)}"
        )

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_cuda:
            return self.allgather(tensor.cpu()).to(tensor.device)
        return self._hvd.allgather(tensor, name=f"all {tensor.dtype} {tuple(tensor.shape[1:])}")


class _Meeting:
    """Where the ranks of one process exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.tensors: list[torch.Tensor] = [torch.empty(0)] * size


class _ThreadComm:
    def __init__(self, rank: int, meeting: _Meeting, tell: Tell) -> None:
        self.rank = rank
        self.size = meeting.barrier.parties
        self.tell = tell
        self._meeting = meeting

    def allreduce(self, tensor: torch.Tensor, op: Literal["sum", "mean"] = "sum") -> torch.Tensor:
        total = torch.stack(self._exchanged(tensor)).sum(dim=0)
        return total if op == "sum" else total / self.size

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._exchanged(tensor)[0].clone()  # not one tensor for all ranks

    def allgather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchanged(tensor))

    def _exchanged(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._meeting.tensors[self.rank] = tensor.clone()  # its owner may change it next
        self._meeting.barrier.wait()
        everyones = list(self._meeting.tensors)
        self._meeting.barrier.wait()  # nobody puts in the next one before all have read this
        return everyones


def _attempt(comm: Comm, fn: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Return what `fn` gave, or how it failed, as plain values that need no class to be read."""
    place = Place(comm.rank, socket.gethostname(), _executor_id(), os.getpid())
    comm.tell(str(place))
    try:
        return {"place": vars(place), "value": cloudpickle.dumps(fn(comm, *args))}
    except Exception as error:
        return {
            "place": vars(place),
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
            "at": time.time(),
        }


def _results(outcomes: list[dict[str, Any]]) -> list[RankResult[Any]]:
    """Return the values, or raise the first error of any rank."""
    failed = [outcome for outcome in outcomes if "error" in outcome]
    if failed:
        first = min(failed, key=lambda o: (o["error"] in _SECONDARY, o["at"]))
        kind = getattr(errors, first["error"], None)
        named = isinstance(kind, type) and issubclass(kind, RecsparkError)
        text = (
            f"{Place(**first['place'])} of {len(outcomes)}: "
            f"{'' if named else first['error'] + ': '}{first['message']}\n{first['traceback']}"
        )
        raise (kind if named else RankFailedError)(text)  # type: ignore[misc]
    return [
        RankResult(cloudpickle.loads(outcome["value"]), Place(**outcome["place"]))
        for outcome in outcomes
    ]


@contextmanager
def _side_effects_undone() -> Iterator[None]:
    """Restore the signal handlers that Horovod replaces, and keep its job's own thread quiet.

    Where a rank is killed, Horovod cancels its Spark job; the thread that waits for the job then
    dies with an error that says nothing more.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = threading.excepthook

    def quiet(args: threading.ExceptHookArgs) -> None:
        if args.thread is not None and "run_spark" in args.thread.name:
            log.debug("Horovod's Spark job: %s", args.exc_value)
        else:
            hook(args)

    threading.excepthook = quiet
    try:
        yield
    finally:
        threading.excepthook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)


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


class _Listener:
    """Passes on what ranks tell while they run, a line at a time, over TCP.

    `address` is (host, port, token); who does not begin with the token is not listened to.
    """

    def __init__(self, spark: SparkSession, tell: Tell) -> None:
        host = str(spark.sparkContext._jsc.sc().env().rpcEnv().address().host())
        self._tell = tell
        self._one_at_a_time = threading.Lock()
        self._readers: list[threading.Thread] = []
        self._server = socket.create_server(("", 0))
        self.address = (host, int(self._server.getsockname()[1]), uuid.uuid4().hex)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # ends `accept`
        self._server.close()
        for reader in self._readers:
            reader.join(5)  # the ranks have ended: what they told last is on its way

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                reader = threading.Thread(target=self._pass_on, args=(connection,), daemon=True)
                self._readers.append(reader)
                reader.start()

    def _pass_on(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile(encoding="utf-8") as lines:
            if lines.readline().strip() == self.address[2]:
                for line in lines:
                    with self._one_at_a_time:
                        self._tell(line.rstrip("\n"))


class _Teller:
    """A rank's end of `_Listener`. A driver that cannot be reached is not told; training goes on."""

    def __init__(self, address: tuple[str, int, str]) -> None:
        host, port, token = address
        self._socket: socket.socket | None = None
        with suppress(OSError):
            self._socket = socket.create_connection((host, port), timeout=10)
        self(token)

    def __call__(self, text: str) -> None:
        if self._socket is not None:
            with suppress(OSError):
                self._socket.sendall(text.replace("\n", " ").encode() + b"\n")


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


def _executor_id() -> str:
    """Return Spark's executor id, which is on the command line of the JVM above this process."""
    try:
        for process in psutil.Process().parents():
            command = process.cmdline()
            if "--executor-id" in command:
                return str(command[command.index("--executor-id") + 1])
    except psutil.Error:
        return "unknown"
    return "driver"


def _thread_env(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {name: str(threads) for name in names}


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else ""

"""How a rank reports to the driver: its result or its error, where it ran, and lines of text.

After its run a rank returns `attempt`, from which the driver takes `results`. During its run it
sends lines of text with a `Teller` to the driver's `Listener`.
"""

from __future__ import annotations

import hmac
import math
import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import cloudpickle
import psutil
from pyspark.sql import SparkSession

from recspark import errors
from recspark.errors import RankFailedError, RecsparkError
from recspark.session import listening_address
from recspark.train.comm import Comm, Tell

T = TypeVar("T")

_TOKEN_WITHIN_S = 10.0  # a new connection must send the token within this time
_STRANGERS = 32  # largest number of open connections that have not sent the token yet
_LINE_BYTES = 1 << 16  # largest length of a line

# Errors that a rank gets because another rank failed. They are never the cause of the failure.
_SECONDARY = ("HorovodInternalError", "BrokenBarrierError")


@dataclass(frozen=True)
class RankLocation:
    """Where a rank ran. `executor` is Spark's executor id, or `driver` in the driver's process."""

    rank: int
    host: str
    executor: str
    pid: int

    def __str__(self) -> str:
        return f"rank {self.rank} on host {self.host}, executor {self.executor}, pid {self.pid}"


@dataclass(frozen=True)
class RankResult(Generic[T]):
    """The value that a function returned on one rank, and the location where the rank ran."""

    value: T
    location: RankLocation


def attempt(comm: Comm, fn: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """Return the pickled result of `fn(comm, *args)`, or a description of its error.

    The description has plain values only, so that the driver can read it without the error's class.
    """
    location = RankLocation(comm.rank, socket.gethostname(), _executor_id(), os.getpid())
    comm.tell(str(location))
    try:
        return {"location": vars(location), "value": cloudpickle.dumps(fn(comm, *args))}
    except Exception as error:
        return {
            "location": vars(location),
            "error": type(error).__name__,
            "message": str(error),
            "traceback": traceback.format_exc(),
            "at": time.time(),
        }


def results(outcomes: list[dict[str, Any]]) -> list[RankResult[Any]]:
    """Return the results of all ranks, in the order of `outcomes`, which are those of `attempt`.

    If any rank failed, raises the first error in time that is not a consequence of another rank's
    error. A `RecsparkError` keeps its class, other errors become RankFailedError.
    """
    failures = [outcome for outcome in outcomes if "error" in outcome]
    if failures:
        failure = min(failures, key=lambda f: (f["error"] in _SECONDARY, f["at"]))
        error_class = getattr(errors, failure["error"], None)
        is_recspark_error = isinstance(error_class, type) and issubclass(error_class, RecsparkError)
        message = (
            f"{RankLocation(**failure['location'])} of {len(outcomes)}: "
            f"{'' if is_recspark_error else failure['error'] + ': '}{failure['message']}\n"
            f"{failure['traceback']}"
        )
        raise (error_class if is_recspark_error else RankFailedError)(message)  # type: ignore[misc]
    return [
        RankResult(cloudpickle.loads(outcome["value"]), RankLocation(**outcome["location"]))
        for outcome in outcomes
    ]


class Pulse:
    """The time of the last sign of life, of one rank or of all ranks of a process.

    `owner` describes the rank ("" until it is known). `ended` is True once the rank's connection is
    closed, so that no further sign of life can arrive.
    """

    def __init__(self) -> None:
        self.owner = ""
        self.ended = False
        self._beat_at = time.monotonic()

    def beat(self) -> None:
        self._beat_at = time.monotonic()

    def remaining_s(self, timeout_s: float) -> float:
        """Return the seconds until the last beat is `timeout_s` old; 0 or less once it is."""
        return self._beat_at + timeout_s - time.monotonic()


class Listener:
    """Receives lines of text from running ranks over TCP, and passes each line on to `tell`.

    `address` is (host, port, token). The server binds to the address of Spark's driver, which is
    the loopback address in a local session.

    A connection must send the token first. Connections that have not sent it yet are strangers: the
    newest `_STRANGERS` of them stay open, each for at most `_TOKEN_WITHIN_S`, and ranks never wait
    for them. Every line is a sign of life of its rank. An empty line is nothing else, and is not
    passed on. A line of more than `_LINE_BYTES` ends the connection.
    """

    def __init__(self, spark: SparkSession, tell: Tell) -> None:
        bound, announced = listening_address(spark)
        self._start_pulse = Pulse()
        self._pulses: list[Pulse] = []  # of each rank that has connected
        self._tell = tell
        self._tell_lock = threading.Lock()
        self._strangers: list[socket.socket] = []  # oldest first
        self._readers: list[threading.Thread] = []  # one per rank that has connected
        self._server = socket.create_server((bound, 0), family=_family(bound))
        self.address = (announced, int(self._server.getsockname()[1]), uuid.uuid4().hex)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # ends the call of `accept`
        self._server.close()
        for reader in list(self._readers):
            reader.join(5)  # the ranks have ended; their last lines may still arrive

    def remaining_s(self, ranks: int, start_s: float, timeout_s: float) -> float:
        """Return the seconds until some rank has been silent for `timeout_s`; 0 or less if one has.

        `ranks` is the number of ranks. For its first sign of life a rank has `start_s` more. A rank
        whose connection is closed has ended; it is not counted here, as its launcher notices that
        itself.

        Example: 2 ranks, `start_s` 60, `timeout_s` 10. Right after the start the result is 70. If
        both ranks connected, and their last lines came 2 and 8 seconds ago, it is 2.
        """
        pulses = list(self._pulses)
        remaining_s = [pulse.remaining_s(timeout_s) for pulse in pulses if not pulse.ended]
        if len(pulses) < ranks:
            remaining_s.append(self._start_pulse.remaining_s(start_s + timeout_s))
        return min(remaining_s, default=timeout_s)

    def silent(self, timeout_s: float) -> list[str]:
        """Return a description of each rank that has been silent for `timeout_s`."""
        pulses = list(self._pulses)
        silent_pulses = [
            pulse for pulse in pulses if not pulse.ended and pulse.remaining_s(timeout_s) <= 0
        ]
        return [pulse.owner or "a rank that has not begun" for pulse in silent_pulses]

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self._strangers.append(connection)
                if len(self._strangers) > _STRANGERS:
                    with suppress(OSError):
                        self._strangers[0].shutdown(socket.SHUT_RDWR)  # ends its `_handle`
                threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        """Read the token. If it is right, the connection is a rank's: read all its lines."""
        with suppress(OSError), connection:
            try:
                if is_rank := _sends_token(connection, self.address[2]):
                    self._readers.append(threading.current_thread())
            finally:
                self._strangers.remove(connection)
            if is_rank:
                pulse = Pulse()
                self._pulses.append(pulse)
                try:
                    self._read_lines(connection, pulse)
                finally:
                    pulse.ended = True

    def _read_lines(self, connection: socket.socket, pulse: Pulse) -> None:
        connection.settimeout(None)
        with connection.makefile("rb") as lines:
            while line := lines.readline(_LINE_BYTES):
                if not line.endswith(b"\n"):
                    return
                pulse.beat()
                if text := line.decode(errors="replace").rstrip("\n"):
                    pulse.owner = (
                        pulse.owner or text
                    )  # the first text of a rank is its `RankLocation`
                    with self._tell_lock:
                        self._tell(text)


def _sends_token(connection: socket.socket, token: str) -> bool:
    """Return whether the first line is the token. Reads no more than that, for a limited time."""
    expected, received = f"{token}\n".encode(), b""
    deadline = time.monotonic() + _TOKEN_WITHIN_S
    while len(received) < len(expected) and (remaining_s := deadline - time.monotonic()) > 0:
        connection.settimeout(remaining_s)
        block = connection.recv(len(expected) - len(received))
        if not block:
            return False
        received += block
    return hmac.compare_digest(received, expected)


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]


class Teller:
    """A rank's connection to the driver's `Listener`: `teller(text)` sends one line.

    If the driver cannot be reached, lines are dropped without an error, and the training goes on.
    (A single rank goes on only for `train.timeout_s`, as the driver then takes it for hung.)
    """

    def __init__(self, address: tuple[str, int, str]) -> None:
        host, port, token = address
        self._socket: socket.socket | None = None
        with suppress(OSError):
            self._socket = socket.create_connection((host, port), timeout=10)
        self(token)

    def __call__(self, text: str) -> None:
        if self._socket is not None:
            line = text.replace("\n", " ").encode(errors="replace")[: _LINE_BYTES - 1]
            with suppress(OSError):
                self._socket.sendall(line + b"\n")


def once_a_second(do: Callable[[], None]) -> Callable[[], None]:
    """Return a function to call as often as you like; it calls `do` at most once per second."""
    called_at = -math.inf

    def limited() -> None:
        nonlocal called_at
        moment = time.monotonic()
        if moment - called_at >= 1:
            called_at = moment
            do()

    return limited


def _executor_id() -> str:
    """Return the id of the Spark executor that this process runs in.

    The id is on the command line of a parent process, the executor's JVM. Without such a parent
    this process is the driver's, and the result is `driver`; `unknown` where parents cannot be
    inspected.
    """
    try:
        for process in psutil.Process().parents():
            command = process.cmdline()
            if "--executor-id" in command:
                return str(command[command.index("--executor-id") + 1])
    except psutil.Error:
        return "unknown"
    return "driver"

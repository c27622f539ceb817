"""How a rank answers the driver: what it returned or how it failed, where it ran, what it tells."""

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

_TOKEN_WITHIN_S = 10.0  # from the connection on
_STRANGERS = 32  # connections that have not given the token yet
_LINE_BYTES = 1 << 16

# What a rank sees when another one failed: never the cause.
_SECONDARY = ("HorovodInternalError", "BrokenBarrierError")


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


def attempt(comm: Comm, fn: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
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


def results(outcomes: list[dict[str, Any]]) -> list[RankResult[Any]]:
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


class Pulse:
    """When there was last a sign of life; `of` says whose, `ended` that none is to come."""

    def __init__(self) -> None:
        self.of = ""
        self.ended = False
        self._at = time.monotonic()

    def beat(self) -> None:
        self._at = time.monotonic()

    def left(self, timeout_s: float) -> float:
        """Return the seconds until nothing was heard for `timeout_s`, 0 or less once that is so."""
        return self._at + timeout_s - time.monotonic()


class Listener:
    """Passes on what ranks tell while they run, a line at a time, over TCP.

    `address` is (host, port, token); it binds where Spark's driver does, the loopback address in a
    local session. Who does not begin with the token, soon, is not listened to: of strangers the
    newest `_STRANGERS` are kept, for `_TOKEN_WITHIN_S` at most, and nobody waits for them. Every line
    beats the pulse of its rank, an empty one does nothing else; one above `_LINE_BYTES` ends the
    connection.
    """

    def __init__(self, spark: SparkSession, tell: Tell) -> None:
        bound, announced = listening_address(spark)
        self._begun = Pulse()
        self._ranks: list[Pulse] = []  # those that were heard of
        self._tell = tell
        self._one_at_a_time = threading.Lock()
        self._strangers: list[socket.socket] = []  # that have not given the token yet, oldest first
        self._readers: list[threading.Thread] = []  # of those that have
        self._server = socket.create_server((bound, 0), family=_family(bound))
        self.address = (announced, int(self._server.getsockname()[1]), uuid.uuid4().hex)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # ends `accept`
        self._server.close()
        for reader in list(self._readers):
            reader.join(5)  # the ranks have ended: what they told last is on its way

    def left(self, ranks: int, start_s: float, timeout_s: float) -> float:
        """Return the seconds until one of `ranks` was silent for `timeout_s`, 0 or less once one was.

        A rank has `start_s` more to be heard of at all. One whose connection has ended has ended
        itself, which is for others to see.
        """
        heard = list(self._ranks)
        left = [pulse.left(timeout_s) for pulse in heard if not pulse.ended]
        if len(heard) < ranks:
            left.append(self._begun.left(start_s + timeout_s))
        return min(left, default=timeout_s)

    def silent(self, timeout_s: float) -> list[str]:
        """Return which ranks were silent for `timeout_s`."""
        heard = list(self._ranks)
        quiet = [pulse for pulse in heard if not pulse.ended and pulse.left(timeout_s) <= 0]
        return [pulse.of or "a rank that has not begun" for pulse in quiet]

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self._strangers.append(connection)
                if len(self._strangers) > _STRANGERS:
                    with suppress(OSError):
                        self._strangers[0].shutdown(socket.SHUT_RDWR)  # ends its reader
                threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        """Read the token, then, from a rank, its lines."""
        with suppress(OSError), connection:
            try:
                if known := _gives(connection, self.address[2]):
                    self._readers.append(threading.current_thread())
            finally:
                self._strangers.remove(connection)
            if known:
                mine = Pulse()
                self._ranks.append(mine)
                try:
                    self._read(connection, mine)
                finally:
                    mine.ended = True

    def _read(self, connection: socket.socket, mine: Pulse) -> None:
        connection.settimeout(None)
        with connection.makefile("rb") as lines:
            while line := lines.readline(_LINE_BYTES):
                if not line.endswith(b"\n"):
                    return
                mine.beat()
                if text := line.decode(errors="replace").rstrip("\n"):
                    mine.of = mine.of or text  # a rank begins with its place
                    with self._one_at_a_time:
                        self._tell(text)


def _gives(connection: socket.socket, token: str) -> bool:
    """Return whether the first line is the token; reads no more than that, and not for long."""
    wanted, given = f"{token}\n".encode(), b""
    until = time.monotonic() + _TOKEN_WITHIN_S
    while len(given) < len(wanted) and (left := until - time.monotonic()) > 0:
        connection.settimeout(left)
        block = connection.recv(len(wanted) - len(given))
        if not block:
            return False
        given += block
    return hmac.compare_digest(given, wanted)


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]


class Teller:
    """A rank's end of `Listener`. A driver that cannot be reached is not told; training goes on
    (one rank alone: until `train.timeout_s` is over).
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
    """Return `do` as a function that may be called often: it does it once a second at most."""
    done_at = -math.inf

    def limited() -> None:
        nonlocal done_at
        now = time.monotonic()
        if now - done_at >= 1:
            done_at = now
            do()

    return limited


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

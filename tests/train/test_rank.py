"""The driver's ear for its ranks: strangers are not heard, wait for nobody and are not waited for."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from pyspark.sql import SparkSession

from recspark.train import rank
from recspark.train.rank import Listener, Teller

pytestmark = [pytest.mark.spark, pytest.mark.torch]


class Heard:
    """Lines, and a wait for the next ones."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._more = threading.Condition()

    def __call__(self, line: str) -> None:
        with self._more:
            self.lines.append(line)
            self._more.notify_all()

    def until(self, done: Callable[[], bool]) -> None:
        with self._more:
            assert self._more.wait_for(done, timeout=60)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def listener(spark: SparkSession, heard: Heard) -> Iterator[Listener]:
    with Listener(spark, heard) as listening:
        yield listening


def stranger(listener: Listener) -> socket.socket:
    return socket.create_connection(listener.address[:2], timeout=60)


def is_ended(connection: socket.socket) -> bool:
    """Return whether the other side has closed; waits for it."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_it_listens_to_this_machine_only(listener: Listener) -> None:
    assert listener._server.getsockname()[0] == "127.0.0.1" == listener.address[0]


@pytest.mark.parametrize(
    "said",
    [
        b"\n" * 33,
        b"0" * 32 + b"\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\nhello hello",
        bytes(range(256)),
    ],
)
def test_who_does_not_begin_with_the_token_is_not_heard(
    listener: Listener, heard: Heard, said: bytes
) -> None:
    with stranger(listener) as other:
        other.sendall(said + b"\nand this\n")
        assert is_ended(other)
    assert heard.lines == []
    assert listener._pulses == []  # nor is it taken for a rank that lives


def test_a_stranger_does_not_fill_the_memory(listener: Listener) -> None:
    line = b"x" * (1 << 28)  # no more than a token's length of it is read
    with stranger(listener) as other, pytest.raises(ConnectionError):
        other.sendall(line)


def test_a_rank_says_no_endless_line(listener: Listener, heard: Heard) -> None:
    with stranger(listener) as other:
        other.sendall(listener.address[2].encode() + b"\n" + b"x" * (rank._LINE_BYTES + 1))
        assert is_ended(other)
    assert heard.lines == []
    teller = Teller(listener.address)
    teller("y" * (2 * rank._LINE_BYTES))  # a teller keeps to it
    teller("and on")
    heard.until(lambda: "and on" in heard.lines)
    assert len(heard.lines[0]) == rank._LINE_BYTES - 1


def test_strangers_who_say_nothing_delay_nobody(spark: SparkSession, heard: Heard) -> None:
    """More of them than are kept: ranks are heard, and the end does not wait for strangers."""
    with Listener(spark, heard) as listener:
        strangers = [stranger(listener) for _ in range(2 * rank._STRANGERS)]
        tellers = [Teller(listener.address) for _ in range(3)]
        for number, teller in enumerate(tellers):
            teller(f"rank {number}")
        heard.until(lambda: len(heard.lines) == 3)
        assert set(heard.lines) == {"rank 0", "rank 1", "rank 2"}
        assert is_ended(strangers[0])  # the oldest made room
        for teller in tellers:
            assert teller._socket is not None
            teller._socket.close()
    assert len(listener._strangers) >= rank._STRANGERS - 3  # still there: nobody waited
    for other in strangers:
        other.close()


def test_a_stranger_in_the_way_of_a_token_is_dropped(listener: Listener, heard: Heard) -> None:
    with stranger(listener) as slow:
        slow.sendall(listener.address[2].encode()[:10])
        teller = Teller(listener.address)
        teller("hello")
        heard.until(lambda: heard.lines == ["hello"])
        slow.sendall(listener.address[2].encode()[10:] + b"\nlate\n")  # slow is not wrong
        heard.until(lambda: heard.lines == ["hello", "late"])

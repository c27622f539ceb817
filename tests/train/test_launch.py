"""Launchers: every behaviour over the in-process twin, one Spark task, and Horovod on Spark."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from recspark.config import Train
from recspark.errors import DivergedError, NoSlotsError, RankFailedError
from recspark.train import rank as rank_module
from recspark.train.comm import Comm
from recspark.train.launch import Launcher, LocalLauncher, launcher
from recspark.train.rank import Listener, Pulse

pytestmark = pytest.mark.torch
Make = Callable[..., Launcher]


def train(**changes: Any) -> Train:
    return Train(**{"ranks": 2, "threads": 1, "start_timeout_s": 60, "timeout_s": 60, **changes})


@pytest.fixture(
    params=[
        "in_process",
        pytest.param("horovod", marks=[pytest.mark.spark, pytest.mark.horovod]),
    ]
)
def make(request: pytest.FixtureRequest) -> Make:
    """A factory of two-rank launchers."""
    in_process = request.param == "in_process"
    spark = None if in_process else request.getfixturevalue("spark")

    def of(**options: Any) -> Launcher:
        changes = {k: options.pop(k) for k in list(options) if k != "tell"}
        return launcher(spark, train(**changes), in_process=in_process, **options)

    return of


# Nested functions travel by value: the ranks do not see the folder of the tests.
def exchange() -> Callable[..., Any]:
    def fn(comm: Any, base: int, heard: str) -> dict[str, Any]:
        import time
        from pathlib import Path

        import torch

        mine = torch.full((3,), float(comm.rank + base))
        comm.tell(f"hello from {comm.rank}")
        out = {
            "rank": comm.rank,
            "size": comm.size,
            "sum": comm.allreduce(mine).tolist(),
            "mean": comm.allreduce(mine, "mean").tolist(),
            "mine": mine.tolist(),
            "first": comm.broadcast(torch.tensor([comm.rank * 7 + base])).tolist(),
        }
        for _ in range(20):
            mine = comm.allreduce(mine)
        for _ in range(600):  # a minute, where nobody listens
            if all(Path(f"{heard}-{rank}").exists() for rank in range(comm.size)):
                break
            time.sleep(0.1)
        else:
            raise TimeoutError("the driver does not hear what a rank tells while it runs")
        return {**out, "later": mine.tolist(), "threads": torch.get_num_threads()}

    return fn


def failing() -> Callable[..., Any]:
    def fn(comm: Any) -> None:
        import torch

        def the_broken_part() -> None:
            raise ValueError("no luck on this rank")

        comm.allreduce(torch.ones(1))
        if comm.rank == 1:
            the_broken_part()
        comm.allreduce(torch.ones(1))  # rank 0 waits here for one that does not come

    return fn


def heard(told: list[str], marks: str) -> Callable[[str], None]:
    """Note what is told, and let the ranks see that it was."""

    def tell(line: str) -> None:
        told.append(line)
        if line.startswith("hello from "):
            Path(f"{marks}-{line[-1]}").touch()

    return tell


def test_ranks_exchange_tensors_and_answer_in_order(make: Make, tmp_path: Path) -> None:
    """Lines arrive while ranks run, not when they have ended: else they would not end."""
    told: list[str] = []
    marks = str(tmp_path / "heard")
    results = make(tell=heard(told, marks)).run(exchange(), 10, marks)
    for rank, result in enumerate(results):
        assert result.value == {
            "rank": rank,
            "size": 2,
            "sum": [21.0] * 3,
            "mean": [10.5] * 3,
            "mine": [rank + 10.0] * 3,
            "first": [10],
            "later": [21.0 * 2**19] * 3,
            "threads": 1,
        }
        assert result.location.rank == rank
        assert result.location.executor == "driver"
        assert told.index(str(result.location)) < told.index(f"hello from {rank}")


def test_a_failing_rank_raises_with_its_own_traceback(make: Make, request: Any) -> None:
    with pytest.raises(RankFailedError, match="ValueError: no luck on this rank") as caught:
        make(timeout_s=3600).run(failing())  # not ended by a watchdog
    text = str(caught.value)
    assert text.startswith("rank 1 on host")
    assert "in the_broken_part" in text
    if "horovod" in request.node.callspec.id:  # the session is usable afterwards
        spark = request.getfixturevalue("spark")
        assert spark.range(10).selectExpr("sum(id)").first()[0] == 45


def test_a_named_error_keeps_its_name() -> None:
    def fn(comm: Comm) -> None:
        raise DivergedError("step 3: the loss is nan")

    with pytest.raises(DivergedError, match=r"rank 0 on host .* of 1: step 3: the loss is nan"):
        LocalLauncher(1).run(fn)


def test_more_ranks_in_process_sum_in_rank_order() -> None:
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])

    def fn(comm: Comm) -> float:
        return float(comm.allreduce(values[comm.rank]))

    want = float(values.sum())
    assert [r.value for r in LocalLauncher(4).run(fn)] == [want] * 4


def hanging() -> Callable[..., Any]:
    def fn(comm: Any) -> None:
        import time

        import torch

        def stuck_here() -> None:
            time.sleep(3600)

        if comm.rank == 1:
            stuck_here()
        comm.allreduce(torch.ones(1))

    return fn


def advancing() -> Callable[..., Any]:
    def fn(comm: Any, steps: int, seconds: float) -> int:
        import time

        import torch

        for _ in range(steps):
            time.sleep(seconds)
            comm.allreduce(torch.ones(1))
        return steps

    return fn


def test_a_long_training_is_not_taken_for_a_hung_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: twenty exchanges, nine tenths of the timeout before each."""
    clock = Clock()
    monkeypatch.setattr(rank_module, "time", clock)

    def fn(comm: Comm) -> int:
        for _ in range(20):
            clock.now += 900 * (comm.rank == 0)
            comm.allreduce(torch.ones(1))
        return comm.rank

    assert [r.value for r in LocalLauncher(2, timeout_s=1000).run(fn)] == [0, 1]
    pulse = Pulse()
    clock.now += 999
    assert pulse.remaining_s(1000) == 1
    clock.now += 1
    assert pulse.remaining_s(1000) == 0
    pulse.beat()
    assert pulse.remaining_s(1000) == 1000


class Clock:
    """Stands for the module `time`."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic


@pytest.mark.spark
def test_the_driver_waits_for_the_rank_that_was_silent_longest(
    spark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(rank_module, "time", clock)
    with Listener(spark, lambda _: None) as listener:
        assert listener.remaining_s(2, 60, 10) == 70  # both have their start before them
        ranks = [Pulse(), Pulse()]
        listener._pulses = ranks
        clock.now = 8
        ranks[0].beat()
        assert listener.remaining_s(2, 60, 10) == 2
        assert listener.remaining_s(3, 60, 10) == 2
        assert listener.silent(10) == []
        clock.now = 10
        ranks[1].owner = "rank 1 on host h"
        assert listener.remaining_s(2, 60, 10) == 0
        assert listener.silent(10) == ["rank 1 on host h"]
        ranks[1].ended = True
        assert listener.remaining_s(2, 60, 10) == 8


@pytest.mark.slow
def test_a_long_training_runs_on_beyond_the_timeout(make: Make) -> None:
    assert [r.value for r in make(timeout_s=20).run(advancing(), 6, 5)] == [6, 6]


@pytest.mark.slow
def test_a_hung_rank_is_ended(make: Make) -> None:
    with pytest.raises(RankFailedError, match="hung") as caught:
        make(timeout_s=8).run(hanging())
    assert "stuck_here" in str(caught.value)


@pytest.mark.horovod
@pytest.mark.spark
def test_a_killed_rank_raises_and_the_session_is_usable(spark: Any) -> None:
    def fn(comm: Any) -> None:
        import sys

        import torch

        if comm.rank == 1:
            print("the last words", file=sys.stderr, flush=True)
            os._exit(9)
        comm.allreduce(torch.ones(1))

    with pytest.raises(RankFailedError, match="without an answer") as caught:
        launcher(spark, train()).run(fn)
    assert "the last words" in str(caught.value)
    assert spark.range(10).count() == 10


def freezing() -> Callable[..., Any]:
    def fn(comm: Any) -> None:
        import os
        import signal

        import torch

        comm.allreduce(torch.ones(1))
        if comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGSTOP)  # all its threads, a watchdog's among them
        comm.allreduce(torch.ones(1))

    return fn


@pytest.mark.spark
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.horovod)])
def test_a_frozen_rank_is_ended_by_the_driver(spark: Any, ranks: int) -> None:
    told: list[str] = []
    with pytest.raises(RankFailedError, match=r"hung for 5 s \(train.timeout_s\)") as caught:
        launcher(spark, train(ranks=ranks, timeout_s=5), tell=told.append).run(freezing())
    frozen = next(line for line in told if line.startswith(f"rank {ranks - 1} on host"))
    if ranks > 1:
        assert frozen in str(caught.value)
    with suppress(psutil.NoSuchProcess):  # its killer may still be about to
        psutil.Process(int(frozen.rpartition("pid ")[2])).wait(60)
    assert spark.range(0, 10, 1, 2).count() == 10  # on both slots


@pytest.mark.horovod
@pytest.mark.spark
def test_no_slot_for_a_rank_is_said_at_once(spark: Any) -> None:
    """Not after `start_timeout_s`, an hour."""
    with pytest.raises(NoSlotsError, match="3 ranks need as many task slots, the cluster has 2"):
        launcher(spark, train(ranks=3, start_timeout_s=3600)).run(exchange(), 0, "")


@pytest.mark.spark
def test_one_rank_is_a_spark_task(spark: Any, tmp_path: Path) -> None:
    told: list[str] = []
    marks = str(tmp_path / "heard")
    (result,) = launcher(spark, train(ranks=1), tell=heard(told, marks)).run(exchange(), 5, marks)
    assert (result.value["sum"], result.value["size"]) == ([5.0] * 3, 1)
    assert result.location.pid != os.getpid()
    assert told == [str(result.location), "hello from 0"]

    def fn(comm: Any) -> None:
        raise ValueError("no luck in the task")

    with pytest.raises(RankFailedError, match="rank 0 on host .* no luck in the task"):
        launcher(spark, train(ranks=1)).run(fn)


@pytest.mark.slow
@pytest.mark.spark
def test_a_task_runs_on_beyond_the_timeout(spark: Any) -> None:
    told: list[str] = []
    one = launcher(spark, train(ranks=1, timeout_s=8), tell=told.append)
    assert [r.value for r in one.run(advancing(), 6, 2)] == [6]
    assert len(told) == 1  # where it runs; signs of life are not passed on


@pytest.mark.slow
@pytest.mark.spark
def test_a_hung_task_is_ended(spark: Any) -> None:
    def fn(comm: Any) -> None:
        import time

        time.sleep(3600)

    with pytest.raises(RankFailedError, match="hung for 3 s"):
        launcher(spark, train(ranks=1, timeout_s=3)).run(fn)
    assert spark.range(10).count() == 10

"""A rank of `coevolve` that is killed in the middle of a window, with real Horovod processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recspark import storage
from recspark.config import Train
from recspark.errors import RankFailedError
from recspark.models.neural import Job
from recspark.models.sequences.coevolve import CoevolveSettings, train_rank
from recspark.testing import synth
from recspark.train.feed import plan_shards
from recspark.train.launch import LocalLauncher, launcher
from recspark.train.loop import LoopOptions

pytestmark = [pytest.mark.spark, pytest.mark.torch, pytest.mark.horovod, pytest.mark.slow]
RANKS = Train(ranks=2, threads=1, start_timeout_s=60, timeout_s=3600)  # type: ignore[call-arg]


def killed_once(n_windows: int, once: Path) -> Callable[..., Any]:
    """Rank 1 is killed inside the first levels of its window number `n_windows`, the first time."""

    def fn(comm: Any, job: Any) -> Any:
        import os

        from recspark.models.sequences import coevolve
        from recspark.nets.coevolve import CoevolveNet

        evolve, calls = CoevolveNet.evolve, iter(range(10**6))

        def killing(net: Any, window: Any) -> Any:
            states = evolve(net, window)
            if next(calls) == n_windows and comm.rank == 1 and not once.exists():
                once.touch()
                os._exit(9)
            return states

        CoevolveNet.evolve = killing  # type: ignore[method-assign]
        try:
            return coevolve.train_rank("", comm, job)
        finally:
            CoevolveNet.evolve = evolve  # type: ignore[method-assign]

    return fn


def test_a_killed_rank_costs_the_windows_since_the_last_checkpoint(
    spark: Any, tmp_path: Path
) -> None:
    events = synth.power_law(60, 40)
    training = synth.write_training(events, str(tmp_path / "rows"), "training_events", n_files=4)
    n_windows = 5
    settings = CoevolveSettings(
        embedding_size=6, n_recent=3, batch_size=-(-training.n_rows // n_windows)
    )
    loop = LoopOptions(2, 0.01, checkpoints=str(tmp_path / "checkpoints"), checkpoint_every_s=0)
    items = np.unique(events.item_idx).astype(np.int32)
    job = Job(settings, items, plan_shards(training, 2), None, loop)
    told: list[str] = []
    fn = killed_once(n_windows + 2, tmp_path / "once")
    with pytest.raises(RankFailedError, match="without an answer"):
        launcher(spark, RANKS, tell=told.append).run(fn, job)
    again = launcher(spark, RANKS, tell=told.append).run(fn, job)[0].value
    assert "resuming after epoch 1 of 2, batch 2" in told
    storage.remove(job.loop.checkpoints)
    whole = LocalLauncher(2).run(partial(train_rank, ""), job)[0].value
    assert [e.loss for e in again.curve.epochs] == [e.loss for e in whole.curve.epochs]
    for name, array in whole.weights.items():
        np.testing.assert_array_equal(again.weights[name], array, err_msg=name)

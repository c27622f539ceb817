"""What ends a training half-way, with real Horovod processes; and how the next run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recspark import storage
from recspark.config import Train
from recspark.errors import DivergedError, RankFailedError
from recspark.models.autoencoders import multvae
from recspark.models.neural import Job
from recspark.testing import synth
from recspark.train import checkpoint
from recspark.train.feed import plan_shards
from recspark.train.launch import LocalLauncher, launcher
from recspark.train.loop import LoopOptions

pytestmark = [pytest.mark.spark, pytest.mark.torch, pytest.mark.horovod]
# What fails ends its training at once, not by the watchdog.
RANKS = Train(ranks=2, threads=1, start_timeout_s=60, timeout_s=3600)  # type: ignore[call-arg]
STEPS = 4  # of an epoch


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Three epochs of Mult-VAE, a checkpoint after every step."""
    events = synth.power_law(100, 40)
    training = synth.write_training(events, str(tmp_path / "rows"), "training_bags", n_files=4)
    batch_size = -(-training.n_rows // STEPS)
    settings = multvae.MultVaeSettings(hidden_size=8, latent_size=4, batch_size=batch_size)
    loop = LoopOptions(
        epochs=3,
        learning_rate=0.01,
        checkpoints=str(tmp_path / "checkpoints"),
        checkpoint_every_s=0,
    )
    items = np.unique(events.item_idx).astype(np.int32)
    return Job(settings, items, plan_shards(training, 2), None, loop)


def broken(how: str, at: int, once: Path) -> Callable[..., Any]:
    """Rank 1 breaks at its step `at`, the first time."""

    def fn(comm: Any, job: Any) -> Any:
        import os

        from recspark.models.autoencoders import multvae

        loss, calls = multvae.row_loss, iter(range(10**6))

        def row_loss(*arguments: Any) -> Any:
            out = loss(*arguments)
            if next(calls) == at and comm.rank == 1 and not once.exists():
                once.touch()
                if how == "killed":
                    os._exit(9)
                return out * float("nan")
            return out

        multvae.row_loss = row_loss
        try:
            return multvae.train_rank(comm, job)
        finally:
            multvae.row_loss = loss

    return fn


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(
    spark: Any, job: Job, tmp_path: Path
) -> None:
    """Killed at step 6, in the second epoch; then its newest checkpoint is torn as well."""
    told: list[str] = []
    fn = broken("killed", 6, tmp_path / "once")
    with pytest.raises(RankFailedError, match="without an answer"):
        launcher(spark, RANKS, tell=told.append).run(fn, job)
    assert spark.range(10).count() == 10

    newest = checkpoint.newest(job.loop.checkpoints)
    assert newest.endswith("epoch-000001-batch-000000002")
    os.truncate(f"{newest}/vector.npy", 40)
    again = launcher(spark, RANKS, tell=told.append).run(fn, job)[0].value
    assert "resuming after epoch 1 of 3, batch 1" in told
    found = checkpoint.load(again.checkpoint_uri)

    storage.remove(job.loop.checkpoints)
    whole = LocalLauncher(2).run(multvae.train_rank, job)[0].value
    assert [e.loss for e in again.curve.epochs] == [e.loss for e in whole.curve.epochs]
    for name, want in checkpoint.load(whole.checkpoint_uri).items():
        np.testing.assert_array_equal(found[name].numpy(), want.numpy())


@pytest.mark.slow
def test_nan_on_one_rank_stops_all_with_the_step(spark: Any, job: Job, tmp_path: Path) -> None:
    fn = broken("nan", 5, tmp_path / "once")
    with pytest.raises(
        DivergedError, match=r"step 6 of 12 \(epoch 2\).*epoch-000001-batch-000000001"
    ):
        launcher(spark, RANKS).run(fn, job)
    told: list[str] = []
    launcher(spark, RANKS, tell=told.append).run(fn, job)
    assert "resuming after epoch 1 of 3, batch 1" in told

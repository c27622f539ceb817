"""The loop: what a step is, however many ranks share it; resuming; refusing to go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

from recspark import storage
from recspark.errors import DivergedError, FeedError
from recspark.train import checkpoint
from recspark.train.feed import Batch
from recspark.train.launch import Comm, LocalLauncher
from recspark.train.loop import LoopOptions, Trained, load_weights, train

pytestmark = pytest.mark.torch
OPTIONS = LoopOptions(epochs=5, learning_rate=0.1, weight_decay=0.01)


class Rows:
    """Rows 0..n-1 with x and y = 2 x + 1, a rank's share of each step given by hand."""

    def __init__(self, shares: list[list[list[int]]], rank: int, width: int = 4) -> None:
        self.shares = shares[rank]
        self.steps = len(self.shares)
        self.n_rows_of_all = sum(len(step) for ranks in shares for step in ranks)
        self.width = width

    def epoch(self, epoch: int) -> Iterator[Batch]:
        for step in self.shares:
            own = (step or [0]) + [0] * (self.width - len(step or [0]))
            x = torch.tensor(own, dtype=torch.float64)[:, None] / 10
            weight = (torch.arange(self.width) < len(step)).float()
            yield Batch({"x": x, "y": 2 * x + 1}, weight)


def net() -> nn.Module:
    made = nn.Linear(1, 1).double()
    with torch.no_grad():
        made.weight.fill_(0.3)
        made.bias.fill_(-0.2)
    return made


def squared(made: nn.Module) -> Any:
    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        return ((made(batch.tensors["x"]) - batch.tensors["y"]) ** 2)[:, 0]

    return loss


def fit(comm: Comm, shares: list[list[list[int]]], options: LoopOptions) -> Trained:
    made = net()
    return train(comm, made, squared(made), Rows(shares, comm.rank), options)


def trained(shares: list[list[list[int]]], options: LoopOptions = OPTIONS, **more: Any) -> Any:
    return [r.value for r in LocalLauncher(len(shares), **more).run(fit, shares, options)]


ONE = [[[0, 1, 2, 3], [4, 5, 6]]]
TWO = [[[0, 1, 2], [4, 5, 6]], [[3], []]]  # the same rows in the same steps, unequally shared
THREE = [[[1], [4]], [[0, 3], [5, 6]], [[2], []]]


def test_a_step_is_adams_on_the_mean_gradient_by_hand() -> None:
    """One step of Adam moves each parameter by the learning rate, against its gradient's sign."""
    options = LoopOptions(epochs=1, learning_rate=0.1)
    (found,) = trained([[[0, 1, 2, 3]]], options)
    np.testing.assert_allclose(found.vector, [0.3 + 0.1, -0.2 + 0.1], atol=1e-6)
    x = np.arange(4) / 10
    assert found.epochs[0].loss == pytest.approx(((0.3 * x - 0.2 - (2 * x + 1)) ** 2).mean())
    # Two steps by the formulas of Kingma & Ba, algorithm 1; the learning rate falls linearly.
    options = LoopOptions(epochs=2, learning_rate=0.1, weight_decay=0.5)
    (found,) = trained([[[0, 1, 2, 3]]], options)
    at, m, v = np.array([0.3, -0.2]), np.zeros(2), np.zeros(2)
    for t in (1, 2):
        error = at[0] * x + at[1] - (2 * x + 1)
        g = np.array([(2 * error * x).mean(), (2 * error).mean()]) + 0.5 * at
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.1 * (1 - (t - 1) / 2)
        at = at - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(found.vector, at, rtol=1e-12)


@pytest.mark.parametrize("shares", [TWO, THREE], ids=["two", "three"])
def test_ranks_do_not_change_the_steps(shares: list[list[list[int]]]) -> None:
    (one,) = trained(ONE)
    several = trained(shares)
    np.testing.assert_allclose(several[0].vector, one.vector, rtol=1e-12)
    assert [e.loss for e in several[0].epochs] == pytest.approx([e.loss for e in one.epochs])
    assert all(other.vector is None for other in several[1:])


def test_ranks_start_from_rank_0() -> None:
    def fn(comm: Comm) -> Trained:
        made = net()
        with torch.no_grad():
            made.bias += comm.rank
        return train(comm, made, squared(made), Rows(TWO, comm.rank), OPTIONS)

    found = LocalLauncher(2).run(fn)[0].value
    np.testing.assert_allclose(found.vector, trained(ONE)[0].vector, rtol=1e-12)


def test_progress_is_told_once_an_epoch() -> None:
    told: list[str] = []
    trained(TWO, tell=told.append)
    lines = [line for line in told if line.startswith("epoch")]
    assert len(lines) == 5
    assert lines[0].startswith("epoch 1 of 5: loss ")
    assert lines[0].endswith("rows/s")


def test_rows_that_do_not_add_up_are_an_error() -> None:
    def fn(comm: Comm) -> None:
        made, rows = net(), Rows(ONE, 0)
        rows.n_rows_of_all += 1
        train(comm, made, squared(made), rows, OPTIONS)

    with pytest.raises(FeedError, match="epoch 1 counted 7 rows over all ranks, planned were 8"):
        LocalLauncher(1).run(fn)


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "checkpoints")
        return
    yield "memory://scratch/checkpoints"
    fsspec.filesystem("memory").rm("/scratch", recursive=True)


def noisy(broken_at: int = 10**6, error: Exception | None = None) -> Any:
    """A training with random losses, that are NaN (or raise `error`) from a step on."""

    def fn(comm: Comm, shares: list[list[list[int]]], options: LoopOptions) -> Trained:
        made, calls = net(), iter(range(10**6))
        inner = squared(made)

        def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
            out = inner(batch, generator, done) * (0.5 + torch.rand(1, generator=generator))
            if next(calls) >= broken_at:
                if error:
                    raise error
                return out * float("nan")
            return out

        return train(comm, made, loss, Rows(shares, comm.rank), options)

    return fn


def saving(folder: str, **changes: Any) -> LoopOptions:
    return LoopOptions(
        **{
            "epochs": 5,
            "learning_rate": 0.1,
            "checkpoints": folder,
            "checkpoint_every_s": 0,
            "identity": {"version": 3},
            **changes,
        }
    )


def test_a_resumed_training_equals_an_uninterrupted_one(folder: str) -> None:
    plain = LoopOptions(epochs=5, learning_rate=0.1)
    whole = LocalLauncher(2).run(noisy(), TWO, plain)[0].value
    with pytest.raises(Exception, match="pulled the plug"):
        LocalLauncher(2).run(noisy(7, RuntimeError("pulled the plug")), TWO, saving(folder))
    told: list[str] = []
    again = LocalLauncher(2, tell=told.append).run(noisy(), TWO, saving(folder))[0].value
    assert "resuming after epoch 3 of 5" in told
    assert [e.epoch for e in again.epochs] == [4, 5]
    assert again.vector is None  # weights travel through the store
    made = net()
    load_weights(made, again)
    assert nn.utils.parameters_to_vector(made.parameters()).tolist() == whole.vector.tolist()


def test_a_finished_training_is_not_repeated(folder: str) -> None:
    first = trained(ONE, saving(folder))[0]
    second = trained(ONE, saving(folder))[0]
    assert (second.epochs, second.place) == ((), first.place)


def test_only_whole_checkpoints_of_the_same_training_count(folder: str) -> None:
    trained(ONE, saving(folder))
    other = saving(folder, identity={"version": 4})
    assert len(trained(ONE, other)[0].epochs) == 5
    # A torn one: its marker is missing.
    storage.remove(storage.join(checkpoint.newest(folder), storage.COMPLETE))
    assert [e.epoch for e in trained(ONE, other)[0].epochs] == [5]
    kept = {f.rsplit("/", 2)[1] for f in storage.list_files(folder)}
    assert kept == {"epoch-000004", "epoch-000005"}


def test_a_loss_that_is_not_finite_stops_with_the_step(folder: str) -> None:
    with pytest.raises(DivergedError, match=r"step 6 of 10 \(epoch 3\)") as caught:
        LocalLauncher(2).run(noisy(5), TWO, saving(folder))
    assert f"last good checkpoint: {storage.join(folder, 'epoch-000002')}" in str(caught.value)

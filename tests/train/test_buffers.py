"""What a network keeps beside its parameters, and what it draws from torch's own random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recspark.config import Train
from recspark.models.neural import net_arrays
from recspark.train import checkpoint
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.launch import HorovodLauncher, LocalLauncher
from recspark.train.loop import LoopOptions, Trained, Validation, load_weights, train_network
from tests.train.test_loop import ONE, TWO, Rows

pytestmark = pytest.mark.torch
OPTIONS = LoopOptions(epochs=3, learning_rate=0.1)
MEAN, VARIANCE, COUNT = "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"


class Normed(nn.Module):
    """BatchNorm and dropout, a constant that is no state, and a buffer of truth values."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.norm = nn.BatchNorm1d(1).double()
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(6, 1).double()
        nn.init.normal_(self.out.weight, generator=generator)
        nn.init.zeros_(self.out.bias)
        self.register_buffer("known", torch.tensor([True, False]))
        self.register_buffer("power", torch.arange(1.0, 7), persistent=False)
        self.power: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.dropout(self.norm(x) ** self.power))  # (B, 1)


def normed_fit(
    comm: Comm, shares: Any, options: LoopOptions, dropout: float = 0.0, rows: Any = Rows
) -> tuple[Trained, dict[str, Any]]:
    """Return what the loop does, and the rank's own state of the network."""
    net = Normed(dropout)
    if comm.rank:  # a rank begins as rank 0 does
        net.norm.running_mean += 5
        net.norm.num_batches_tracked += 5

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        return ((net(batch.tensors["x"]) - batch.tensors["y"]) ** 2)[:, 0]

    trained = train_network(comm, net, loss, rows(shares, comm.rank), options)
    return trained, {name: tensor.tolist() for name, tensor in net.state_dict().items()}


def test_buffers_come_back_with_the_weights() -> None:
    trained, state = LocalLauncher(1).run(normed_fit, ONE, OPTIONS)[0].value
    assert state[COUNT] == 2 * 3
    assert state[MEAN] != [0]
    net = Normed()
    load_weights(net, trained)
    assert {name: tensor.tolist() for name, tensor in net.state_dict().items()} == state
    arrays = net_arrays(net)
    assert arrays.keys() == state.keys()  # `power` is a constant
    assert all(arrays[name].tolist() == tensor for name, tensor in state.items())


def test_ranks_agree_on_the_mean_of_their_buffers() -> None:
    """By hand: a tenth of each step's moments, weighted by the rows of each rank."""
    shares = [[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9], []]]  # the rest of a rank's batch is row 0
    answers = LocalLauncher(2).run(normed_fit, shares, replace(OPTIONS, epochs=1))
    states = [answer.value[1] for answer in answers]
    assert states[0] == states[1]
    x = np.array([[[0, 1, 2, 3], [4, 5, 6, 7]], [[8, 9, 0, 0], [0, 0, 0, 0]]]) / 10
    mean, variance = 0.0, 1.0
    for step, (first, second) in enumerate([(4 / 6, 2 / 6), (1, 0)]):
        moments = [(b.mean(), b.var(ddof=1)) for b in (x[0, step], x[1, step])]
        mean = 0.9 * mean + 0.1 * (first * moments[0][0] + second * moments[1][0])
        variance = 0.9 * variance + 0.1 * (first * moments[0][1] + second * moments[1][1])
    assert states[0][MEAN] == pytest.approx([mean], rel=1e-12)
    assert states[0][VARIANCE] == pytest.approx([variance], rel=1e-12)
    assert states[0][COUNT] == 2
    assert states[0]["known"] == [True, False]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Any, step: int, dropout: float
) -> None:
    """To the bit, with the running means and with the numbers that dropout draws."""

    class Interrupted(Rows):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
            for n, batch in enumerate(super().epoch(epoch, start), start):
                if epoch * self.steps + n == step and self.shares is TWO[0]:
                    raise RuntimeError("pulled the plug")
                yield batch

    def saving(folder: str) -> LoopOptions:
        return replace(OPTIONS, checkpoints=str(tmp_path / folder), checkpoint_every_s=0)

    def run(options: LoopOptions, *more: Any) -> Trained:
        return LocalLauncher(2).run(normed_fit, TWO, options, dropout, *more)[0].value[0]

    whole = run(saving("whole"))
    with pytest.raises(Exception, match="pulled the plug"):
        run(saving("resumed"), Interrupted)
    resumed = run(saving("resumed"))
    expected, state = checkpoint.load(whole.checkpoint_uri), checkpoint.load(resumed.checkpoint_uri)
    assert {MEAN, VARIANCE, COUNT, "known"} < state.keys() == expected.keys()
    assert all(state[name].equal(tensor) for name, tensor in expected.items())
    assert expected["vector"].tolist() == run(OPTIONS).weights["vector"].tolist()


def test_the_best_epochs_buffers_come_back() -> None:
    def fit(comm: Comm) -> tuple[Trained, list[float]]:
        net, means = Normed(dropout=0.5).eval(), []
        values = iter([3.0, 1.0, 2.0])

        class Held(Rows):
            def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
                means.append(net.norm.running_mean.item())
                self.value = next(values)
                return super().epoch(epoch, start)

        held = Held([[[7, 8]]], 0)

        def value(batch: Batch) -> torch.Tensor:
            first, second = net(batch.tensors["x"]), net(batch.tensors["x"])
            assert first.equal(second)  # no dropout, and no batch of its own to normalise by
            return torch.full((4,), held.value)

        def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
            assert net.training
            return net(batch.tensors["x"])[:, 0] ** 2

        return train_network(comm, net, loss, Rows(ONE, 0), OPTIONS, Validation(held, value)), means

    trained, means = LocalLauncher(1).run(fit)[0].value
    assert trained.curve.best == 2
    assert len(set(means)) == 3
    assert trained.weights[MEAN].tolist() == [means[1]]
    assert trained.weights[COUNT].tolist() == 4


# ----------------------------------------------------------------------------------- random numbers


def drawn(ranks: int, shares: Any) -> list[list[Any]]:
    """Return what each rank draws from torch and from the loop's generator, batch by batch."""

    def fit(comm: Comm) -> list[Any]:
        net, numbers = Normed(), []

        def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
            numbers.extend([torch.rand(8).tolist(), torch.rand(8).tolist()])
            numbers.append(torch.rand(8, generator=generator).tolist())
            return net(batch.tensors["x"])[:, 0] ** 2

        train_network(comm, net, loss, Rows(shares, comm.rank), OPTIONS)
        return numbers

    return [answer.value for answer in LocalLauncher(ranks).run(fit)]


def test_every_batch_of_every_rank_draws_its_own_numbers() -> None:
    first, again = drawn(2, TWO), drawn(2, TWO)
    assert first == again  # though both ranks share torch's generator
    every = [tuple(numbers) for of_rank in first for numbers in of_rank]
    assert len(set(every)) == len(every) == 2 * 3 * 2 * 3


def test_torchs_random_numbers_go_on_as_if_there_had_been_no_training() -> None:
    nets = [Normed(dropout=0.5), Normed(dropout=0.5)]

    def fit(comm: Comm) -> None:
        def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
            return nets[comm.rank](batch.tensors["x"])[:, 0] ** 2

        train_network(comm, nets[comm.rank], loss, Rows(TWO, comm.rank), OPTIONS)

    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    LocalLauncher(2).run(fit)
    assert torch.rand(4).equal(expected)


# ------------------------------------------------------------------------------ processes of Horovod


def everything(comm: Any) -> tuple[Any, Any]:
    """Train a network with all that a rank exchanges; by value: a rank does not have this module."""
    import numpy
    import torch
    from torch import nn

    from recspark.train.feed import Batch
    from recspark.train.loop import LoopOptions
    from recspark.train.optimisers import Adagrad, Ftrl

    class Wide(nn.Module):
        sparse_parameters = frozenset({"wide"})

        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Parameter(torch.zeros(20, 1))
            self.frozen = nn.Parameter(torch.full((2,), 1.0 + comm.rank), requires_grad=False)
            self.deep = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
            self.register_buffer("known", torch.tensor([comm.rank == 0]))
            for parameter in self.deep.parameters():
                nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            wide = nn.functional.embedding(rows, self.wide, sparse=True)[:, 0]
            return wide + self.deep(rows[:, None] / 10)[:, 0] * self.frozen.sum()

    class Shares:
        steps, n_rows_of_all = 3, 24

        def epoch(self, epoch: int, start: int = 0) -> Any:
            for step in range(start, 3):
                rows = torch.arange(4) * 2 + comm.rank + 4 * step
                yield Batch({"rows": rows}, torch.ones(4))

    net = Wide()

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        return (net(batch.tensors["rows"]) - 1) ** 2

    options = LoopOptions(
        epochs=2,
        learning_rate=0.1,
        optimisers={"wide": Ftrl(0.5, l1=0.1), "deep.2": Adagrad(0.1)},
        clip_norm=1.0,
    )
    trained = train_network(comm, net, loss, Shares(), options)
    own = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    return trained.weights, {name: numpy.array(array) for name, array in own.items()}


@pytest.mark.horovod
@pytest.mark.spark
def test_processes_agree_to_the_bit_and_train_as_threads_do(spark: Any) -> None:
    settings = Train(ranks=2, threads=1, start_timeout_s=60, timeout_s=200)  # type: ignore[call-arg]
    answers = [answer.value for answer in HorovodLauncher(spark, settings).run(everything)]
    (weights, first), (_, second) = answers
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], strict=True)
    assert first["frozen"].tolist() == [1, 1]
    assert first["known"].tolist() == [True]
    assert first["deep.1.num_batches_tracked"] == 6
    for name, array in LocalLauncher(2).run(everything)[0].value[0].items():
        np.testing.assert_allclose(weights[name], array, rtol=1e-5)

"""What a step does to parameters: each optimiser by its paper, alone, together, and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from recspark import storage
from recspark.errors import ModelError
from recspark.train import checkpoint
from recspark.train.comm import Comm
from recspark.train.feed import Batch
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, Trained, load_weights, train_network
from recspark.train.optimisers import Adagrad, Adam, Ftrl, Optimiser, Schedule, Sgd
from tests.train.test_loop import STEPS, Rows, Table, table_fit

pytestmark = pytest.mark.torch
OPTIMISERS = {
    "adam": Adam(0.1, weight_decay=0.01),
    "adam, warm": Adam(0.1, schedule=Schedule("constant", warmup=0.5)),
    "adagrad": Adagrad(0.1, weight_decay=0.01),
    "sgd": Sgd(0.05, weight_decay=0.01, schedule=Schedule(warmup=0.2)),
    "sgd, momentum": Sgd(0.05, momentum=0.9),
    "ftrl": Ftrl(0.5, l1=0.1, l2=0.01),
}
TOGETHER = [[a + b for a, b in zip(*STEPS)]]  # the rows of both ranks on one
each_optimiser = pytest.mark.parametrize("optimiser", OPTIMISERS.values(), ids=OPTIMISERS)


def by(optimiser: Optimiser, **changes: Any) -> LoopOptions:
    """Return options under which `optimiser` moves all; the rate of Adam is one that shows."""
    options = LoopOptions(epochs=3, learning_rate=1e9, optimisers={"": optimiser})
    return replace(options, **changes)


# ----------------------------------------------------------------------------- ranks and resuming


@each_optimiser
def test_ranks_do_not_change_the_steps(optimiser: Optimiser) -> None:
    one = LocalLauncher(1).run(table_fit, TOGETHER, by(optimiser))[0].value
    two = LocalLauncher(2).run(table_fit, STEPS, by(optimiser))[0].value
    for name, weights in one.weights.items():
        np.testing.assert_allclose(two.weights[name], weights, rtol=1e-12)
    assert (one.weights["vector"] != 1).all()
    assert one.weights["table"][4].tolist() == [0.8, 0.9]  # read by no row


@each_optimiser
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_resumed_training_equals_an_uninterrupted_one(
    optimiser: Optimiser, step: int, tmp_path: Any
) -> None:
    """To the bit, the optimiser's memory included; pulled out within and at the end of an epoch."""

    def interrupted(comm: Comm, options: LoopOptions) -> None:
        class Interrupted(Rows):
            def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
                for n, batch in enumerate(super().epoch(epoch, start), start):
                    if epoch * self.steps + n == step and comm.rank == 0:
                        raise RuntimeError("pulled the plug")
                    yield batch

        net = Table()
        train_network(comm, net, table_loss(net), Interrupted(STEPS, comm.rank, width=8), options)

    def saving(folder: str) -> LoopOptions:
        return by(optimiser, checkpoints=str(tmp_path / folder), checkpoint_every_s=0)

    whole = LocalLauncher(2).run(table_fit, STEPS, saving("whole"))[0].value
    with pytest.raises(Exception, match="pulled the plug"):
        LocalLauncher(2).run(interrupted, saving("resumed"))
    lines: list[str] = []
    resumed = LocalLauncher(2, tell=lines.append).run(table_fit, STEPS, saving("resumed"))[0].value
    assert any(line.startswith("resuming after") for line in lines)
    expected, state = checkpoint.load(whole.checkpoint_uri), checkpoint.load(resumed.checkpoint_uri)
    assert state.keys() == expected.keys()
    assert all(state[name].equal(tensor) for name, tensor in expected.items())


def table_loss(net: Table) -> Any:
    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        rows = (batch.tensors["x"][:, 0] * 10).round().long()
        return ((net(rows) - 1) ** 2).sum(dim=1)

    return loss


@pytest.mark.parametrize(
    "optimiser", [Adagrad(0.1), Sgd(0.05), Ftrl(0.5, l1=0.1)], ids=["adagrad", "sgd", "ftrl"]
)
def test_a_sparse_step_is_the_dense_one(optimiser: Optimiser) -> None:
    """Where a gradient of 0 moves nothing, a table may as well be dense."""

    class Dense(Table):
        sparse_parameters = frozenset()

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.table[rows] * self.factor

    def fit(comm: Comm, net: Table) -> list[list[float]]:
        train_network(comm, net, table_loss(net), Rows(TOGETHER, 0, width=8), by(optimiser))
        return net.table.tolist()

    sparse, dense = (LocalLauncher(1).run(fit, net)[0].value for net in (Table(), Dense()))
    np.testing.assert_allclose(sparse, dense, rtol=1e-12)


# ------------------------------------------------------------------------------------ each by hand


def moved(optimiser: Optimiser, gradients: list[Any], start: Any, rows: bool = False) -> Any:
    """Return the weights after the gradients of as many steps."""
    weights = torch.tensor(start, dtype=torch.float64)
    slots = optimiser.start(weights)
    move = optimiser.move_rows if rows else optimiser.move
    for step, gradient in enumerate(gradients):
        move(step, len(gradients), weights, torch.tensor(gradient, dtype=torch.float64), slots)
    return weights.numpy()


GRADIENTS = [[1.0, -2.0, 0.5], [0.5, 0.0, -0.25], [-3.0, 1.0, 0.125]]
START = [0.3, -0.2, 0.0]


@pytest.mark.parametrize("rows", [False, True])
def test_adagrad_by_its_paper(rows: bool) -> None:
    weights, squares = np.array(START), np.zeros(3)
    for gradient in np.array(GRADIENTS):
        gradient = gradient + 0.5 * weights
        squares += gradient**2
        weights = weights - 0.1 * gradient / (np.sqrt(squares) + 1e-10)
    result = moved(Adagrad(0.1, weight_decay=0.5), GRADIENTS, START, rows)
    np.testing.assert_allclose(result, weights, rtol=1e-12)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_by_hand(momentum: float, rows: bool) -> None:
    weights, velocity = np.array(START), np.zeros(3)
    for step, gradient in enumerate(np.array(GRADIENTS)):
        velocity = momentum * velocity + gradient + 0.5 * weights
        weights = weights - 0.1 * (1 - step / 3) * velocity
    result = moved(Sgd(0.1, momentum, weight_decay=0.5), GRADIENTS, START, rows)
    np.testing.assert_allclose(result, weights, rtol=1e-12)


@pytest.mark.parametrize("rows", [False, True])
def test_adams_bits_are_those_of_all_trainings_so_far(rows: bool) -> None:
    """The same operations in the same order as before there was any other optimiser."""
    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(301, generator=generator) for _ in range(4)]
    start = torch.randn(301, generator=generator)
    weights, mean, square = start.clone(), torch.zeros(301), torch.zeros(301)
    for step, gradient in enumerate(gradients):
        rate, number = 0.1 * (1 - step / 4), step + 1
        correction = (1 - 0.999**number) ** 0.5
        rate *= correction / (1 - 0.9**number)
        epsilon = 1e-8 * correction
        if rows:
            values = gradient + 0.01 * weights
            mean = torch.lerp(mean, values, 1 - 0.9)
            square = 0.999 * square + (1 - 0.999) * values**2
            weights -= rate * mean / (square.sqrt() + epsilon)
        else:
            values = gradient.clone().add_(weights, alpha=0.01)
            mean.lerp_(values, 1 - 0.9)
            square.mul_(0.999).addcmul_(values, values, value=1 - 0.999)
            weights.addcdiv_(mean, square.sqrt().add_(epsilon), value=-rate)
    adam, result = Adam(0.1, weight_decay=0.01), start.clone()
    slots = adam.start(result)
    for step, gradient in enumerate(gradients):
        (adam.move_rows if rows else adam.move)(step, 4, result, gradient.clone(), slots)
    assert result.equal(weights)
    assert slots["mean"].equal(mean)
    assert slots["square"].equal(square)


# -------------------------------------------------------------------------------------------- FTRL


def ftrl_by_its_paper(
    features: Any, clicks: Any, alpha: float, beta: float, l1: float, l2: float
) -> Any:
    """Return the weights of algorithm 1, logistic loss, coordinate by coordinate; and z and n."""
    n_features = features.shape[1]
    z, n, w = [0.0] * n_features, [0.0] * n_features, [0.0] * n_features
    for x, y in zip(features, clicks):
        read = [i for i in range(n_features) if x[i] != 0]
        for i in read:
            if abs(z[i]) <= l1:
                w[i] = 0.0
            else:
                sign = 1 if z[i] > 0 else -1
                w[i] = -1 / ((beta + n[i] ** 0.5) / alpha + l2) * (z[i] - sign * l1)
        p = 1 / (1 + np.exp(-sum(x[i] * w[i] for i in read)))
        for i in read:
            g = (p - y) * x[i]
            sigma = ((n[i] + g**2) ** 0.5 - n[i] ** 0.5) / alpha
            z[i] += g - sigma * w[i]
            n[i] += g**2
    return z, n


@pytest.fixture(scope="module")
def clicks() -> tuple[Any, Any]:
    """200 rows of 12 features of 0 or more, of which three count."""
    rng = np.random.default_rng(3)
    features = rng.random((200, 12)) * (rng.random((200, 12)) < 0.3)
    scores = features[:, :3] @ [4.0, -4.0, 3.0]
    return features, (rng.random(200) < 1 / (1 + np.exp(-scores))).astype(float)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("l1", [0.0, 1.0])
def test_ftrl_by_its_paper(clicks: tuple[Any, Any], l1: float, sparse: bool) -> None:
    features, clicked = clicks
    ftrl = Ftrl(alpha=0.5, beta=1.0, l1=l1, l2=0.1)

    class Wide(nn.Module):
        sparse_parameters = frozenset({"weight"} if sparse else ())

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.float64))

        def forward(self, row: torch.Tensor) -> torch.Tensor:
            read = torch.nonzero(row)[:, 0]
            vectors = nn.functional.embedding(read, self.weight, sparse=sparse)
            return row[read] @ vectors[:, 0]

    class OneByOne(Rows):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
            for x, y in zip(torch.from_numpy(features), torch.from_numpy(clicked)):
                yield Batch({"x": x[None], "y": y[None]}, torch.ones(1))

    def fit(comm: Comm) -> Any:
        net, rows = Wide(), OneByOne([[[n] for n in range(200)]], 0)

        def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
            score = net(batch.tensors["x"][0])
            return nn.functional.binary_cross_entropy_with_logits(
                score[None], batch.tensors["y"], reduction="none"
            )

        train_network(comm, net, loss, rows, by(ftrl, epochs=1))
        return net.weight.detach().numpy()[:, 0]

    weights = LocalLauncher(1).run(fit)[0].value
    z, n = ftrl_by_its_paper(features, clicked, 0.5, 1.0, l1, 0.1)
    z, n = np.array(z), np.array(n)
    expected = np.where(np.abs(z) <= l1, 0, -(z - np.sign(z) * l1) / ((1 + np.sqrt(n)) / 0.5 + 0.1))
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    n_zeros = int((weights == 0).sum())  # 0 to the bit
    assert n_zeros == (0 if l1 == 0 else int((np.abs(z) <= l1).sum()))
    assert l1 == 0 or 3 <= n_zeros < 12
    assert (weights[:3] != 0).all()


def test_ftrl_begins_where_the_weights_are() -> None:
    start = [0.7, -0.2, 0.0]
    ftrl = Ftrl(0.5, l1=0.3, l2=0.1)
    np.testing.assert_allclose(moved(ftrl, [[0.0] * 3] * 2, start), start, rtol=1e-12)
    assert moved(ftrl, [[1.0, -1.0, 1.0]], start) == pytest.approx(
        moved(ftrl, [[1.0, -1.0, 1.0]], start, rows=True)
    )


# ---------------------------------------------------------------------------- several, one network


class Deep(nn.Module):
    """Two wide parts among deep ones; the loss of each part does not depend on the others."""

    def __init__(self, *trained: str) -> None:
        super().__init__()
        for name, value in (("first", 1.0), ("wide", 0.0), ("last", -1.0)):
            part = nn.Linear(2, 2).double()
            nn.init.constant_(part.weight, value)
            nn.init.constant_(part.bias, 2 * value)
            self.add_module(name, part.requires_grad_(not trained or name in trained))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts: list[Any] = [self.first, self.wide, self.last]
        return sum(((part(torch.cat([x, x**2], 1)) - 1) ** 2).sum(1) for part in parts)


def deep_fit(comm: Comm, options: LoopOptions, *trained: str) -> tuple[Trained, dict[str, Any]]:
    net = Deep(*trained)

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        return net(batch.tensors["x"])

    answer = train_network(comm, net, loss, Rows(TOGETHER, 0, width=8), options)
    return answer, {name: p.tolist() for name, p in net.named_parameters()}


PARTS: dict[str, Optimiser] = {
    "": Adam(0.1, weight_decay=0.01),
    "wide": Ftrl(0.5, l1=0.01),
    "last": Adagrad(0.1),
    "last.bias": Sgd(0.1, momentum=0.5),
}


def test_each_part_is_moved_by_its_own_optimiser(tmp_path: Any) -> None:
    options = by(PARTS[""], optimisers=PARTS)
    trained, together = LocalLauncher(1).run(deep_fit, options)[0].value
    for part in ("first", "wide", "last"):
        own = {"": PARTS.get(part, PARTS[""])}
        if part == "last":
            own["last.bias"] = PARTS["last.bias"]
        alone = by(PARTS[""], optimisers=own)
        _, weights = LocalLauncher(1).run(deep_fit, alone, part)[0].value
        for name in (f"{part}.weight", f"{part}.bias"):
            np.testing.assert_allclose(together[name], weights[name], rtol=1e-12)
            assert together[name] != Deep().state_dict()[name].tolist()
    # Through a checkpoint that is torn: the slots of all parts.
    saves = replace(options, checkpoints=str(tmp_path), checkpoint_every_s=0)
    LocalLauncher(1).run(deep_fit, saves)
    storage.remove(storage.join(checkpoint.newest(str(tmp_path)), storage.COMPLETE))
    again, weights = LocalLauncher(1).run(deep_fit, saves)[0].value
    assert weights == together
    net = Deep()
    load_weights(net, again)
    assert {name: p.tolist() for name, p in net.named_parameters()} == together
    load_weights(net, trained)
    assert {name: p.tolist() for name, p in net.named_parameters()} == together


def test_an_optimiser_for_nothing_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"'wid' is no trainable .* which has first\.weight, "):
        LocalLauncher(1).run(deep_fit, by(PARTS[""], optimisers={"wid": Sgd(0.1)}))


def test_a_name_that_means_two_things_is_an_error() -> None:
    def fit(comm: Comm) -> None:
        net = nn.Module()
        net.weight = nn.Parameter(torch.ones(2))
        net.vector = nn.Parameter(torch.ones(2), requires_grad=False)
        train_network(comm, net, lambda *_: net.weight, Rows(TOGETHER, 0), by(Sgd(0.1)))

    with pytest.raises(ModelError, match="vector: the network may not use this name"):
        LocalLauncher(1).run(fit)


# ------------------------------------------------------------------------ rates, clipping, freezing


def slope_fit(comm: Comm, options: LoopOptions, slope: float = 1.0) -> list[list[float]]:
    """Return the weights before each step of a loss whose gradient is `slope` times (3, 4)."""
    net = nn.Module()
    net.first = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    net.table = nn.Parameter(torch.zeros(2, 1, dtype=torch.float64))
    net.sparse_parameters = frozenset({"table"})  # type: ignore[assignment]
    weights: list[list[float]] = []

    def note() -> None:
        weights.append([net.first.item(), net.table[1].item()])

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        note()
        second = nn.functional.embedding(torch.tensor([1]), net.table, sparse=True)
        one = slope * (3 * net.first + 4 * second[0])
        return one.expand(len(batch.weight))

    rows = Rows([[[0, 1], [2], [3, 4]], [[5], [], [6]]][: comm.size], comm.rank)
    train_network(comm, net, loss, rows, options)
    note()
    assert net.table[0].item() == 0
    return weights


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Schedule(), [6, 5, 4, 3, 2, 1]),
        (Schedule("constant"), [6, 6, 6, 6, 6, 6]),
        (Schedule("constant", warmup=0.5), [2, 4, 6, 6, 6, 6]),
        (Schedule(warmup=0.5), [2, 4, 6, 6, 4, 2]),
    ],
)
def test_rates_rise_stay_and_fall(schedule: Schedule, rates: list[float]) -> None:
    options = by(Sgd(0.6, schedule=schedule), epochs=2)
    weights = np.array(LocalLauncher(1).run(slope_fit, options)[0].value)
    np.testing.assert_allclose(np.diff(weights, axis=0), -np.outer(rates, [0.3, 0.4]))


def test_a_warmup_that_is_no_share_is_an_error() -> None:
    with pytest.raises(ValueError, match="a share of the steps"):
        Schedule(warmup=100)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("slope", "length"), [(1.0, 2.0), (0.2, 1.0), (1e6, 2.0)])
def test_a_long_gradient_is_cut_to_length(ranks: int, slope: float, length: float) -> None:
    """Dense and sparse parameters together, after the ranks' parts were summed."""
    options = by(Sgd(1.0, schedule=Schedule("constant")), clip_norm=2.0)
    weights = np.array(LocalLauncher(ranks).run(slope_fit, options, slope)[0].value)
    np.testing.assert_allclose(np.diff(weights, axis=0), [[-0.6 * length, -0.8 * length]] * 9)


@each_optimiser
@pytest.mark.parametrize("sparse", [False, True])
def test_a_frozen_parameter_does_not_move(
    optimiser: Optimiser, sparse: bool, tmp_path: Any
) -> None:
    """Weight decay neither. It is rank 0's, in the checkpoint, and handed back."""

    class Frozen(Table):
        sparse_parameters = frozenset({"table"} if sparse else ())

        def __init__(self, shift: float = 0.0) -> None:
            super().__init__()
            self.table.requires_grad_(False).add_(shift)

    def fit(comm: Comm, options: LoopOptions) -> tuple[Trained, list[list[float]]]:
        net = Frozen(shift=comm.rank)
        answer = train_network(comm, net, table_loss(net), Rows(STEPS, comm.rank, width=8), options)
        return answer, net.table.tolist()

    options = by(optimiser)
    for changes in ({}, {"checkpoints": str(tmp_path), "checkpoint_every_s": 0}):
        answers = LocalLauncher(2).run(fit, replace(options, **changes))
        trained = answers[0].value[0]
        net = Frozen(shift=7)
        load_weights(net, trained)
        for table in (net.table.tolist(), *(answer.value[1] for answer in answers)):
            assert table == Table().table.tolist()
        assert (net.factor != 1).all()
    stored = checkpoint.load(trained.checkpoint_uri)
    assert {n for n in stored if n.startswith("table")} == {"table"}  # a frozen one has no slots
    assert len(stored["vector"]) == len(net.factor)


def test_a_network_may_be_frozen_but_for_a_table() -> None:
    def fit(comm: Comm) -> Callable[..., Any]:
        net = Table()
        net.factor.requires_grad_(False)
        train_network(comm, net, table_loss(net), Rows(TOGETHER, 0, width=8), by(Adam(0.1)))
        return net.factor.tolist(), net.table[0].tolist()

    factor, row = LocalLauncher(1).run(fit)[0].value
    assert factor == [1, 1]
    assert row != Table().table[0].tolist()

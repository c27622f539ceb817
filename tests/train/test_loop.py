"""The loop: what a step is, however many ranks share it; resuming; refusing to go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from torch import nn

from recspark import storage
from recspark.errors import ArtifactError, DeviceError, DivergedError, FeedError
from recspark.train import checkpoint
from recspark.train.checkpoint import Position
from recspark.train.comm import Comm
from recspark.train.curve import Epoch
from recspark.train.feed import Batch
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, Trained, Validation, load_weights, train_network
from tests.damage import damages, put

pytestmark = pytest.mark.torch
OPTIONS = LoopOptions(epochs=5, learning_rate=0.1, weight_decay=0.01)


class Rows:
    """Rows 0..n-1 with x and y = 2 x + 1, a rank's share of each step given by hand."""

    def __init__(self, shares: list[list[list[int]]], rank: int, width: int = 4) -> None:
        self.shares = shares[rank]
        self.steps = len(self.shares)
        self.n_rows_of_all = sum(len(step) for ranks in shares for step in ranks)
        self.width = width

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for step in self.shares[start:]:
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
    return train_network(comm, made, squared(made), Rows(shares, comm.rank), options)


def trained(shares: list[list[list[int]]], options: LoopOptions = OPTIONS, **more: Any) -> Any:
    return [r.value for r in LocalLauncher(len(shares), **more).run(fit, shares, options)]


ONE = [[[0, 1, 2, 3], [4, 5, 6]]]
TWO = [[[0, 1, 2], [4, 5, 6]], [[3], []]]  # the same rows in the same steps, unequally shared
THREE = [[[1], [4]], [[0, 3], [5, 6]], [[2], []]]


def test_a_step_is_adams_on_the_mean_gradient_by_hand() -> None:
    """One step of Adam moves each parameter by the learning rate, against its gradient's sign."""
    options = LoopOptions(epochs=1, learning_rate=0.1)
    (found,) = trained([[[0, 1, 2, 3]]], options)
    np.testing.assert_allclose(found.weights["vector"], [0.3 + 0.1, -0.2 + 0.1], atol=1e-6)
    x = np.arange(4) / 10
    assert found.curve.epochs[0].loss == pytest.approx(((0.3 * x - 0.2 - (2 * x + 1)) ** 2).mean())
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
    np.testing.assert_allclose(found.weights["vector"], at, rtol=1e-12)


@pytest.mark.parametrize("shares", [TWO, THREE], ids=["two", "three"])
def test_ranks_do_not_change_the_steps(shares: list[list[list[int]]]) -> None:
    (one,) = trained(ONE)
    several = trained(shares)
    np.testing.assert_allclose(several[0].weights["vector"], one.weights["vector"], rtol=1e-12)
    assert [e.loss for e in several[0].curve.epochs] == pytest.approx(
        [e.loss for e in one.curve.epochs]
    )
    assert all(other.weights is None for other in several[1:])


def test_ranks_start_from_rank_0() -> None:
    def fn(comm: Comm) -> Trained:
        made = net()
        with torch.no_grad():
            made.bias += comm.rank
        return train_network(comm, made, squared(made), Rows(TWO, comm.rank), OPTIONS)

    found = LocalLauncher(2).run(fn)[0].value
    np.testing.assert_allclose(
        found.weights["vector"], trained(ONE)[0].weights["vector"], rtol=1e-12
    )


def test_progress_is_told_once_an_epoch() -> None:
    told: list[str] = []
    trained(TWO, tell=told.append)
    lines = [line for line in told if line.startswith("epoch")]
    assert len(lines) == 5
    assert re.fullmatch(r"epoch 1 of 5: loss \d\.\d{4}, [\d,]+ rows/s, \d+ s left", lines[0])
    assert lines[-1].endswith("rows/s, done")


def test_rows_that_do_not_add_up_are_an_error() -> None:
    def fn(comm: Comm) -> None:
        made, rows = net(), Rows(ONE, 0)
        rows.n_rows_of_all += 1
        train_network(comm, made, squared(made), rows, OPTIONS)

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
                if error and comm.rank == 0:  # rank 0 saves: it has done so before it fails
                    raise error
                if error:
                    return out
                return out * float("nan")
            return out

        return train_network(comm, made, loss, Rows(shares, comm.rank), options)

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


@pytest.mark.parametrize(
    ("plug", "where"),
    [(7, "epoch 3 of 5, batch 1"), (6, "epoch 3 of 5"), (1, "epoch 0 of 5, batch 1")],
)
def test_a_resumed_training_equals_an_uninterrupted_one(folder: str, plug: int, where: str) -> None:
    """Pulled out in the first or the second of an epoch's two steps."""
    plain = LoopOptions(epochs=5, learning_rate=0.1)
    whole = LocalLauncher(2).run(noisy(), TWO, plain)[0].value
    with pytest.raises(Exception, match="pulled the plug"):
        LocalLauncher(2).run(noisy(plug, RuntimeError("pulled the plug")), TWO, saving(folder))
    told: list[str] = []
    again = LocalLauncher(2, tell=told.append).run(noisy(), TWO, saving(folder))[0].value
    assert f"resuming after {where}" in told
    assert [e.epoch for e in again.curve.epochs] == [1, 2, 3, 4, 5]
    assert [e.loss for e in again.curve.epochs] == [e.loss for e in whole.curve.epochs]
    assert again.weights is None  # weights travel through the store
    made = net()
    load_weights(made, again)
    assert (
        nn.utils.parameters_to_vector(made.parameters()).tolist()
        == whole.weights["vector"].tolist()
    )


def test_a_finished_training_is_not_repeated(folder: str) -> None:
    first = trained(ONE, saving(folder))[0]
    told: list[str] = []
    assert trained(ONE, saving(folder), tell=told.append)[0] == first
    assert "resuming after epoch 5 of 5" in told
    assert not any("rows/s" in line for line in told)


def test_only_whole_checkpoints_of_the_same_training_count(folder: str) -> None:
    trained(ONE, saving(folder))
    other = saving(folder, identity={"version": 4})
    told: list[str] = []
    trained(ONE, other, tell=told.append)
    assert sum("rows/s" in line for line in told) == 5
    # A torn one: its marker is missing.
    storage.remove(storage.join(checkpoint.newest(folder), storage.COMPLETE))
    told.clear()
    trained(ONE, other, tell=told.append)
    assert [line.split(":")[0] for line in told if "rows/s" in line] == ["epoch 5 of 5"]
    kept = {f.rsplit("/", 2)[1] for f in storage.list_files(folder)}
    assert kept == {"epoch-000004-batch-000000001", "epoch-000005-batch-000000000"}


def test_every_damage_of_a_checkpoint_is_told_and_the_one_before_it_taken(tmp_path: Path) -> None:
    """Each file of the newest, damaged in each way."""
    folder = str(tmp_path)
    tensors = {
        "vector": torch.arange(6, dtype=torch.float64),
        "table": torch.ones(3, 2, requires_grad=False),
    }
    older, newer = Position(epoch=1, batch=1, loss=0.1), Position(epoch=2, loss=1 / 3)
    before = checkpoint.save(folder, older, {n: t / 3 for n, t in tensors.items()}, {"a": 1})
    place = checkpoint.save(folder, newer, tensors, {"a": 1})
    files = [path for path in sorted(Path(place).rglob("*")) if path.is_file()]
    n_told = 0
    for file in files:
        whole = file.read_bytes()
        for how, content in damages(file, [other for other in files if other != file]):
            put(file, content)
            told: list[str] = []
            found = checkpoint.latest(folder, {"a": 1}, tensors, told.append)
            if found == (older, before):
                assert any(place in line for line in told), (file.name, how)
                with pytest.raises(ArtifactError):
                    checkpoint.load(place)
                n_told += 1
            else:
                assert (found, file.name) == ((newer, place), storage.COMPLETE), how
                for name, tensor in checkpoint.load(place).items():
                    assert tensor.equal(tensors[name])
            put(file, whole)
    assert n_told > 150


@pytest.mark.parametrize(
    "like",
    [
        {"w": torch.zeros(1)},
        {"w": torch.zeros(1, 2)},
        {"w": torch.zeros(2, dtype=torch.float64)},
        {"v": torch.zeros(2)},
        {"w": torch.zeros(2), "v": torch.zeros(2)},
        {},
    ],
    ids=["length", "shape", "type", "name", "one more", "one less"],
)
def test_a_checkpoint_of_another_network_is_not_taken(folder: str, like: Any) -> None:
    checkpoint.save(folder, Position(epoch=1), {"w": torch.zeros(2)}, {})
    told: list[str] = []
    assert checkpoint.latest(folder, {}, like, told.append) is None
    assert "the network has" in told[0]


def test_a_checkpoint_that_cannot_be_read_gives_way_to_the_one_before(folder: str) -> None:
    whole = trained(ONE, saving(folder))[0]
    want = checkpoint.load(whole.checkpoint_uri)["vector"].tolist()
    storage.write_bytes(storage.join(checkpoint.newest(folder), "vector.npy"), b"torn")
    told: list[str] = []
    again = trained(ONE, saving(folder), tell=told.append)[0]
    assert "resuming after epoch 4 of 5, batch 1" in told
    assert checkpoint.load(again.checkpoint_uri)["vector"].tolist() == want


def test_a_loss_that_is_not_finite_stops_with_the_step(folder: str) -> None:
    with pytest.raises(DivergedError, match=r"step 6 of 10 \(epoch 3\)") as caught:
        LocalLauncher(2).run(noisy(5), TWO, saving(folder))
    assert f"last good checkpoint: {storage.join(folder, 'epoch-000002-batch-000000001')}" in str(
        caught.value
    )


@pytest.mark.parametrize("shares", [ONE, TWO], ids=["one", "two"])
def test_a_step_may_be_read_in_parts(shares: list[list[list[int]]]) -> None:
    """Batches of two rows, three to a step, the last step of an epoch shorter: the same steps."""
    parts = [[[0, 1], [2], [3], [4, 5], [6]], [[], [], [], [], []]][: len(shares)]
    options = replace(OPTIONS, accumulate=3)
    (one,) = trained(ONE)
    for found in (trained(parts, options)[0], trained(shares)[0]):
        np.testing.assert_allclose(found.weights["vector"], one.weights["vector"], rtol=1e-12)
        assert [e.loss for e in found.curve.epochs] == pytest.approx(
            [e.loss for e in one.curve.epochs]
        )


def test_compressed_gradients_are_rounded_and_no_more() -> None:
    exact = trained(TWO)[0].weights["vector"]
    rounded = trained(TWO, replace(OPTIONS, compression="float16"))[0].weights["vector"]
    np.testing.assert_allclose(rounded, exact, atol=2e-3)
    assert (rounded != exact).any()


def test_bfloat16_rounds_products_and_keeps_parameters() -> None:
    def fn(comm: Comm, precision: Any) -> Trained:
        made, kinds = net().float(), set()

        def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
            out = made(batch.tensors["x"].float())
            kinds.add(out.dtype)
            return (out - batch.tensors["y"].float())[:, 0] ** 2

        found = train_network(comm, made, loss, Rows(ONE, 0), replace(OPTIONS, precision=precision))
        assert kinds == {getattr(torch, precision)}
        return found

    full, half = (
        LocalLauncher(1).run(fn, precision)[0].value.weights["vector"]
        for precision in ("float32", "bfloat16")
    )
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=2e-2)


def held_out(values: list[float], **changes: Any) -> Any:
    """A training on two ranks whose validation gives `values`, epoch by epoch."""

    def fn(comm: Comm) -> Trained:
        made, told = net(), iter(values)

        class Held(Rows):
            def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
                self.value = next(told)
                return super().epoch(epoch, start)

        held = Held([[[8], [9]], [[5, 6], []]], comm.rank)

        def value(batch: Batch) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            rows = torch.where(batch.weight > 0, held.value, 0.0)  # inf * 0 would be nan
            return rows + batch.tensors["x"][:, 0]

        validation = Validation(held, value, changes.get("better", "lower"))
        options = LoopOptions(
            epochs=len(values),
            learning_rate=0.1,
            **{k: v for k, v in changes.items() if k != "better"},
        )
        return train_network(comm, made, squared(made), Rows(TWO, comm.rank), options, validation)

    return LocalLauncher(2).run(fn)[0].value


def after(epochs: int, of: int) -> Any:
    """The weights after some epochs of a training of `of`."""

    def fn(comm: Comm) -> list[float]:
        made = net()
        seen: list[list[float]] = []

        class Watched(Rows):
            def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
                seen.append(nn.utils.parameters_to_vector(made.parameters()).tolist())
                return super().epoch(epoch, start)

        rows = Watched(TWO, comm.rank)
        train_network(comm, made, squared(made), rows, LoopOptions(epochs=of, learning_rate=0.1))
        seen.append(nn.utils.parameters_to_vector(made.parameters()).tolist())
        return seen[epochs]

    return LocalLauncher(2).run(fn)[0].value


def test_the_best_epoch_gives_the_weights(tmp_path: Any) -> None:
    values = [5.0, 2.0, 3.0, 4.0]
    found = held_out(values)
    assert found.curve.best == 2
    # The mean over the rows of both ranks, each once: x is .8, .9, .5, .6.
    assert [e.validation for e in found.curve.epochs] == pytest.approx([v + 0.7 for v in values])
    assert found.weights["vector"].tolist() == after(2, of=4)
    assert held_out(values, better="higher").curve.best == 1
    # Through a store: the best one is kept beside the newest two.
    stored = held_out(values, checkpoints=str(tmp_path), checkpoint_every_s=0)
    made = net()
    load_weights(made, stored)
    assert nn.utils.parameters_to_vector(made.parameters()).tolist() == after(2, of=4)
    kept = {f.rsplit("/", 2)[1][:12] for f in storage.list_files(str(tmp_path))}
    assert kept == {"epoch-000002", "epoch-000003", "epoch-000004"}


def test_patience_ends_a_training() -> None:
    values = [5.0, 2.0, 3.0, 2.0, 1.0, 1.0]
    assert len(held_out(values, patience=3).curve.epochs) == 6
    found = held_out(values, patience=2)
    assert (len(found.curve.epochs), found.curve.best) == (4, 2)
    assert found.weights["vector"].tolist() == after(2, of=6)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_validation_value_that_is_no_number_ends_a_training(value: str) -> None:
    with pytest.raises(
        DivergedError, match=rf"step 4 of 6 \(epoch 2\): its validation value is {value}"
    ):
        held_out([1.0, float(value), 2.0])


def test_another_trainings_checkpoints_do_not_cost_a_training_its_own(tmp_path: Any) -> None:
    """Theirs have later names; the one just written stays, and is found."""
    folder, tensors = str(tmp_path), {"w": torch.ones(2)}
    for epoch in (4, 5):
        checkpoint.save(folder, Position(epoch=epoch), tensors, {"model": "other"})
    place = checkpoint.save(folder, Position(epoch=1, batch=7), tensors, {"model": "mine"})
    found = checkpoint.latest(folder, {"model": "mine"}, tensors, print)
    assert found == (Position(epoch=1, batch=7), place)


class Table(nn.Module):
    """Five rows of two numbers, some read a step, and a dense factor."""

    sparse_parameters = frozenset({"table"})

    def __init__(self) -> None:
        super().__init__()
        start = torch.arange(10, dtype=torch.float64).reshape(5, 2) / 10
        self.factor = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.table = nn.Parameter(start)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(rows, self.table, sparse=True) * self.factor


STEPS = [[[0, 3, 3, 1], [3]], [[1, 0, 2], [2, 2]]]  # of two ranks; row 4 is never read


def table_fit(comm: Comm, shares: list[list[list[int]]], options: LoopOptions) -> Any:
    made = Table()

    def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
        rows = (batch.tensors["x"][:, 0] * 10).round().long()
        return ((made(rows) - 1) ** 2).sum(dim=1)

    return train_network(comm, made, loss, Rows(shares, comm.rank, width=8), options)


def test_sparse_gradients_move_the_rows_they_touch_as_sparse_adam_does() -> None:
    together = [[a + b for a, b in zip(*STEPS)]]
    options = LoopOptions(epochs=3, learning_rate=0.1)
    (one,) = LocalLauncher(1).run(table_fit, together, options)
    two = LocalLauncher(2).run(table_fit, STEPS, options)[0].value
    for name, found in one.value.weights.items():
        np.testing.assert_allclose(two.weights[name], found, rtol=1e-12)

    made = Table()
    dense = torch.optim.Adam([made.factor], lr=0.1)
    sparse = torch.optim.SparseAdam([made.table], lr=0.1)
    for epoch in range(3):
        for n, rows in enumerate(together[0]):
            for optimiser in (dense, sparse):
                optimiser.param_groups[0]["lr"] = 0.1 * (1 - (2 * epoch + n) / 6)
                optimiser.zero_grad()
            (((made(torch.tensor(rows)) - 1) ** 2).sum() / len(rows)).backward()
            dense.step()
            sparse.step()
    # torch adds epsilon before the bias correction of the spread: that much apart.
    for name, want in (("table", made.table), ("vector", made.factor)):
        np.testing.assert_allclose(one.value.weights[name], want.detach().numpy(), rtol=1e-6)
    assert one.value.weights["table"][4].tolist() == [0.8, 0.9]


def test_sparse_tables_are_part_of_a_checkpoint(folder: str) -> None:
    options = LoopOptions(epochs=3, learning_rate=0.1)
    whole = LocalLauncher(2).run(table_fit, STEPS, options)[0].value
    saves = replace(options, checkpoints=folder, checkpoint_every_s=0)
    LocalLauncher(2).run(table_fit, STEPS, saves)
    storage.remove(storage.join(checkpoint.newest(folder), storage.COMPLETE))
    again = LocalLauncher(2).run(table_fit, STEPS, saves)[0].value
    made = Table()
    load_weights(made, again)
    assert made.table.tolist() == whole.weights["table"].tolist()
    assert made.factor.tolist() == whole.weights["vector"].tolist()


def test_long_epochs_tell_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recspark.train.loop._LINE_EVERY_S", 0.0)
    told: list[str] = []
    trained(TWO, LoopOptions(epochs=1, learning_rate=0.1), tell=told.append)
    pattern = r"epoch 1 of 1, batch 1 of 2: loss \d\.\d{4}, [\d,]+ rows/s, \d+ s to its end"
    assert sum(bool(re.fullmatch(pattern, line)) for line in told) == 1


def test_a_position_survives_its_text() -> None:
    curve = (Epoch(1, 0.1 + 0.2, 1e-300, None, 3.3), Epoch(2, 1 / 3, 7.0, 2 / 3, 0.0))
    position = Position(2, 5, 17, 0.1, 3.0, 1e9 / 7, curve, 1)
    assert Position.from_json(position.to_json()) == position


def test_a_gpu_that_is_not_there_is_a_named_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(DeviceError, match=r"train\.device is cuda, but this rank sees no GPU"):
        trained(ONE, replace(OPTIONS, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_a_gpu_takes_the_same_steps() -> None:
    on_cpu = trained(TWO)[0].weights["vector"]
    on_gpu = trained(TWO, replace(OPTIONS, device="cuda"))[0].weights["vector"]
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-6)


def test_every_batch_of_every_epoch_and_rank_draws_its_own_numbers() -> None:
    def fn(comm: Comm) -> list[float]:
        made, drawn = net(), []

        def loss(batch: Batch, generator: torch.Generator, done: float) -> torch.Tensor:
            drawn.append(float(torch.rand(1, generator=generator)))
            return squared(made)(batch, generator, done)

        train_network(comm, made, loss, Rows(TWO, comm.rank), OPTIONS)
        return drawn

    found = [number for result in LocalLauncher(2).run(fn) for number in result.value]
    assert len(set(found)) == len(found) == 2 * 5 * 2

"""What gru4rec and sasrec share: reading rows, the loss of a row, answering for an open session."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from recspark.data.blocks import Histories, QueryBlock, Ragged
from recspark.data.dataset import Dataset
from recspark.data.training_rows import sequences
from recspark.errors import CatalogueTooLargeError, ConfigError, ModelError
from recspark.eval import next_item as evaluation
from recspark.models.base import FitOptions
from recspark.models.neural import Job, local_items, net_arrays
from recspark.models.registry import MODELS, make
from recspark.models.sequences.gru4rec import Gru4Rec, Gru4RecModel, Gru4RecSettings
from recspark.models.sequences.next_item import last_states
from recspark.models.sequences.next_item_training import (
    drawn_loss,
    item_counts,
    row_loss,
    start_bias,
    train_rank,
)
from recspark.models.sequences.sasrec import SasRec, SasRecModel, SasRecSettings
from recspark.testing import synth
from recspark.train.feed import Batch, plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_weights
from recspark.train.losses import gbce_power
from recspark.train.negatives import Negatives

pytestmark = pytest.mark.torch
CUTOFF = datetime(2020, 3, 1, tzinfo=UTC)
VOCABULARY = np.array([3, 5, 8, 13, 21], np.int32)
SMALL = Gru4RecSettings(
    loss="cross_entropy", sparse=False, hidden_size=4, dropout=0.0, n_samples=None
)


def batch(*weights: float) -> Batch:
    items = [[3, 8, 21, -1], [99, 5, 99, 3], [13, 13, -1, -1]]
    return Batch(
        {"items": torch.tensor(items, dtype=torch.int32), "length": torch.tensor([3, 4, 2])},
        torch.tensor(weights, dtype=torch.float32),
    )


def test_rows_as_local_items() -> None:
    found = local_items(batch(1, 1, 1), torch.from_numpy(VOCABULARY).long(), 9)
    assert found.tolist() == [[0, 2, 4], [1, 0, -1], [3, 3, -1]]
    newest = local_items(batch(1, 1, 1), torch.from_numpy(VOCABULARY).long(), 2)
    assert newest.tolist() == [[2, 4], [1, 0], [3, 3]]


def test_items_are_counted_over_all_ranks() -> None:
    def fn(comm: Any) -> list[float]:
        vocabulary = torch.from_numpy(VOCABULARY).long()
        return item_counts(comm, iter([batch(1, 1, 0)]), vocabulary).tolist()

    for result in LocalLauncher(2).run(fn):
        assert result.value == [4, 2, 2, 0, 2]


@pytest.mark.parametrize("settings", [SMALL, SMALL.model_copy(update={"loss": "bpr_max"})])
def test_the_loss_of_a_row_adds_up_its_targets(settings: Gru4RecSettings) -> None:
    """Row 0 reads 0, 2 and has targets 2, 4; row 1 reads 1 and has target 0; row 2 weighs 0."""
    net = Gru4Rec.make_net(settings, 5, 1)
    torch.nn.init.normal_(net.items_out_bias, generator=torch.Generator().manual_seed(1))
    negatives = Negatives(torch.ones(5), None, 0.5)
    vocabulary = torch.from_numpy(VOCABULARY).long()
    generator = torch.Generator()
    found = row_loss(net, vocabulary, settings, negatives, batch(1, 1, 0), generator, 0.0)

    def of_target(read: list[int], target: int) -> float:
        embedded = net.items_in[torch.tensor([read])]
        state = net.states(embedded, torch.tensor([len(read)]))[0, -1]
        scores = (net.items_out @ state + net.items_out_bias).detach().double().numpy()
        if settings.loss == "cross_entropy":
            return float(np.log(np.exp(scores).sum()) - scores[target])
        others = np.delete(scores, target)
        share = np.exp(others) / np.exp(others).sum()
        wins = (share / (1 + np.exp(others - scores[target]))).sum()
        return float((share * others**2).sum() - np.log(wins))

    want = [of_target([0], 2) + of_target([0, 2], 4), of_target([1], 0), 0]
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss", ["cross_entropy", "bpr_max", "gbce"])
def test_sparse_gradients_are_the_dense_ones_of_the_items_read(loss: str, tied: bool) -> None:
    found = {}
    for sparse in (False, True):
        settings = SMALL.model_copy(
            update={"loss": loss, "n_samples": 1, "tied": tied, "sparse": sparse}
        )
        net = Gru4Rec.make_net(settings, 9, 1)
        negatives = Negatives(torch.ones(9), 1, 0.5)
        vocabulary = torch.from_numpy(np.append(VOCABULARY, [60, 70, 80, 90])).long()
        generator = torch.Generator().manual_seed(3)
        lost = row_loss(net, vocabulary, settings, negatives, batch(1, 1, 0), generator, 0.0)
        lost.sum().backward()
        found[sparse] = {name: p.grad for name, p in net.named_parameters()}
    names = {"items_in"} if tied else {"items_in", "items_out"}
    assert {name for name, grad in found[True].items() if grad.is_sparse} == names
    for name, grad in found[True].items():
        np.testing.assert_allclose(grad.to_dense(), found[False][name], rtol=1e-6, atol=1e-8)
    read = found[True]["items_in"].coalesce().indices()[0].tolist()
    # Rows 0 and 1 read items 0, 2, 1; row 2 weighs nothing but is read: 3. Targets are 2, 4 and 0.
    assert {0, 1, 2, 3} <= set(read) <= {0, 1, 2, 3} | ({*range(9)} if tied else set())
    moved = [item for item in read if found[True]["items_in"].to_dense()[item].any()]
    assert tied or moved == [0, 1, 2]


def test_drawn_items_stand_against_every_target_but_themselves() -> None:
    settings = SMALL.model_copy(update={"loss": "gbce", "n_samples": 2, "calibration": 0.5})
    net = Gru4Rec.make_net(settings, 5, 1)
    torch.nn.init.normal_(net.items_out_bias, generator=torch.Generator().manual_seed(1))
    states = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    targets = [4, 0, 2]
    found = drawn_loss(
        net, states, torch.tensor(targets), settings, torch.Generator().manual_seed(7)
    ).tolist()
    drawn = torch.randint(5, (2,), generator=torch.Generator().manual_seed(7)).tolist()
    assert set(drawn) & set(targets)
    power = 0.75  # 2 of 4 others: half way from 1 to 1/2
    for state, target, value in zip(states, targets, found, strict=True):
        scores = (net.items_out @ state + net.items_out_bias).detach().double().numpy()
        wins = 1 / (1 + np.exp(-scores))
        want = -power * np.log(wins[target])
        want -= sum(np.log(1 - wins[item]) for item in drawn if item != target)
        assert value == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("loss", ["cross_entropy", "gbce"])
def test_training_begins_where_a_bias_alone_is_best(loss: str) -> None:
    """The expected loss of all targets, states at 0, has no gradient there."""
    share = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    settings = SMALL.model_copy(update={"loss": loss, "n_samples": 2, "calibration": 0.75})
    bias = start_bias(settings, share).requires_grad_()
    if loss == "gbce":
        power = gbce_power(2, 4, 0.75)
        won = power * torch.nn.functional.softplus(-bias)  # (4,), where i is the target
        lost = 2 / 4 * torch.nn.functional.softplus(bias)  # (4,), where it is another, and drawn
        expected = (share * won + (1 - share) * lost).sum()
    else:
        expected = -(share * torch.log_softmax(bias, 0)).sum()
    (gradient,) = torch.autograd.grad(expected, bias)
    np.testing.assert_allclose(gradient.numpy(), 0, atol=1e-12)
    assert not start_bias(settings.model_copy(update={"loss": "bpr_max"}), share).any()


def test_a_batch_that_weighs_nothing_has_a_gradient_of_zero() -> None:
    net = Gru4Rec.make_net(SMALL, 5, 1)
    negatives = Negatives(torch.ones(5), 3, 0.5)
    vocabulary = torch.from_numpy(VOCABULARY).long()
    found = row_loss(net, vocabulary, SMALL, negatives, batch(0, 0, 0), torch.Generator(), 0.0)
    assert found.tolist() == [0, 0, 0]
    found.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Gru4Rec, Gru4RecSettings(hidden_size=6)),
        (SasRec, SasRecSettings(embedding_size=6, length=11)),
    ],
)
def test_last_states_are_the_network_whatever_the_batch(kind: Any, settings: Any) -> None:
    net = kind.make_net(settings, 30, 2)
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 12, 600)
    start = np.concatenate([[0], np.cumsum(lengths)])
    found = Ragged(start, rng.integers(0, 30, start[-1]))
    arrays = net_arrays(net)
    whole = last_states(kind.make_net(settings, 1, 9), found, arrays, settings.length)
    for row in range(20):
        items = torch.from_numpy(found.values[start[row] : start[row + 1]])
        if len(items):
            want = net.states(net.items_in[items][None], torch.tensor([len(items)]))[0, -1]
            np.testing.assert_allclose(whole[row], want.detach().numpy(), atol=1e-6)
        else:
            assert not whole[row].any()
    for step in (1, 257):
        parts = []
        for first in range(0, 600, step):
            some = start[first : first + step + 1]
            part = Ragged(some - some[0], found.values[some[0] : some[-1]])
            parts.append(last_states(kind.make_net(settings, 1, 9), part, arrays, settings.length))
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (Gru4RecModel, Gru4RecSettings(hidden_size=6)),
        (SasRecModel, SasRecSettings(embedding_size=6)),
    ],
)
def test_only_the_open_session_is_read_unless_the_history_is_asked_for(
    model: Any, settings: Any
) -> None:
    """Scores after session B are the same whether session A came before it or not."""
    arrays = net_arrays(model.make_net(settings, 5, 1))

    def scores(context: str, items: list[int], ids: list[str]) -> np.ndarray:
        history = Histories(
            np.array([0, len(items)]),
            np.array(items, np.int32),
            np.arange(len(items)),
            np.ones(len(items), np.float32),
            pa.array(ids),
        )
        none = Ragged(np.zeros(2, np.int64), np.zeros(0, np.int32))
        block = QueryBlock(np.zeros(1, np.int64), history, none)
        made = settings.model_copy(update={"context": context})
        return (
            model(made, CUTOFF, VOCABULARY, arrays).scorer().score(block).approximate(slice(0, 1))
        )

    alone = scores("session", [5, 21], ["b", "b"])
    np.testing.assert_array_equal(scores("session", [3, 8, 5, 21], ["a", "a", "b", "b"]), alone)
    np.testing.assert_array_equal(scores("history", [5, 21], ["b", "b"]), alone)
    assert not np.allclose(scores("history", [3, 8, 5, 21], ["a", "a", "b", "b"]), alone)


CHAIN = 40  # after item i comes i + 1, or i + 7 where i - 7 came before it


@pytest.fixture(scope="module")
def chain() -> Ragged:
    rng = np.random.default_rng(3)
    step = rng.choice([1, 7], 600)
    rows = (rng.integers(0, CHAIN, 600)[:, None] + step[:, None] * np.arange(6)) % CHAIN
    return Ragged(np.arange(601) * 6, rows.ravel().astype(np.int32))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Gru4Rec, {"hidden_size": 24, "loss": "cross_entropy"}),
        (Gru4Rec, {"hidden_size": 24, "loss": "cross_entropy", "cell": "lstm", "tied": False}),
        (Gru4Rec, {"hidden_size": 24, "n_samples": 20, "tied": False, "sparse": False}),
        (Gru4Rec, {"hidden_size": 24}),
        (SasRec, {"embedding_size": 24, "length": 9, "train_on": "session", "context": "session"}),
        (
            SasRec,
            {
                "embedding_size": 24,
                "length": 9,
                "train_on": "session",
                "context": "session",
                "loss": "gbce",
                "epochs": 60,  # its targets pull less than the softmax's
                "sparse": True,
                "tied": False,
            },
        ),
    ],
)
def test_what_comes_next_is_learnt(
    kind: Any, settings: dict[str, Any], chain: Ragged, tmp_path: Path
) -> None:
    """From the second item on the step of a session is known, and the next item with it."""
    common = {
        "n_samples": 10,
        "epochs": 25,
        "batch_size": 32,
        "learning_rate": 0.02,
        "dropout": 0.0,
    }
    made = kind.settings_class(**{**common, **settings})
    history = Histories(chain.start, chain.values, chain.values, chain.values)
    _, _, items, lengths = sequences(history, "session", 10, 100)
    table = pa.table(
        {"items": pa.array(list(items), pa.list_(pa.int32())), "length": pa.array(lengths)}
    )
    training = synth.write_files(table, str(tmp_path), "training_sessions", 2)
    vocabulary = np.arange(CHAIN, dtype=np.int32)
    loop = LoopOptions(epochs=made.epochs, learning_rate=made.learning_rate)
    n_ranks = 2 if made.is_sparse else 1
    job = Job(made, vocabulary, plan_shards(training, n_ranks), None, loop)
    trained = LocalLauncher(n_ranks).run(partial(train_rank, kind.make_net), job)
    net = kind.make_net(made, CHAIN, 1)
    load_weights(net, trained[0].value)
    model = kind(made).fitted(CUTOFF, vocabulary, net_arrays(net))
    found = evaluation.ranks(model.scorer(), vocabulary, chain, 0, 1).reshape(600, 5)
    assert found[:, 1:].mean() > 0.98
    assert 0.4 < found[:, 0].mean() < 0.6


def test_registry_and_models_agree_about_training_tables() -> None:
    for name, spec in MODELS.items():
        asked = {*make(name, {}).training_tables}
        if "training_sessions" in spec.training:
            asked = {
                table
                for unit in ("session", "history")
                for head in ("next_item", "click_through")
                for table in make(name, {"train_on": unit, "head": head}).training_tables
            }
        if "training_item_bags" in spec.training:
            by_item = {"by": "item", "unobserved": 0.0}
            asked |= {*make(name, by_item).training_tables}
        if "training_typed_timelines" in spec.training:
            by_type = {"view_by": "event_type", "views": {"all": []}}
            asked |= {*make(name, by_type).training_tables}
        assert asked == set(spec.training), name


def data(items: int) -> Dataset:
    made: Any = object.__new__(_Known)
    made.n = items
    made.training = {}
    return made


class _Known(Dataset):
    __setattr__ = object.__setattr__

    def vocabulary(self) -> Any:
        return np.arange(self.n, dtype=np.int32)  # type: ignore[attr-defined]


def test_every_place_that_is_read_is_learnt(tmp_path: Path) -> None:
    """Rows of 7 items teach the 6 places before the last; an answer may read no more of them."""
    rows = np.arange(21, dtype=np.int32).reshape(3, 7)
    table = pa.table({"items": list(rows), "length": np.full(3, 7, np.int32)})
    training = synth.write_files(table, str(tmp_path), "training_histories", 1)
    vocabulary = np.arange(21, dtype=np.int32)
    loop = LoopOptions(epochs=1, learning_rate=0.1)

    def moved(length: int) -> list[bool]:
        made = SasRecSettings(embedding_size=4, length=length, n_samples=None)
        job = Job(made, vocabulary, plan_shards(training, 1), None, loop)
        (trained,) = LocalLauncher(1).run(partial(train_rank, SasRec.make_net), job)
        net, before = SasRec.make_net(made, 21, 1), SasRec.make_net(made, 21, 1)
        load_weights(net, trained.value)
        return (net.positions != before.positions).any(dim=1).tolist()

    assert moved(6) == [True] * 6
    with pytest.raises(ModelError, match=r"length to 6, or features\.sequence_length to 8"):
        moved(7)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        CatalogueTooLargeError, match=r"7 items .* raise models\.gru4rec\.max_items"
    ):
        Gru4Rec(Gru4RecSettings(max_items=6)).fit(data(7), FitOptions())
    with pytest.raises(
        ModelError,
        match=r"no training set 'training_histories' is here, but \[\]; run build_features",
    ):
        SasRec(SasRecSettings()).fit(data(7), FitOptions())
    with pytest.raises(ConfigError, match=r"embedding_size \(5\) must be hidden_size \(4\)"):
        Gru4Rec.from_dict({"hidden_size": 4, "embedding_size": 5})
    with pytest.raises(ConfigError, match="set n_samples"):
        SasRec.from_dict({"loss": "gbce", "n_samples": None})

    with pytest.raises(ConfigError, match="multiple of n_heads"):
        SasRec.from_dict({"embedding_size": 5, "n_heads": 2})


def test_against_all_items_gradients_are_dense() -> None:
    assert Gru4RecSettings().is_sparse
    all_items = Gru4RecSettings(n_samples=None)
    assert not all_items.is_sparse
    assert not Gru4Rec.make_net(all_items, 5, 1).sparse_parameters

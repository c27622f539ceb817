"""The click-through head: its loss by the formula, planted click rates, and what it says without any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyspark.sql import SparkSession
from scipy.stats import rankdata

from recspark.data.blocks import Array, Histories, QueryBlock, Ragged
from recspark.errors import ModelError
from recspark.models.base import FitOptions
from recspark.models.neural import Job, local_items, net_arrays
from recspark.models.scoring import topk
from recspark.models.sequences import click_through
from recspark.models.sequences.gru4rec import Gru4Rec, Gru4RecSettings
from recspark.models.sequences.next_item import NextItemModel
from recspark.models.sequences.next_item_training import row_loss, train_rank
from recspark.models.sequences.sasrec import SasRec, SasRecSettings
from recspark.testing import synth
from recspark.train.feed import Batch, plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_weights
from recspark.train.negatives import Negatives

pytestmark = pytest.mark.torch
CUTOFF = datetime(2020, 3, 1, tzinfo=UTC)
VOCABULARY = torch.tensor([3, 5, 8, 13, 21])
SMALL: dict[str, Any] = {"head": "click_through", "click_weight": 0.7, "dropout": 0.0}


def batch(*weights: float) -> Batch:
    """99 and 98 are outside the vocabulary."""
    columns = {
        "items": [[3, 8, 21, -1], [99, 5, 99, 3], [13, -1, -1, -1]],
        "length": [3, 4, 1],
        "shown": [[5, 3, 98], [13, 8, -1], [3, 5, -1]],
        "shown_after": [[1, 3, 2], [1, 3, 0], [1, 1, 0]],
        "clicked": [[0, 1, 1], [1, 1, 0], [1, 0, 0]],
    }
    tensors = {name: torch.tensor(rows, dtype=torch.int32) for name, rows in columns.items()}
    return Batch(tensors, torch.tensor(weights, dtype=torch.float32))


@pytest.mark.parametrize(
    ("length", "want"),
    [
        # Item 13 of row 1 comes after nothing that is known; item 8 after 5, its only known item.
        (9, [(0, 0, 1, 0), (0, 2, 0, 1), (1, 0, 2, 1), (2, 0, 0, 1), (2, 0, 1, 0)]),
        # Rows 0 and 1 lose their first known item, and what was shown after it.
        (2, [(0, 1, 0, 1), (1, 0, 2, 1), (2, 0, 0, 1), (2, 0, 1, 0)]),
        (1, [(0, 0, 0, 1), (2, 0, 0, 1), (2, 0, 1, 0)]),
    ],
)
def test_impressions_of_a_batch(length: int, want: list[tuple[int, ...]]) -> None:
    found = click_through.shown_items(batch(1, 1, 1), VOCABULARY, length)
    columns = (found.rows, found.positions, found.items, found.clicked)
    assert list(zip(*[column.tolist() for column in columns], strict=True)) == want
    items = local_items(batch(1, 1, 1), VOCABULARY, length)
    assert (items[found.rows, found.positions] >= 0).all()
    assert 1 not in click_through.shown_items(batch(1, 0, 1), VOCABULARY, length).rows.tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss", ["cross_entropy", "gbce"])
def test_the_loss_of_a_row_is_its_targets_and_its_impressions(tied: bool, loss: Any) -> None:
    """-log P of what happened, in float64: sigmoid((s * scale) . v_i + bias_i) for what was shown."""
    settings = Gru4RecSettings(hidden_size=4, tied=tied, n_samples=2, loss=loss, **SMALL)
    net = Gru4Rec.make_net(settings, 5, 1)
    for parameter in (net.click_scale, net.click_bias, net.items_out_bias):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(parameter)))
    negatives = Negatives(torch.ones(5), 2, 0.5)
    asked = (VOCABULARY, settings, negatives, batch(1, 1, 0), torch.Generator().manual_seed(3), 0.0)
    found = row_loss(net, *asked).detach().numpy()
    only_next = settings.model_copy(update={"head": "next_item"})
    asked = (
        VOCABULARY,
        only_next,
        negatives,
        batch(1, 1, 0),
        torch.Generator().manual_seed(3),
        0.0,
    )
    next_items = row_loss(net, *asked).detach().numpy()

    exact = net.double()
    at = {name: parameter.detach().numpy() for name, parameter in exact.named_parameters()}

    def lost(read: list[int], item: int, clicked: int) -> float:
        state = exact.states(exact.items_in[torch.tensor([read])], torch.tensor([len(read)]))
        scaled = state[0, -1].detach().numpy() * at["click_scale"]
        logit = scaled @ at["items_in" if tied else "items_out"][item] + at["click_bias"][item]
        p = 1 / (1 + np.exp(-logit))
        return float(-np.log(p if clicked else 1 - p))

    want = [lost([0], 1, 0) + lost([0, 2, 4], 0, 1), lost([1], 2, 1), 0]
    np.testing.assert_allclose(found - next_items, 0.7 * np.array(want), rtol=1e-4)
    assert next_items[0] > 0
    assert found[2] == 0


def test_bias_begins_at_the_rates_of_all_ranks() -> None:
    def fn(comm: Any) -> list[float]:
        return click_through.rates(comm, iter([batch(1, 1, 0)]), VOCABULARY, 9).tolist()

    for result in LocalLauncher(2).run(fn):  # of each rank: 5 not clicked, 3 and 8 clicked
        overall = (4 + 0.5) / (6 + 1)
        rate = [(clicks + 10 * overall) / (n + 10) for clicks, n in [(2, 2), (0, 2), (2, 2)]]
        assert result.value == pytest.approx([*rate, overall, overall])


# --- planted click rates --------------------------------------------------------------------------

GROUPS, N_ITEMS, N_ACTS = 4, 40, 6  # item i belongs to group i % GROUPS
RATES = np.array([0.05, 0.2, 0.5, 0.9])


def group(items: Array) -> Array:
    return np.asarray(items % GROUPS)


def click_rates() -> Array:
    """P(click) by the last item's group and the shown item, (GROUPS, N_ITEMS).

    What mostly follows (the group after) is clicked least, and items of one group differ.
    """
    items = np.arange(N_ITEMS)
    level = (group(items) * 3 + items // GROUPS + 2 * np.arange(GROUPS)[:, None]) % len(RATES)
    level[np.arange(GROUPS)[:, None] == (group(items) - 1) % GROUPS] = 0
    return RATES[level]


@dataclass(frozen=True)
class Planted:
    """n sessions: items (n, N_ACTS), shown, shown_after and clicked (n, M)."""

    items: Array
    shown: Array
    after: Array
    clicked: Array

    @property
    def last(self) -> Array:
        """The item before each impression, (n, M)."""
        return np.take_along_axis(self.items, self.after - 1, axis=1)


def planted(n: int, seed: int) -> Planted:
    """After an item of group g comes one of g + 1, nine times in ten; all are shown alike."""
    rng = np.random.default_rng(seed)
    groups = np.cumsum(
        np.where(rng.random((n, N_ACTS)) < 0.9, 1, rng.integers(0, GROUPS, (n, N_ACTS))), axis=1
    )
    groups = (groups + rng.integers(0, GROUPS, (n, 1))) % GROUPS
    items = groups + GROUPS * rng.integers(0, N_ITEMS // GROUPS, groups.shape)
    after = np.repeat(np.arange(1, N_ACTS + 1), 4)[None].repeat(n, axis=0)
    shown = rng.integers(0, N_ITEMS, after.shape)
    made = Planted(items, shown, after, np.zeros_like(shown))
    rates = click_rates()[group(made.last), shown]
    return Planted(items, shown, after, (rng.random(rates.shape) < rates).astype(int))


def fitted(kind: Any, settings: Any, sessions: Planted, folder: Path) -> NextItemModel:
    def lists(values: Array) -> pa.Array:
        return pa.array(list(values.astype(np.int32)), pa.list_(pa.int32()))

    table = pa.table(
        {
            "items": lists(sessions.items),
            "length": pa.array(np.full(len(sessions.items), N_ACTS), pa.int32()),
            "shown": lists(sessions.shown),
            "shown_after": lists(sessions.after),
            "clicked": lists(sessions.clicked),
        }
    )
    training = synth.write_files(table, str(folder), "training_session_impressions", 2)
    vocabulary = np.arange(N_ITEMS, dtype=np.int32)
    loop = LoopOptions(epochs=settings.epochs, learning_rate=settings.learning_rate)
    job = Job(settings, vocabulary, plan_shards(training, 1), None, loop)
    trained = LocalLauncher(1).run(partial(train_rank, kind.make_net), job)
    net = kind.make_net(settings, N_ITEMS, 1)
    load_weights(net, trained[0].value)
    model: NextItemModel = kind(settings).fitted(CUTOFF, vocabulary, net_arrays(net))
    return model


def queries(read: Ragged) -> QueryBlock:
    """A query for each row of items."""
    n, events = len(read.lengths), len(read.values)
    history = Histories(
        read.start, read.values, np.zeros(events, np.int64), np.ones(events, np.float32)
    )
    nothing = Ragged(np.zeros(n + 1, np.int64), np.zeros(0, np.int32))
    return QueryBlock(np.arange(n), history, nothing)


def scores(model: NextItemModel, sessions: Planted) -> Array:
    """The model's score of each impression, (n, M)."""
    n, m = sessions.shown.shape
    start = np.concatenate([[0], np.cumsum(sessions.after.ravel())])
    column = np.arange(start[-1]) - np.repeat(start[:-1], sessions.after.ravel())
    row = np.repeat(np.repeat(np.arange(n), m), sessions.after.ravel())
    read = sessions.items[row, column].astype(np.int32)
    block = queries(Ragged(start, read))
    found = model.scorer().score(block).exact(np.arange(n * m), sessions.shown.ravel())
    return found.reshape(n, m)


def auc(values: Array, clicked: Array) -> float:
    """How often a clicked impression has the larger value than one that was not; ties count half."""
    ranks, is_click = rankdata(values.ravel()), clicked.ravel() == 1
    n = int(is_click.sum())
    below = ranks[is_click].sum() - n * (n + 1) / 2
    return float(below / (n * (len(ranks) - n)))


SESSION = {"train_on": "session", "context": "session"}
SHORT = {
    "head": "click_through",
    "batch_size": 32,
    "dropout": 0.0,
    "learning_rate": 0.01,
    **SESSION,
}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Gru4Rec, Gru4RecSettings(hidden_size=24, epochs=8, **SHORT)),
        (
            SasRec,
            SasRecSettings(embedding_size=24, length=N_ACTS - 1, epochs=8, tied=False, **SHORT),
        ),
    ],
)
def test_planted_click_rates_are_learnt(kind: Any, settings: Any, tmp_path: Path) -> None:
    """AUC of held-out impressions nears that of the planted rates, and lists follow the rates."""
    training, held_out = planted(1500, 1), planted(400, 2)
    rates = click_rates()
    true = rates[group(held_out.last), held_out.shown]
    best = auc(true, held_out.clicked)
    model = fitted(kind, settings, training, tmp_path / "clicks")
    found = scores(model, held_out)
    assert best - 0.01 < auc(found, held_out.clicked) < best + 0.005
    p = 1 / (1 + np.exp(-found))
    for rate in RATES:
        assert p[true == rate].mean() == pytest.approx(rate, abs=0.03)
        assert p[true == rate].std() < 0.1

    # What follows is mostly what is clicked least.
    other = fitted(
        kind, settings.model_copy(update={"head": "next_item"}), training, tmp_path / "n"
    )
    assert auc(scores(other, held_out), held_out.clicked) < 0.45

    asked = queries(Ragged(np.arange(N_ITEMS + 1), np.arange(N_ITEMS, dtype=np.int32)))
    lists = topk.answer(asked, model.items, model.scorer(), N_ITEMS)
    user, item = (lists.column(name).to_numpy() for name in ("user_idx", "item_idx"))
    listed = rates[group(user), item].reshape(N_ITEMS, N_ITEMS)
    ideal = -np.sort(-rates[group(np.arange(N_ITEMS))], axis=1)
    assert np.abs(listed - ideal).mean() < 0.02


def test_training_begins_at_the_rates_of_items(tmp_path: Path) -> None:
    """Steps of no length: the bias says how often an item is clicked, the scale is 1."""
    sessions = planted(200, 3)
    made = Gru4RecSettings(
        **{**SHORT, "loss": "cross_entropy", "epochs": 1, "learning_rate": 1e-12}
    )
    arrays = fitted(Gru4Rec, made, sessions, tmp_path).arrays()
    n_shown, n_clicked = (
        np.bincount(sessions.shown.ravel(), weights, N_ITEMS)
        for weights in (np.ones(sessions.shown.size), sessions.clicked.ravel())
    )
    rate = (n_clicked + 10 * sessions.clicked.mean()) / (n_shown + 10)
    np.testing.assert_allclose(arrays["click_bias"], np.log(rate / (1 - rate)), atol=0.01)
    np.testing.assert_allclose(arrays["click_scale"], 1, atol=1e-9)
    read = (
        np.bincount(sessions.items.ravel(), minlength=N_ITEMS)
        + 0.01 * sessions.items.size / N_ITEMS
    )
    np.testing.assert_allclose(arrays["items_out_bias"], np.log(read / read.sum()), atol=1e-6)


@pytest.mark.spark
def test_without_impressions_the_table_is_named(spark: SparkSession, tmp_path: Path) -> None:
    """Every user has one event: nothing comes before anything that is shown."""
    log = synth.log([(user, user % 3, 1.0) for user in range(6)])
    plain = synth.dataset(spark, log, 1, {"training_histories": str(tmp_path / "plain")})
    recommender = Gru4Rec.from_dict({"head": "click_through", "train_on": "history"})
    with pytest.raises(
        ModelError,
        match="no training set 'training_history_impressions' is here, but .'training_hist",
    ):
        recommender.fit(plain, FitOptions(in_process=True))
    log += synth.log([(user, user % 2, 0.5) for user in range(6)])
    data = synth.dataset(spark, log, 1, {"training_history_impressions": str(tmp_path / "shown")})
    [shown] = data.training.values()
    n_rows = shown.n_rows
    table = pa.concat_tables([pq.read_table(uri.removeprefix("file://")) for uri, _ in shown.files])
    assert n_rows == 6
    none = pa.array([[-1] * 64] * n_rows, pa.list_(pa.int32()))
    table = table.set_column(table.column_names.index("shown"), "shown", none)
    files = synth.write_files(table, str(tmp_path / "none"), "training_history_impressions", 2)
    with pytest.raises(
        ModelError,
        match=r"'training_history_impressions' version 0 has none before 2020-07-01; bring events of "
        r"a type in sessions\.impression_types, or set models\.gru4rec\.head=next_item",
    ):
        recommender.fit(replace(data, training={files.table: files}), FitOptions(in_process=True))

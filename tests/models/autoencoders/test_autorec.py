"""AutoRec against equation 2 of Sedhain et al. 2015, in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, StructField, StructType

from recspark import schema
from recspark.config import Train
from recspark.errors import ConfigError
from recspark.models.autoencoders.autoencoder import encode
from recspark.models.autoencoders.autorec import (
    AutoRec,
    AutoRecModel,
    AutoRecSettings,
    encoded,
    layers_of,
    make_net,
    row_loss,
    train_rank,
)
from recspark.models.base import FitOptions
from recspark.models.neural import Job, net_arrays
from recspark.models.ratings import predicted
from recspark.testing import synth
from recspark.train.feed import Batch, plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_weights

pytestmark = pytest.mark.torch
VOCABULARY = np.array([3, 5, 8, 13])
RATED = {0: {3: 5.0, 8: 1.0}, 1: {5: 3.0, 13: 4.0, 8: 2.0}}  # 99 is in no vocabulary


def batch() -> Batch:
    items = torch.tensor([[3, 8, -1], [5, 8, 13], [99, -1, -1]])
    weights = torch.tensor([[5.0, 1, 0], [3, 2, 4], [1, 0, 0]])
    return Batch({"items": items, "weights": weights}, torch.ones(3))


def test_only_what_was_rated_counts() -> None:
    ratings = AutoRecSettings(hidden_size=3, unobserved=0)
    net = make_net(ratings, 4, seed=1)
    with torch.no_grad():
        for bias in (net.items_in_bias, net.items_out_bias):
            bias += torch.linspace(-1, 1, len(bias))
    v, mu, w, b = (p.detach().numpy().astype(float) for p in net.parameters())
    want = np.zeros(3)
    for row, rated in RATED.items():
        r = np.array([rated.get(item, 0.0) for item in VOCABULARY])
        rebuilt = w @ (1 / (1 + np.exp(-(r @ v + mu)))) + b
        want[row] = ((r - rebuilt)[r > 0] ** 2).sum()
    generator = torch.Generator().manual_seed(1)  # of ratings, none is hidden
    found = row_loss(net, torch.from_numpy(VOCABULARY), ratings, batch(), generator)
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-5)


def test_where_lists_are_wanted_the_rest_counts_and_rows_have_length_1() -> None:
    settings = AutoRecSettings(hidden_size=3, unobserved=0.25)
    net = make_net(settings, 4, seed=1)
    v, mu, w, b = (p.detach().numpy().astype(float) for p in net.parameters())
    want = np.zeros(3)
    for row, rated in {**RATED, 2: {}}.items():
        r = np.array([rated.get(item, 0.0) for item in VOCABULARY])
        rebuilt = w @ np.tanh(r / max(np.linalg.norm(r), 1e-12) @ v + mu) + b
        want[row] = (np.where(r > 0, 1, 0.25) * (r - rebuilt) ** 2).sum()
    found = row_loss(net, torch.from_numpy(VOCABULARY), settings, batch())
    np.testing.assert_allclose(found.detach().numpy(), want, rtol=1e-4)
    hidden = row_loss(
        net, torch.from_numpy(VOCABULARY), settings, batch(), torch.Generator().manual_seed(1)
    )
    assert not hidden.equal(found)


def test_the_whole_product_and_the_gather_give_the_same_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = AutoRecSettings(hidden_size=3)
    net = make_net(settings, 4, seed=1)
    found = []
    for limit in (4, 3):
        monkeypatch.setattr("recspark.nets.autorec._DENSE", limit)
        loss = row_loss(net, torch.from_numpy(VOCABULARY), settings, batch())
        gradients = torch.autograd.grad(loss.sum(), list(net.parameters()))
        found.append([loss, *gradients])
    torch.testing.assert_close(*found)


def test_half_of_a_row_hidden_is_no_worse_than_none(tmp_path: Path) -> None:
    events, held = synth.tastes()
    training = synth.write_training(events, str(tmp_path / "tastes"), "training_bags")
    items = np.arange(held.shape[1], dtype=np.int32)

    def quality(dropout: float) -> float:
        settings = AutoRecSettings(
            hidden_size=64, input_dropout=dropout, batch_size=50, half_life_days=None
        )
        loop = LoopOptions(epochs=40, learning_rate=0.01, weight_decay=settings.weight_decay)
        job = Job(settings, items, plan_shards(training, 1), None, loop)
        net = make_net(settings, len(items), 1)
        load_weights(net, LocalLauncher(1).run(train_rank, job)[0].value)
        model = AutoRecModel(settings, synth.CUTOFF, items, net_arrays(net))
        return synth.ndcg(synth.scores(model, events), events, held)

    counts = np.bincount(events.item_idx, minlength=held.shape[1])
    popular = synth.ndcg(np.tile(counts.astype(float), (len(held), 1)), events, held)
    half = quality(0.5)
    assert half > 1.3 * popular
    assert half > quality(0.0) - 0.005


@pytest.mark.parametrize("unobserved", [0.0, 0.1])
def test_scoring_is_the_network(unobserved: float) -> None:
    settings = AutoRecSettings(hidden_size=7, unobserved=unobserved)
    net = make_net(settings, 4, seed=2)
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    start, items = np.array([0, 2, 2, 5]), np.array([0, 2, 1, 2, 3], np.int32)
    weights = np.float32([5, 1, 3, 2, 4])
    rows = torch.tensor([0, 0, 2, 2, 2])
    with torch.no_grad():
        want = net(rows, torch.from_numpy(items).long(), torch.from_numpy(weights), 3)
    found = encode(start, items, weights, arrays, layers_of(settings), unit=False)
    np.testing.assert_allclose(found, want.numpy(), atol=1e-6)


def rated(n_users: int = 60, n_items: int = 40) -> tuple[synth.Log, np.ndarray]:
    """Ratings of planted tastes in [0.2, 1], half of the pairs; and all of them."""
    rng = np.random.default_rng(4)
    truth = 0.6 + 0.4 * np.tanh(rng.normal(size=(n_users, 2)) @ rng.normal(size=(2, n_items)))
    user, item = np.nonzero(rng.random((n_users, n_items)) < 0.5)
    return (
        synth.Log(
            user, item.astype(np.int32), np.ones(len(user)), truth[user, item].astype(np.float32)
        ),
        truth,
    )


@pytest.mark.spark
def test_by_item_ratings_come_from_the_users_of_an_item(
    spark: SparkSession, tmp_path: Path
) -> None:
    """Hidden units are V r + mu of an item's ratings; a user's row solves its own ratings."""
    log, truth = rated()
    data = synth.dataset(spark, log, 2, {"training_item_bags": str(tmp_path / "rows")})
    settings = {
        "by": "item", "unobserved": 0.0, "half_life_days": None, "hidden_size": 16, "epochs": 60,
        "batch_size": 8, "learning_rate": 0.02, "weight_decay": 0.001,
    }  # fmt: skip
    options = FitOptions(in_process=True, train=Train(ranks=2))  # type: ignore[call-arg]
    model = AutoRec.from_dict(settings).fit(data, options)
    assert model.rates
    z = model.arrays()["hidden"].astype(float)
    assert z.shape == (40, 17)
    assert (z[:, 16] == 1).all()

    every = pa.array([[{"item_idx": i, "rating": 0.0} for i in range(40)]] * 60)
    asked = synth.ask(data).toArrow().sort_by("user_idx").append_column("asked", every)
    fields = [
        *schema.QUERIES.fields,
        StructField("asked", ArrayType(schema.columns(item_idx=schema.INT, rating=schema.FLOAT))),
    ]
    found = predicted(model, spark.createDataFrame(asked, StructType(fields))).toArrow()
    guess = found.sort_by([("user_idx", "ascending"), ("item_idx", "ascending")])
    scores = guess.column("predicted").to_numpy().reshape(60, 40)
    mine = np.zeros((60, 40), bool)
    mine[log.user_idx, log.item_idx] = True
    for user in (0, 7):
        y = z[mine[user]]
        w = np.linalg.solve(y.T @ y + 0.001 * 40 / 2 * np.eye(17), y.T @ truth[user, mine[user]])
        np.testing.assert_allclose(scores[user], z @ w, rtol=1e-3, atol=1e-3)

    def error(values: np.ndarray) -> float:
        return float(np.sqrt(((values - truth)[~mine] ** 2).mean()))

    means = np.array([truth[mine[:, i], i].mean() for i in range(40)])
    assert error(scores) < 0.5 * error(np.broadcast_to(means, (60, 40)))


def test_hidden_units_of_an_item_are_the_papers() -> None:
    net = make_net(AutoRecSettings(hidden_size=3, by="item", unobserved=0), 4, seed=1)
    v, mu = net.items_in.detach().numpy(), net.items_in_bias.detach().numpy()
    turned = Batch(
        {
            "item_idx": torch.tensor([7, 9, 9], dtype=torch.int32),
            "users": torch.tensor([[3, 8, -1], [5, 8, 13], [5, -1, -1]]),
            "weights": torch.tensor([[5.0, 1, 0], [3, 2, 4], [1, 0, 0]]),
        },
        torch.tensor([1.0, 1, 0]),  # the last one only fills the batch up
    )
    items, hidden = encoded(net, torch.from_numpy(VOCABULARY), turned)
    assert items.tolist() == [7, 9]
    r = np.array([[5, 0, 1, 0], [0, 3, 2, 4]])
    np.testing.assert_allclose(hidden.detach().numpy(), 1 / (1 + np.exp(-(r @ v + mu))), rtol=1e-5)


def test_by_item_wants_ratings() -> None:
    with pytest.raises(ConfigError, match="set unobserved to 0"):
        AutoRec.from_dict({"by": "item"})

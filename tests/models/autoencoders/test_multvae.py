"""Mult-VAE as a model: what it makes of a training set, and what it answers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import torch

from recspark import schema
from recspark.config import Features, Train
from recspark.data import training_rows
from recspark.data.blocks import Histories, QueryBlock, Ragged, micros
from recspark.data.dataset import Dataset
from recspark.data.interactions import before, queries
from recspark.errors import CatalogueTooLargeError, ModelError
from recspark.models import artifacts
from recspark.models.autoencoders.autoencoder import encode
from recspark.models.autoencoders.multvae import (
    LAYERS,
    MultVae,
    MultVaeModel,
    MultVaeSettings,
    make_net,
    row_loss,
    scoring_arrays,
)
from recspark.models.base import FitOptions
from recspark.models.neural import entries, log_shares
from recspark.models.registry import model_spec
from recspark.pipeline.training_sets import training_set
from recspark.train.feed import Batch
from recspark.train.launch import LocalLauncher

pytestmark = pytest.mark.torch
CUTOFF = datetime(2020, 3, 1, tzinfo=UTC)
VOCABULARY = torch.tensor([3, 5, 8, 13, 21])
SMALL = MultVaeSettings(hidden_size=6, latent_size=2, dropout=0.0, beta=1.0, anneal=0.5)


def batch() -> Batch:
    return Batch(
        {
            "items": torch.tensor(
                [[3, 8, -1, -1], [4, 21, 99, 3], [5, -1, -1, -1]], dtype=torch.int32
            ),
            "weights": torch.tensor([[2, 0.5, 0, 0], [9, 1, 9, 0], [3, 0, 0, 0]]),
        },
        torch.tensor([1.0, 1.0, 0.0]),
    )


def test_entries_leave_out_padding_strangers_and_zeros() -> None:
    rows, items, weights = entries(batch(), VOCABULARY)
    assert rows.tolist() == [0, 0, 1, 2]
    assert items.tolist() == [0, 2, 4, 1]
    assert weights.tolist() == [2.0, 0.5, 1.0, 3.0]


def test_log_shares_count_weighted_rows_of_all_ranks() -> None:
    def fn(comm: Any) -> list[float]:
        return log_shares(comm, iter([batch()]), VOCABULARY).exp().tolist()

    total = 2 * np.array([2, 0, 0.5, 0, 1])  # two ranks with the same rows; the last row weighs 0
    smoothed = total + 0.01 * total.mean()
    for result in LocalLauncher(2).run(fn):
        np.testing.assert_allclose(result.value, smoothed / smoothed.sum(), rtol=1e-6)


def test_loss_is_the_negative_elbo_with_beta_growing() -> None:
    net = make_net(SMALL, 5, seed=1)
    at = [row_loss(net, VOCABULARY, SMALL, batch(), None, done) for done in (0.0, 0.25, 0.5, 0.9)]
    kl = at[2] - at[0]
    assert (kl > 0).all()
    torch.testing.assert_close(at[1] - at[0], kl / 2)
    torch.testing.assert_close(at[3], at[2])
    # At beta 0 the loss is the target weights times the log softmax of what the encoder made of
    # ones.
    ones = SMALL.model_copy(update={"input_weights": "weights"})
    assert not row_loss(net, VOCABULARY, ones, batch(), None, 0.0)[0].equal(at[0][0])
    logits = net(torch.tensor([0, 0]), torch.tensor([0, 2]), torch.ones(2), 1)[0][0]
    want = -(torch.log_softmax(logits, 0) * torch.tensor([2, 0, 0.5, 0, 0])).sum()
    torch.testing.assert_close(at[0][0], want)


def test_encode_is_the_network_whatever_the_batch() -> None:
    settings = MultVaeSettings(hidden_size=32, latent_size=7)
    net = make_net(settings, 50, seed=2)
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 20, 700)
    start = np.concatenate([[0], np.cumsum(lengths)])
    items = np.concatenate([np.sort(rng.permutation(50)[:n]) for n in lengths]).astype(np.int32)
    weights = rng.random(len(items)).astype(np.float32)
    arrays = scoring_arrays(net)
    found = encode(start, items, weights, arrays, LAYERS, unit=True)
    with torch.no_grad():
        rows = torch.repeat_interleave(torch.arange(700), torch.from_numpy(lengths))
        logits, _, _ = net(rows, torch.from_numpy(items).long(), torch.from_numpy(weights), 700)
    np.testing.assert_allclose(
        found @ arrays["items_out"].T + arrays["items_out_bias"], logits.numpy(), atol=2e-6
    )
    for step in (1, 3, 257):
        parts = []
        for first in range(0, 700, step):
            some = start[first : first + step + 1]
            part = slice(some[0], some[-1])
            parts.append(
                encode(some - some[0], items[part], weights[part], arrays, LAYERS, unit=True)
            )
        np.testing.assert_array_equal(np.concatenate(parts), found)


def test_the_query_is_the_decayed_history() -> None:
    settings = MultVaeSettings(hidden_size=6, latent_size=2, half_life_days=10)
    items = np.array([3, 5, 8], np.int32)
    arrays = scoring_arrays(make_net(settings, 3, 1))
    model = MultVaeModel(settings, CUTOFF, items, arrays)
    day = timedelta(days=1)
    at = [micros(CUTOFF - 20 * day), micros(CUTOFF - 10 * day), micros(CUTOFF - 10 * day)]
    history = Histories(
        np.array([0, 3, 3, 4]),
        np.array([5, 5, 8, 77], np.int32),
        np.array([*at, at[0]]),
        np.ones(4, np.float32),
    )
    none = Ragged(np.zeros(4, np.int64), np.zeros(0, np.int32))
    block = QueryBlock(np.arange(3), history, none)
    scores = model.scorer().score(block)
    assert scores.known.tolist() == [True, False, False]
    want = encode(
        np.array([0, 2]),
        np.array([1, 2], np.int32),
        np.float32([0.75, 0.5]),
        arrays,
        LAYERS,
        unit=True,
    )
    np.testing.assert_array_equal(
        scores.approximate(slice(0, 1)), want @ arrays["items_out"].T + arrays["items_out_bias"]
    )


def event(item: int, days: float) -> tuple[Any, ...]:
    return (item, CUTOFF - timedelta(days=days), "purchase", 1.0, 1.0, None, None)


N_GROUPS, PER_GROUP = 4, 10


@pytest.fixture(scope="module")
def data(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users of four groups; each acted on six of its group's ten items, none of another's."""
    from recspark.tables.catalog import TableCatalog

    rng = np.random.default_rng(0)
    rows = []
    for user in range(200):
        group = user % N_GROUPS
        chosen = rng.permutation(PER_GROUP)[:6] + 100 * (group + 1)
        history = [event(int(item), 20 - n) for n, item in enumerate(chosen)]
        rows.append((user, history, sorted(int(i) for i in chosen), 0))
    histories = spark.createDataFrame(rows, schema.HISTORIES)
    catalog = TableCatalog(spark, str(tmp_path_factory.mktemp("planted")))
    features = Features(max_training_items=8)  # type: ignore[call-arg]
    bags = training_rows.training_bags(histories, CUTOFF, features, 4)
    slice_ = {"cutoff": CUTOFF}
    version = catalog.replace_slice("training_bags", bags, slice_, n_files=4).version
    known = [(100 * (g + 1) + i,) for g in range(N_GROUPS) for i in range(PER_GROUP)]
    unused = spark.createDataFrame([], "user_idx bigint")
    return Dataset(
        cutoff=CUTOFF,
        histories=before(histories, CUTOFF),
        items=spark.createDataFrame(known, "item_idx int"),
        user_features=unused,
        item_features=unused,
        training={"training_bags": training_set(catalog, "training_bags", version, slice_)},
    )


PLANTED = MultVae(
    MultVaeSettings(hidden_size=32, latent_size=8, epochs=40, batch_size=50, learning_rate=0.02)
)


def options(**changes: Any) -> FitOptions:
    return FitOptions(train=Train(ranks=2, timeout_s=60), in_process=True, **changes)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def fitted(data: Dataset) -> MultVaeModel:
    return PLANTED.fit(data, options())


@pytest.mark.spark
def test_each_group_gets_the_rest_of_its_own_items(data: Dataset, fitted: MultVaeModel) -> None:
    asked = queries(data.histories, "novel")
    rows = fitted.recommend(asked, 4).collect()
    assert len(rows) == 200 * 4
    own = [row.item_idx // 100 - 1 == row.user_idx % N_GROUPS for row in rows]
    assert np.mean(own) == 1.0


@pytest.mark.spark
def test_a_seed_decides_everything_and_weights_survive_the_store(
    data: Dataset, fitted: MultVaeModel, tmp_path: Any
) -> None:
    told: list[str] = []
    # With a folder for checkpoints the weights come back through it.
    again = PLANTED.fit(data, options(scratch=str(tmp_path / "scratch"), progress=told.append))
    assert sum(line.startswith("epoch ") for line in told) == 40
    for name, array in fitted.arrays().items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(again.arrays()[name], array)
    artifacts.save(fitted, str(tmp_path / "artifact"))
    loaded = artifacts.load(str(tmp_path / "artifact"), model_spec("multvae"))
    asked = queries(data.histories.where("user_idx < 5"), "novel")
    want = sorted(map(tuple, fitted.recommend(asked, 3).collect()))
    assert sorted(map(tuple, loaded.recommend(asked, 3).collect())) == want


@pytest.mark.spark
def test_what_it_cannot_fit_is_refused_before_any_training(data: Dataset) -> None:
    from dataclasses import replace

    with pytest.raises(CatalogueTooLargeError, match="40 items before the cutoff, max_items is 39"):
        MultVae(MultVaeSettings(max_items=39)).fit(data, options())
    with pytest.raises(ModelError, match=r"has the training sets \[\], and one is read"):
        PLANTED.fit(replace(data, training={}), options())

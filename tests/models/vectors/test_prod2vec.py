"""Prod2vec and Meta-Prod2Vec: what counts as a neighbour, decay, clusters and metadata."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark.data.blocks import Array, parse_histories
from recspark.data.dataset import Dataset
from recspark.errors import ConfigError
from recspark.models.base import FitOptions
from recspark.models.vectors.meta_prod2vec import MetaProd2Vec
from recspark.models.vectors.prod2vec import (
    Prod2Vec,
    Prod2VecModel,
    Prod2VecSettings,
    clusters,
    sentences_by_bag,
    similar_items_of_clusters,
    steps_between_clusters,
)
from recspark.models.vectors.sentences import bags_of_users
from recspark.models.vectors.similar_items import lists_of
from recspark.testing import synth

SHORT = {
    "embedding_size": 16,
    "epochs": 8,
    "learning_rate": 0.1,
    "n_rotations": 1,
    "n_blocks": 1,
    "subsample": None,
}


def alternating(n_users: int = 300, n_groups: int = 6, n_days: int = 6) -> synth.Log:
    """Return receipts that alternate: two items of a group, next day two of its partner, and so on.

    A group has four items, of which a receipt holds two. Group 2p and group 2p + 1 are partners.
    """
    rng = np.random.default_rng(3)
    events = []
    for user in range(n_users):
        group = int(rng.integers(n_groups))
        for day in range(n_days, 0, -1):
            drawn_items = rng.choice(4, 2, replace=False)
            events += [(user, 4 * group + int(item), float(day)) for item in drawn_items]
            group ^= 1
    return synth.log(events)


def share_of_partners(model: Prod2VecModel) -> float:
    """Return the share of items to which their partners' items are nearer than those of their group.

    Nearer in the mean over the four (three) items.
    """
    arrays = model.arrays()
    n = len(model.items)
    similarity = np.zeros((n, n))
    for j in range(n):
        entries = slice(arrays["start"][j], arrays["start"][j + 1])
        similarity[j, arrays["neighbours"][entries]] = arrays["similarities"][entries]
    group = np.asarray(model.items) // 4
    hits = []
    for j in range(n):
        of_group = (group == group[j]) & (np.arange(n) != j)
        hits.append(similarity[j, group == group[j] ^ 1].mean() > similarity[j, of_group].mean())
    return float(np.mean(hits))


@pytest.fixture(scope="module")
def receipts(spark: SparkSession) -> Iterator[Dataset]:
    data = synth.dataset(spark, alternating())
    data.histories.persist()
    yield data
    data.histories.unpersist()


def fit(data: Dataset, **settings: object) -> Prod2VecModel:
    # Window 1: the receipt after the next is of the own group again.
    values = {**SHORT, "bag": "order", "window": 1, "similarity": "probability", **settings}
    model = Prod2Vec.from_dict(values).fit(data, FitOptions())
    assert isinstance(model, Prod2VecModel)
    return model


@pytest.mark.spark
def test_neighbouring_receipts_predict_each_other_and_one_receipt_does_not(
    receipts: Dataset,
) -> None:
    assert share_of_partners(fit(receipts)) >= 0.95
    # Single events in time order: in windows of 1, half of the neighbours are of the own receipt.
    assert share_of_partners(fit(receipts, bag="item")) < 0.5


@pytest.mark.spark
def test_items_of_one_receipt_are_neighbours_only_within_bag(spark: SparkSession) -> None:
    """Here every receipt is of a random group, so only the receipt itself tells anything."""
    rng = np.random.default_rng(4)
    events = [
        (user, 4 * int(group) + int(item), float(day))
        for user in range(300)
        for day, group in enumerate(rng.integers(0, 6, 4), start=1)
        for item in rng.choice(4, 2, replace=False)
    ]
    data = synth.dataset(spark, synth.log(events))
    assert 1 - share_of_partners(fit(data, within_bag=True)) >= 0.95
    assert 1 - share_of_partners(fit(data)) < 0.7


@pytest.mark.spark
def test_steps_between_planted_clusters_are_counted(receipts: Dataset) -> None:
    """Users step from each group to its partner, and never to another group."""
    items = receipts.vocabulary()
    steps = steps_between_clusters(sentences_by_bag(receipts.histories, "order"), items, items // 4)
    assert (steps.argmax(axis=1) == np.arange(6) ^ 1).all()
    assert steps.sum() == 300 * 5  # five steps between a user's six receipts
    assert np.count_nonzero(steps) == 6
    # By single events, the step within a receipt stays in the group.
    by_event = steps_between_clusters(
        sentences_by_bag(receipts.histories, "item"), items, items // 4
    )
    assert by_event.sum() == 300 * 11
    assert np.trace(by_event) == 300 * 6


@pytest.mark.spark
def test_with_clusters_only_items_of_likely_next_clusters_are_neighbours(receipts: Dataset) -> None:
    model = fit(receipts, n_clusters=6, n_next_clusters=1, similarity="cosine", window=2, epochs=12)
    arrays = model.arrays()
    cluster = clusters(arrays["vectors"], 6, FitOptions().seed)
    of_item = np.repeat(np.arange(len(model.items)), np.diff(arrays["start"]))
    pairs = set(zip(cluster[of_item].tolist(), cluster[arrays["neighbours"]].tolist()))
    assert len({first for first, _ in pairs}) == len(pairs)  # one next cluster for each cluster


def test_similar_items_of_clusters_by_hand() -> None:
    """Items 0, 1 are of cluster 0, items 2, 3, 4 of cluster 1; users step from 0 to 1, not back."""
    vectors = np.array([[1, 0], [0, 2], [1, 1], [3, 0], [-1, 0]], np.float32)
    steps = np.array([[0.0, 5.0], [0.0, 2.0]])
    settings = Prod2VecSettings(n_clusters=2, n_next_clusters=2, n_neighbours=2)
    lists = similar_items_of_clusters(vectors, np.array([0, 0, 1, 1, 1]), steps, settings)
    assert lists["start"].tolist() == [0, 2, 3, 5, 7, 8]
    # Item 1 has the cosines .71, 0 and 0; a cosine that is not above 0 is left out.
    assert lists["neighbours"].tolist() == [2, 3, 2, 2, 3, 2, 3, 4]
    assert np.allclose(lists["similarities"], [0.5**0.5, 1, 0.5**0.5, 1, 0.5**0.5, 0.5**0.5, 1, 1])


def test_few_vectors_are_clusters_of_their_own() -> None:
    assert clusters(np.eye(3, dtype=np.float32), 5, 1).tolist() == [0, 1, 2]
    rng = np.random.default_rng(1)
    planted = np.repeat(np.eye(4), 10, axis=0) + rng.normal(scale=0.05, size=(40, 4))
    labels = clusters(planted.astype(np.float32), 4, 1)
    assert [len(set(labels[10 * c : 10 * c + 10].tolist())) for c in range(4)] == [1] * 4
    assert len(set(labels.tolist())) == 4


def scores(model: Prod2VecModel, events: list[tuple[int, float]]) -> Array:
    """Return the scores of one user with (item, age in days) events."""
    users, column = synth.history_column(synth.log([(1, item, age) for item, age in events]))
    block = synth.QueryBlock(
        users, parse_histories(column), synth.Ragged(np.array([0, 0]), np.zeros(0, np.int32))
    )
    n = len(model.items)
    return model.scorer().score(block).exact(np.zeros(n, np.int64), np.arange(n))


def hand_made(half_life_days: float | None) -> Prod2VecModel:
    """Item 5 is similar to item 2 by .9, and item 11 to item 3 by .8."""
    lists = lists_of(np.array([0, 1]), np.array([2, 3]), np.array([0.9, 0.8]), 4)
    return Prod2VecModel(
        Prod2VecSettings(half_life_days=half_life_days),
        synth.CUTOFF,
        np.array([2, 3, 5, 11], np.int32),
        {"vectors": np.zeros((4, 2), np.float32), **lists},
    )


def test_decay_turns_the_order() -> None:
    """Item 2 was bought 60 days ago and item 3 yesterday; 0.9 per day is a half-life of 6.58 days."""
    events = [(2, 60.0), (3, 1.0)]
    decayed = scores(hand_made(6.58), events)
    assert np.allclose(decayed[[2, 3]], [0.9 * 0.9**60, 0.8 * 0.9], rtol=2e-3)
    assert np.allclose(scores(hand_made(None), events)[[2, 3]], [0.9, 0.8])


def test_bags_are_orders_in_the_order_of_their_first_event() -> None:
    log = synth.log([(4, 10, 3.0), (4, 11, 2.9), (4, 12, 2.0), (4, 10, 1.0), (9, 20, 1.0)])
    users, column = synth.history_column(log)
    batch = pa.RecordBatch.from_arrays(
        [pa.array(users, pa.int64()), column], names=["user_idx", "history"]
    )
    rows = bags_of_users(batch, "order").to_pylist()
    assert [row["items"] for row in rows] == [[10, 11, 12, 10], [20]]
    assert [row["bags"] for row in rows] == [[0, 0, 1, 2], [0]]
    assert len({row["sentence_id"] for row in rows}) == 2


def test_within_bag_needs_bags() -> None:
    with pytest.raises(ConfigError, match="within_bag"):
        Prod2Vec.from_dict({"within_bag": True})


@pytest.mark.spark
def test_metadata_place_an_item_beside_those_of_its_category(spark: SparkSession) -> None:
    """Users stay in one category. Rare items were bought once, by a user of all categories.

    With metadata they are likely after items of their own category all the same. With the weight 0,
    the vectors are those of prod2vec, bit for bit.
    """
    rng = np.random.default_rng(5)
    events = []
    for user in range(240):
        # `synth.items` gives item i the category i % 4.
        drawn_items = rng.choice(8, 6, replace=False)
        events += [
            (user, 4 * int(item) + user % 4, float(day))
            for day, item in enumerate(drawn_items, start=1)
        ]
    for item in range(32, 40):
        events += [(1000 + item, 4 * int(rng.integers(8)) + c, 1.0 + c) for c in range(4)]
        events.append((1000 + item, item, 2.5))
    data = synth.dataset(spark, synth.log(events))
    values = {**SHORT, "window": 4, "similarity": "probability"}

    def of_category(model: Prod2VecModel) -> float:
        """Return the share of the frequent items whose likeliest rare item is of their category."""
        arrays = model.arrays()
        hits = []
        for j in range(32):
            entries = slice(arrays["start"][j], arrays["start"][j + 1])
            item, similarity = arrays["neighbours"][entries], arrays["similarities"][entries]
            is_rare = item >= 32
            hits.append(item[is_rare][np.argmax(similarity[is_rare])] % 4 == j % 4)
        return float(np.mean(hits))

    with_metadata = MetaProd2Vec.from_dict({**values, "metadata_weight": 1.0})
    assert of_category(with_metadata.fit(data, FitOptions())) >= 0.95
    plain = Prod2Vec.from_dict(values).fit(data, FitOptions())
    assert of_category(plain) < 0.5
    without = MetaProd2Vec.from_dict({**values, "metadata_weight": 0.0}).fit(data, FitOptions())
    for name, array in plain.arrays().items():
        assert np.array_equal(array, without.arrays()[name]), name

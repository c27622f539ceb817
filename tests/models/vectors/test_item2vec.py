"""Item2vec: what a sentence is, and how a user's recent items become a vector."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark import schema
from recspark.data.blocks import Array, Histories, micros, parse_queries
from recspark.errors import ConfigError
from recspark.models.base import FitOptions
from recspark.models.vectors.item2vec import (
    Item2Vec,
    Item2VecModel,
    Item2VecSettings,
    engine_settings,
)
from recspark.models.vectors.scoring import mean_vectors, newest, priors, unit_rows
from recspark.models.vectors.sentences import cut_histories
from recspark.testing import synth

EVENTS = [  # user, item, session, order
    (4, 10, "s1", None), (4, 11, "s1", "o1"), (4, 12, "s2", "o2"), (4, 13, "s2", "o1"),
    (4, 14, "s3", None), (4, 15, "s3", None),
    (9, 20, "s1", "o1"), (9, 21, "s9", "o1"),
]  # fmt: skip


def histories(users: list[int]) -> pa.RecordBatch:
    """Return `user_idx, history` of EVENTS; a user without events has a null history."""
    rows = [
        [
            {"item_idx": i, "event_at": None, "weight": 1.0, "session_id": s, "order_id": o}
            for u, i, s, o in EVENTS
            if u == user
        ]
        or None
        for user in users
    ]
    kind = pa.list_(
        pa.struct(
            [
                ("item_idx", pa.int32()),
                ("event_at", pa.timestamp("us", "UTC")),
                ("weight", pa.float32()),
                ("session_id", pa.string()),
                ("order_id", pa.string()),
            ]
        )
    )
    events = pa.array(rows, kind)
    filled = events.flatten()
    at = pa.array(np.arange(len(filled)), pa.timestamp("us", "UTC"))
    names = [f.name for f in filled.type]
    fields = [at if name == "event_at" else filled.field(name) for name in names]
    lengths = np.array([len(row or []) for row in rows])
    start = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    column = pa.ListArray.from_arrays(start, pa.StructArray.from_arrays(fields, names=names))
    return pa.RecordBatch.from_arrays(
        [pa.array(users, pa.int64()), column], names=["user_idx", "history"]
    )


def cut(users: list[int], sentence: str) -> dict[int, list[int]]:
    (batch,) = cut_histories([histories(users)], sentence)
    ids = batch.column("sentence_id").to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, batch.column("items").to_pylist(), strict=True))


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("session", [[10, 11], [12, 13], [14, 15], [20], [21]]),
        ("order", [[10], [11, 13], [12], [14, 15], [20, 21]]),
        ("history", [[10, 11, 12, 13, 14, 15], [20, 21]]),
    ],
)
def test_sentences_do_not_cross_users_and_ids_do_not_depend_on_the_batch(
    sentence: str, expected: list[list[int]]
) -> None:
    together = cut([4, 7, 9], sentence)
    assert list(together.values()) == expected
    assert {**cut([9], sentence), **cut([7], sentence), **cut([4], sentence)} == together


def test_the_mean_is_weighted_and_a_row_depends_on_itself_alone() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((30, 6)).astype(np.float32)
    lengths = np.array([2, 0, 5, 1])
    start = np.concatenate([[0], np.cumsum(lengths)])
    items = rng.integers(0, 30, 8).astype(np.int32)
    weights = rng.uniform(0.1, 2, 8).astype(np.float32)
    got = mean_vectors(start, items, weights, vectors)
    for row, n in enumerate(lengths):
        mine = slice(start[row], start[row + 1])
        expected = np.average(vectors[items[mine]], axis=0, weights=weights[mine]) if n else 0
        assert np.allclose(got[row], expected, atol=1e-6)
        alone = mean_vectors(np.array([0, n]), items[mine], weights[mine], vectors)
        assert np.array_equal(alone[0], got[row])


def test_unit_rows() -> None:
    got = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    assert np.allclose(got, [[0.6, 0.8], [0, 0]])


def test_priors_give_back_what_noise_and_subsampling_took() -> None:
    """Four uses of five are of item 0: thinned to half, it must weigh twice; item 2 was never used."""
    settings = Item2VecSettings(ns_exponent=-1.0, subsample=0.1715729 * 0.8)
    got = priors(np.array([4, 1, 0]), settings)
    keep = np.sqrt(0.1715729) + 0.1715729
    noise = np.array([0.25, 1]) / 1.25
    first = np.log(noise[0] / keep)
    assert np.allclose(got[0], first, atol=1e-5)
    ratio = 0.1715729 * 0.8 / 0.2
    assert np.allclose(got[1], np.log(noise[1] / min(1, np.sqrt(ratio) + ratio)), atol=1e-5)
    assert got[2] == -np.inf


def test_only_the_newest_events_count() -> None:
    history = Histories(
        np.array([0, 3, 3, 4]), np.array([1, 2, 3, 9]), np.arange(4), np.ones(4, np.float32)
    )
    got = newest(history, 2)
    assert got.start.tolist() == [0, 2, 2, 3]
    assert got.item_idx.tolist() == [2, 3, 9]
    assert got.event_at.tolist() == [1, 2, 3]


def model(score: str, **settings: object) -> Item2VecModel:
    rng = np.random.default_rng(2)
    vectors, outputs = rng.standard_normal((2, 5, 3)).astype(np.float32)
    made = Item2VecSettings(score=score, half_life_days=10.0, **settings)  # type: ignore[arg-type]
    items = np.array([2, 3, 5, 7, 11], np.int32)
    bias = rng.standard_normal(5).astype(np.float32)
    return Item2VecModel(made, synth.CUTOFF, items, vectors, outputs, bias)


def scores(m: Item2VecModel, events: list[tuple[int, float]]) -> Array:
    """Return the float64 scores of one user with (item, age in days) events, newest last."""
    day = timedelta(days=1)
    history = [
        {
            "item_idx": item, "event_at": synth.CUTOFF - age * day, "event_type": "", "weight": 1.0,
            "value": 1.0, "session_id": "", "order_id": "",
        }
        for item, age in events
    ]  # fmt: skip
    _, column = synth.history_column(synth.log([(1, 1, 1.0)]))
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array([1], pa.int64()),
            pa.array([history], column.type),
            pa.array([[]], pa.list_(pa.int32())),
        ],
        names=schema.QUERIES.names,
    )
    block = parse_queries(batch)
    assert block.history.event_at[-1] <= micros(synth.CUTOFF)
    return m.scorer().score(block).exact(np.zeros(5, np.int64), np.arange(5))


def test_scores_are_those_of_the_decayed_mean() -> None:
    """Item 3 is 20 days old, item 11 ten: weights 1/4 and 1/2; item 99 has no vector."""
    events = [(3, 20.0), (11, 10.0), (99, 0.0)]
    m = model("likelihood")
    mean = (0.25 * m.vectors[1] + 0.5 * m.vectors[4]) / 0.75
    assert np.allclose(scores(m, events), m.outputs @ mean + m.bias, atol=1e-5)

    m = model("cosine")
    unit = m.vectors / np.linalg.norm(m.vectors, axis=1, keepdims=True)
    mean = 0.25 * unit[1] + 0.5 * unit[4]
    assert np.allclose(scores(m, events), unit @ mean / np.linalg.norm(mean), atol=1e-5)


def test_recent_items_are_counted_in_events() -> None:
    m = model("likelihood", n_recent=1)
    assert np.allclose(
        scores(m, [(3, 20.0), (11, 10.0)]), m.outputs @ m.vectors[4] + m.bias, atol=1e-5
    )


def test_likelihood_need_negative_sampling() -> None:
    with pytest.raises(ConfigError, match="score: cosine"):
        Item2Vec.from_dict({"loss": "hierarchical", "score": "likelihood"})
    Item2Vec.from_dict({"loss": "hierarchical", "score": "cosine"})


def test_every_setting_of_the_engine_is_set() -> None:
    settings = Item2VecSettings(
        architecture="cbow", loss="hierarchical", score="cosine", window=3, shrink_window=True,
        embedding_size=7, n_negatives=3, ns_exponent=-0.5, subsample=0.1, min_count=2, max_length=9,
        epochs=4, learning_rate=0.5, min_learning_rate=0.2, n_blocks=5, n_rotations=6,
    )  # fmt: skip
    made, default = engine_settings(settings, 8), engine_settings(Item2VecSettings(), 0)
    assert made.size == 7
    assert made == replace(
        made, **{k: v for k, v in settings.model_dump().items() if hasattr(made, k)}
    )
    same = {k for k, v in vars(made).items() if vars(default)[k] == v}
    assert same == {"within_bag"}  # a sentence of item2vec has no bags


@pytest.mark.spark
@pytest.mark.parametrize("loss", ["negative", "hierarchical"])
def test_an_item_that_never_shared_a_sentence_is_left_out(spark: SparkSession, loss: str) -> None:
    log = synth.log([(1, 1, 5.0), (1, 2, 5.0), (2, 1, 3.0), (2, 2, 3.0), (2, 9, 1.0), (3, 9, 2.0)])
    settings = Item2VecSettings(
        loss=loss, score="cosine", epochs=1, n_rotations=1, n_blocks=1, embedding_size=4
    )  # type: ignore[arg-type]
    data = synth.dataset(spark, log)
    fitted = Item2Vec(settings).fit(data, FitOptions())
    assert fitted.items.tolist() == [1, 2]
    lists = fitted.recommend(synth.ask(data, "repeat"), 5).toArrow().to_pylist()
    assert {row["user_idx"] for row in lists} == {1, 2}
    assert {row["item_idx"] for row in lists} == {1, 2}

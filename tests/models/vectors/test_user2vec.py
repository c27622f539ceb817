"""User2vec: a user's vector says what the user likes, depends on the user alone, and changes no item."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark.data.blocks import Array, QueryBlock, Ragged, parse_histories
from recspark.engines import paragraphs as engine
from recspark.engines.word2vec_cells import deal
from recspark.errors import ConfigError, EmptyDataError
from recspark.models.base import FitOptions
from recspark.models.scoring import topk
from recspark.models.vectors.scoring import unit_rows
from recspark.models.vectors.user2vec import (
    User2Vec,
    User2VecModel,
    User2VecScorer,
    User2VecSettings,
    documents,
)
from recspark.testing import synth

SHORT: dict[str, Any] = {"embedding_size": 16, "epochs": 10, "learning_rate": 0.1, "n_blocks": 1}


def settings(**changed: Any) -> User2VecSettings:
    return User2VecSettings(**{**SHORT, **changed})


def block_of(log: synth.Log) -> QueryBlock:
    """Return the queries of all users of `log`, ascending, with nothing masked."""
    users, column = synth.history_column(log)
    nothing = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    return QueryBlock(users, parse_histories(column), nothing)


def fitted(log: synth.Log, folder: Path, chosen: User2VecSettings) -> User2VecModel:
    """Return what `User2Vec.fit` returns, of a run in this process and in one block."""
    block = block_of(log)
    items = np.unique(log.item_idx)
    start, local = documents(block.history, items, chosen.max_length)
    rows = pa.RecordBatch.from_arrays(
        [
            pa.array(block.user_idx),
            pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(local)),
        ],
        schema=engine.DOCUMENTS_ARROW,
    )
    uses = np.bincount(local, minlength=len(items))
    file = engine.write_documents([rows], str(folder), 0, 0)
    run = chosen.of_engine(3)
    plan = engine.Plan(run, str(folder), uses, deal(uses.astype(np.float64), 1), (file,))
    words = engine.learn(plan, lambda moment: [engine.step(plan, moment, 0, 0)], lambda _moment: [])
    arrays = {
        "inputs": words.inputs, "outputs": words.outputs, "uses": uses,
        "seed": np.array([3], np.int64),
    }  # fmt: skip
    return User2VecModel(chosen, synth.CUTOFF, items, arrays)


def lists(model: User2VecModel, block: QueryBlock, k: int = 20) -> Array:
    """Return the items of each user's list of k, (n_users, k)."""
    answer = topk.answer(block, model.items, model.scorer(), k)
    return answer.column("item_idx").to_numpy().reshape(len(block), k)


# --- what is planted ----------------------------------------------------------------------------


def two_groups(seed: int, first_user: int, n_users: int = 120) -> synth.Log:
    """Return events of users of two groups: group 0 acts on items 0 to 59, group 1 on 60 to 119."""
    rng = np.random.default_rng(seed)
    return synth.log(
        (first_user + user, 60 * (user % 2) + int(item), 30.0 - day)
        for user in range(n_users)
        for day, item in enumerate(rng.integers(0, 60, 20))
    )


@pytest.mark.parametrize(
    ("mode", "nearest"), [("dm", "outputs"), ("dm", "inputs"), ("dbow", "outputs")]
)
def test_the_items_nearest_to_a_user_are_of_the_users_group(
    tmp_path: Path, mode: str, nearest: str
) -> None:
    """Of users in training, and of new ones; the catalogues of the groups are disjoint.

    With a wider window, the items around tell the group as well, and the user need not.
    """
    model = fitted(two_groups(1, 0), tmp_path, settings(mode=mode, nearest=nearest, window=1))
    for asked in (two_groups(1, 0), two_groups(2, 1000)):
        block = block_of(asked)
        group = lists(model, block) // 60
        assert (group == (block.user_idx % 2)[:, None]).mean() >= 0.95


N_KINDS, N_VARIANTS = 12, 2


def variants(seed: int, first_user: int, n_users: int = 200) -> synth.Log:
    """Return events of users of two groups, who buy printers and their ink in turn.

    Printer k is item k, for everybody. Its ink is item 12 + k for group 0 and 24 + k for group 1. The
    printer beside an ink tells which ink it is but for the group, and only the user tells the group:
    the items around an item of either group are the same.
    """
    rng = np.random.default_rng(seed)
    events = []
    for user in range(n_users):
        for turn, kind in enumerate(rng.integers(0, N_KINDS, 12)):
            age = 60.0 - 2 * turn
            events.append((first_user + user, int(kind), age))
            ink = N_KINDS * (1 + user % N_VARIANTS) + int(kind)
            events.append((first_user + user, ink, age - 1))
    return synth.log(events)


def test_the_mean_of_the_items_vectors_is_no_vector_of_the_user(tmp_path: Path) -> None:
    """With windows of 1, an ink's vector beside a printer need not tell its group, but the user's must.

    So the mean of the items' vectors does not find the group, where the user's vector does.
    """
    model = fitted(variants(1, 0), tmp_path, settings(mode="dm", window=1, popularity=0.0))
    block = block_of(variants(2, 1000))
    scorer = model.scorer()
    users, _ = scorer.vectors(block.history)
    start, local = documents(block.history, model.items, 500)
    inputs = model.arrays()["inputs"]
    means = np.stack([inputs[local[a:b]].mean(axis=0) for a, b in itertools.pairwise(start)])
    inks = model.arrays()["outputs"][N_KINDS:]  # those of group 0, then those of group 1

    def share_of_group(vectors: Array) -> float:
        """Return the share of the inks of the own group among the 12 nearest inks."""
        nearest = np.argsort(-vectors @ inks.T, axis=1, kind="stable")[:, :N_KINDS]
        return float((nearest // N_KINDS == (block.user_idx % 2)[:, None]).mean())

    assert share_of_group(users) >= 0.95
    assert share_of_group(means) < 0.8


# --- what a user's vector depends on -------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dm", "dbow"])
def test_a_user_is_solved_alone_and_items_stay(tmp_path: Path, mode: str) -> None:
    """The item arrays may not be written, and have the same bits afterwards."""
    model = fitted(two_groups(1, 0, 30), tmp_path, settings(mode=mode, epochs=2))
    before = {name: array.copy() for name, array in model.arrays().items()}
    for array in model.arrays().values():
        array.setflags(write=False)
    block = block_of(two_groups(2, 1000, 30))
    together, _ = model.scorer().vectors(block.history)
    for row in (0, 7, 29):
        alone, _ = model.scorer().vectors(block.part(slice(row, row + 1)).history)
        np.testing.assert_array_equal(alone[0], together[row])
    named_otherwise = replace(block, user_idx=block.user_idx[::-1].copy())
    again = model.scorer().score(named_otherwise)
    assert isinstance(again, topk.DotScores)
    np.testing.assert_array_equal(again.users, together)
    for name, array in model.arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_documents_are_the_newest_events_in_time_order() -> None:
    """A repeated item stays, an unknown item and an event that weighs nothing go."""
    log = synth.log(
        [(1, 5, 9.0), (1, 7, 8.0), (1, 99, 7.0), (1, 5, 6.0), (2, 99, 1.0), (3, 7, 1.0)]
    )
    log = log + synth.Log(
        np.array([1, 1]), np.array([7, 7], np.int32), np.array([5.0, 4.0]),
        np.array([0.0, np.nan], np.float32),
    )  # fmt: skip
    items = np.array([5, 7], np.int32)
    start, local = documents(block_of(log).history, items, 500)
    assert start.tolist() == [0, 3, 3, 4]
    assert local.tolist() == [0, 1, 0, 1]
    start, local = documents(block_of(log).history, items, 2)
    assert start.tolist() == [0, 2, 2, 3]
    assert local.tolist() == [1, 0, 1]


def test_no_user_is_lost_to_subsampling(tmp_path: Path) -> None:
    """An item of half of all uses is hardly ever read in training; a user of only it has a vector."""
    log = two_groups(1, 0, 60)
    often = synth.log((user, 200, float(age)) for user in range(60) for age in range(31, 51))
    model = fitted(log + often, tmp_path, settings(mode="dbow", subsample=1e-5, epochs=3))
    asked = block_of(synth.log([(9, 200, 1.0)]))
    vectors, is_known = model.scorer().vectors(asked.history)
    assert is_known.all()
    assert np.abs(vectors).max() > 0


def test_a_user_of_unknown_items_gets_no_list(tmp_path: Path) -> None:
    model = fitted(two_groups(1, 0, 20), tmp_path, settings(epochs=1))
    answer = topk.answer(block_of(synth.log([(9, 500, 1.0)])), model.items, model.scorer(), 5)
    assert answer.num_rows == 0


def test_only_the_recent_events_make_up_a_users_vector(tmp_path: Path) -> None:
    """A user who has gone over to the other group is of that one; one of older events is not."""
    model = fitted(two_groups(1, 0), tmp_path, settings(mode="dbow", n_recent=10))
    rng = np.random.default_rng(4)
    old = [(9, int(item), 40.0 + day) for day, item in enumerate(rng.integers(0, 60, 40))]
    new = [(9, 60 + int(item), 1.0 + day) for day, item in enumerate(rng.integers(0, 60, 10))]
    block = block_of(synth.log(old + new))
    assert (lists(model, block) >= 60).mean() >= 0.95
    arrays = model.arrays()
    all_events = User2VecModel(settings(mode="dbow"), synth.CUTOFF, model.items, arrays)
    assert (lists(all_events, block) < 60).mean() >= 0.95


# --- what a score is -----------------------------------------------------------------------------


def test_scores_by_hand(tmp_path: Path) -> None:
    """outputs: product plus popularity times the log of the share; inputs: the cosine."""
    model = fitted(two_groups(1, 0, 20), tmp_path, settings(epochs=2, popularity=0.5))
    arrays = model.arrays()
    block = block_of(two_groups(2, 1000, 3))
    users, _ = model.scorer().vectors(block.history)
    n = len(model.items)
    rows, items = np.repeat(np.arange(3), n), np.tile(np.arange(n), 3)
    share = arrays["uses"] / arrays["uses"].sum()  # ns_exponent is 1
    expected = users.astype(np.float64) @ arrays["outputs"].T + 0.5 * np.log(share)
    got = model.scorer().score(block).exact(rows, items).reshape(3, n)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    by_inputs = User2VecModel(
        settings(epochs=2, nearest="inputs"), synth.CUTOFF, model.items, arrays
    )
    cosines = unit_rows(users) @ unit_rows(arrays["inputs"][:-1]).T
    got = by_inputs.scorer().score(block).exact(rows, items).reshape(3, n)
    np.testing.assert_allclose(got, cosines, atol=1e-5)


def test_scoring_loses_no_event_to_subsampling_but_scores_give_its_share_back(
    tmp_path: Path,
) -> None:
    model = fitted(two_groups(1, 0, 20), tmp_path, settings(epochs=1, subsample=1e-4))
    scorer = model.scorer()
    assert isinstance(scorer, User2VecScorer)
    assert scorer.engine.subsample is None
    assert scorer.bias is not None
    plain = User2VecModel(settings(epochs=1), synth.CUTOFF, model.items, model.arrays()).scorer()
    assert plain.bias is not None
    assert (scorer.bias > plain.bias).all()  # all items are above the share, so all lose uses


def test_inputs_need_dm() -> None:
    with pytest.raises(ConfigError, match="nearest: inputs needs input vectors"):
        User2Vec.from_dict({"mode": "dbow", "nearest": "inputs"})


# --- on Spark ------------------------------------------------------------------------------------


@pytest.mark.spark
def test_the_order_of_rows_and_their_partitions_change_nothing(spark: SparkSession) -> None:
    log = two_groups(1, 0, 40)
    algorithm = User2Vec.from_dict({**SHORT, "epochs": 2, "n_blocks": 2})
    models = []
    for rows, n_partitions in ((log, 1), (log.only(np.arange(len(log.age))[::-1]), 3)):
        models.append(algorithm.fit(synth.dataset(spark, rows, n_partitions), FitOptions()))
    for name, array in models[0].arrays().items():
        np.testing.assert_array_equal(array, models[1].arrays()[name])


@pytest.mark.spark
def test_training_reads_a_share_of_the_users_and_all_get_lists(spark: SparkSession) -> None:
    log = two_groups(1, 0, 200)
    data = synth.dataset(spark, log)
    algorithm = User2Vec.from_dict({**SHORT, "mode": "dbow", "share_of_users": 0.3})
    model = algorithm.fit(data, FitOptions())
    assert 0.2 * len(log.age) < model.arrays()["uses"].sum() < 0.4 * len(log.age)
    block = block_of(log)
    group = lists(model, block) // 60
    assert (group == (block.user_idx % 2)[:, None]).mean() >= 0.95
    with pytest.raises(EmptyDataError, match="share_of_users = 1e-07"):
        User2Vec.from_dict({"share_of_users": 1e-7}).fit(data, FitOptions())

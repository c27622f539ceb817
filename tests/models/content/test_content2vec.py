"""Content2vec: what each merger learns from planted pairs, matched negatives, items without events."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyspark.sql import SparkSession

from recspark import schema
from recspark.config import Train
from recspark.data.blocks import Array, QueryBlock, Ragged, parse_histories
from recspark.data.dataset import Dataset
from recspark.data.training_pairs import (
    PairRules,
    drawn_pairs,
    in_order_of_popularity,
    write_training_pairs,
)
from recspark.errors import CatalogueTooLargeError, ConfigError, EmptyDataError, ModelError
from recspark.models.base import FitOptions, Needed, RetrieverModel, Settings
from recspark.models.content.content2vec import Content2Vec, Content2VecModel
from recspark.models.content.content2vec_modules import Modules
from recspark.models.content.content2vec_settings import Content2VecSettings
from recspark.models.content.content2vec_training import (
    Inputs,
    ItemTable,
    pair_logits,
    train_rank,
)
from recspark.models.content.pair_scores import PairScores, PairVectors
from recspark.models.factors.als import AlsModel, AlsSettings
from recspark.models.items.popular import PopularModel, PopularSettings
from recspark.models.neural import Job, net_arrays
from recspark.nets.content2vec import PairNet
from recspark.testing import synth
from recspark.testing.case import PlantedEncoder
from recspark.train.feed import plan_shards
from recspark.train.launch import LocalLauncher
from recspark.train.loop import LoopOptions, load_weights

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]
MERGERS = ("linear", "crossfeat", "residual")
RNG = np.random.default_rng(8)


def auc(score: Array, label: Array) -> float:
    """The probability that a positive pair scores above a negative one; ties count half."""
    values = np.unique(score)
    below = np.searchsorted(values, score)
    n_negative = np.bincount(below[label == 0], minlength=len(values))
    beaten = np.cumsum(n_negative) - n_negative / 2
    return float(beaten[below[label == 1]].mean() / n_negative.sum())


# --- the network: planted pairs ------------------------------------------------------------------


def two_modules(n: int, rng: np.random.Generator) -> tuple[Modules, Array, Array]:
    """Items with a picture and a text of two classes each; the vectors have other sides too."""
    classes = rng.integers(0, 2, (2, n))
    parts = []
    for of_items in classes:
        part = np.eye(2)[of_items] + rng.normal(0, 0.15, (n, 2))
        part = np.concatenate([part, rng.normal(0, 0.15, (n, 2))], axis=1)
        parts.append(part / np.linalg.norm(part, axis=1, keepdims=True))
    modules = Modules(
        np.arange(n, dtype=np.int32),
        np.concatenate(parts, axis=1).astype(np.float32),
        np.ones((n, 2), bool),
        (4, 4),
        ("pictures", "texts"),
        (False, False),
    )
    return modules, classes[0], classes[1]


def planted_label(rule: str, picture: Array, text: Array, a: Array, b: Array) -> Array:
    same_picture, same_text = picture[a] == picture[b], text[a] == text[b]
    return np.asarray(same_picture ^ same_text if rule == "xor" else same_text).astype(np.float32)


def trained(folder: Path, rule: str, merger: str, **more: Any) -> tuple[float, PairNet]:
    """Train on pairs of 120 items; return the AUC on pairs of 60 others, and the network."""
    rng = np.random.default_rng(3)
    modules, picture, text = two_modules(180, rng)
    a, b = rng.integers(0, 120, (2, 4000))
    rows = pa.table(
        {
            "item_a": pa.array(a, pa.int32()),
            "item_b": pa.array(b, pa.int32()),
            "label": pa.array(planted_label(rule, picture, text, a, b)),
            "held_out": pa.array(np.zeros(len(a)), pa.int32()),
        }
    )
    settings = Content2VecSettings(
        **{
            "merger": merger,
            "epochs": 25,
            "batch_size": 100,
            "learning_rate": 0.01,
            "hidden_size": 32,
            "validation": 0.0,
            **more,
        }
    )
    training = synth.write_files(rows, str(folder / "rows"), "training_pairs", 2)
    inputs = Inputs.write(modules, *modules.mean_and_scale(1), str(folder))
    loop = LoopOptions(settings.epochs, settings.learning_rate, settings.weight_decay, seed=1)
    job = Job(settings, modules.items, plan_shards(training, 1), None, loop)
    [result] = LocalLauncher(1).run(partial(train_rank, inputs), job)
    net = inputs.make_net(settings, 1)
    load_weights(net, result.value)
    vectors = PairVectors.of(modules.vectors, modules.has_vector, modules.sizes, net_arrays(net))
    a, b = (side.ravel() for side in np.meshgrid(np.arange(120, 180), np.arange(120, 180)))
    a, b = a[a < b], b[a < b]
    return auc(vectors.logits(a, b), planted_label(rule, picture, text, a, b)), net


def test_an_xor_of_two_modules_needs_more_than_a_sum(tmp_path: Path) -> None:
    """A pair is positive where just one of picture and text is of the same class."""
    found = {merger: trained(tmp_path / merger, "xor", merger)[0] for merger in MERGERS}
    assert 0.4 < found["linear"] < 0.6, found
    assert found["crossfeat"] >= 0.95, found
    assert found["residual"] >= 0.95, found


@pytest.mark.parametrize("merger", ["linear", "crossfeat"])
def test_a_module_that_tells_nothing_gets_no_weight(merger: str, tmp_path: Path) -> None:
    found, net = trained(tmp_path, "text", merger)
    pictures, texts = net.weights.tolist()
    assert found >= 0.95
    assert texts > 1
    assert abs(pictures) < 0.1 * texts
    if merger == "crossfeat":
        assert abs(net.products.tolist()[0]) < 0.1 * texts


def test_a_mean_of_both_orders_has_no_order() -> None:
    net = some_net("residual")
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    has_a, has_b = torch.tensor([1.0, 0.0]).expand(5, 2), torch.ones(5, 2)
    torch.testing.assert_close(net(a, b, has_a, has_b), net(b, a, has_b, has_a))


def test_hidden_items_have_no_vector_by_a_retriever() -> None:
    """In training a share of the items, drawn; in validation those that are held out."""
    vectors = np.ones((3, 5), np.float32)
    has = np.array([[1, 1], [1, 0], [1, 1]], bool)
    inputs = Inputs("", "", (2, 3), (True, False), np.zeros(2), np.ones(2))
    table = ItemTable(vectors, has, inputs, torch.tensor([4, 6, 9]))
    given, has_given = table.rows(torch.tensor([9, 6, 4]), torch.tensor([True, False, False]))
    assert has_given.tolist() == [[0, 1], [1, 0], [1, 1]]
    assert given.tolist() == [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1] * 5]

    seen: list[Any] = []

    def net(*inputs: torch.Tensor) -> torch.Tensor:
        seen.append([has[:, 0].tolist() for has in inputs[2:]])
        return torch.zeros(4)

    tensors = {
        "item_a": torch.tensor([4, 4, 4, 4]),
        "item_b": torch.tensor([9, 9, 9, 9]),
        "held_out": torch.tensor([0, 1, 2, 3]),
    }
    pair_logits(net, table, tensors, 0.5, None)  # type: ignore[arg-type]
    assert seen.pop() == [[1, 0, 1, 0], [1, 1, 0, 0]]
    tensors = {name: values.repeat(500) for name, values in tensors.items()}
    pair_logits(net, table, tensors, 0.3, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    for has_of_side in seen.pop():
        assert 0.25 < 1 - np.mean(has_of_side) < 0.35


# --- scores of pairs: the form of the kernel against the network ---------------------------------


def some_net(merger: Any) -> PairNet:
    """Sizes 3 and 4, all parameters drawn."""
    generator = torch.Generator().manual_seed(2)
    net = PairNet((3, 4), merger, 6, generator)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    net.mean.copy_(torch.tensor([0.1, -0.2]))
    net.scale.copy_(torch.tensor([0.5, 0.25]))
    return net


def some_items(n: int) -> tuple[Array, Array]:
    """Vectors (n, 7) and whether there are any (n, 2); every third item lacks one."""
    has = np.ones((n, 2), bool)
    has[::3, 0], has[1::3, 1] = False, False
    parts = [RNG.normal(size=(n, size)) for size in (3, 4)]
    parts = [p / np.linalg.norm(p, axis=1, keepdims=True) for p in parts]
    vectors = np.concatenate([p * has[:, m, None] for m, p in enumerate(parts)], axis=1)
    return vectors.astype(np.float32), has


@pytest.mark.parametrize("merger", MERGERS)
def test_scores_of_pairs_are_those_of_the_network(merger: str) -> None:
    """Pair by pair, in float64, and all items at once, within the bound of the error."""
    net, (vectors, has) = some_net(merger), some_items(40)
    of_items = PairVectors.of(vectors, has, (3, 4), net_arrays(net))
    i, j = np.divmod(np.arange(1600), 40)
    tensors = (torch.from_numpy(x) for x in (vectors[i], vectors[j]))
    flags = (torch.from_numpy(has[k].astype(np.float32)) for k in (i, j))
    with torch.no_grad():
        expected = net(*tensors, *flags).numpy()
    exact = of_items.logits(i, j)
    np.testing.assert_allclose(exact, expected, rtol=1e-4, atol=1e-5)
    scores = PairScores(np.arange(40), of_items)
    for rows in (slice(0, 40), slice(3, 21)):
        approximate = scores.approximate(rows).astype(np.float64)
        off = np.abs(approximate - exact.reshape(40, 40)[rows]).max(axis=1)
        assert (off <= scores.error(rows)).all()
        assert scores.error(rows).max() < 1e-3
    np.testing.assert_array_equal(scores.exact(i, j), exact)
    assert of_items.is_linear == (merger == "linear")
    if merger == "linear":
        own, others = of_items.linear_vectors
        dots = np.einsum("pd,pd->p", own[i], others[j], dtype=np.float64)
        np.testing.assert_allclose(dots + of_items.constant, exact, rtol=1e-4, atol=1e-5)


# --- pairs: counts, lift, negatives --------------------------------------------------------------


def test_negatives_are_as_popular_as_positives() -> None:
    """By popularity alone nobody tells them apart; drawn from all items, popularity would tell."""
    rng = np.random.default_rng(2)
    users = np.sort((10_000 / np.arange(1, 1001) ** 0.8).astype(np.int64))
    share = users / users.sum()
    a, b = rng.choice(1000, (2, 4000), p=share)
    a, b = np.minimum(a, b)[a != b], np.maximum(a, b)[a != b]
    key = rng.integers(-(2**62), 2**62, len(a))
    order = in_order_of_popularity(users, 1)
    popularity = np.log(users)

    def told(negative: tuple[Array, Array]) -> float:
        score = np.concatenate([popularity[x] + popularity[y] for x, y in ((a, b), negative)])
        return auc(score, np.repeat([1, 0], [len(a), len(negative[0])]))

    matched = drawn_pairs(a, b, key, order, 3, 10)
    assert (matched[0] < matched[1]).all()
    assert len(matched[0]) > 2.9 * len(a)
    assert abs(told(matched) - 0.5) < 0.02
    assert told(drawn_pairs(a, b, key, order, 3, 999)) > 0.65
    again = drawn_pairs(a[::-1], b[::-1], key[::-1], order, 3, 10)
    assert set(zip(*again, strict=True)) == set(zip(*matched, strict=True))


def test_the_window_of_an_item_at_the_end_is_as_wide() -> None:
    order = np.array([4, 1, 0, 3, 2])
    for item, others in ((1, {4, 0}), (4, {1, 0}), (2, {0, 3})):
        a, b = np.full(400, item), np.full(400, item)
        drawn = drawn_pairs(a, b, np.arange(400), order, 1, 2)
        assert {x if y == item else y for x, y in zip(*drawn, strict=True)} == others


RULES = PairRules(2, 1.2, 100, 4, 10, 0.0, 1)


@pytest.mark.spark
def test_pairs_by_hand(spark: SparkSession, tmp_path: Path) -> None:
    """Item 10 has 3 of 5 users, 11 has 3, both have 2: lift 2 * 5 / 9 = 1.1. 12 and 13: 2 * 5 / 4."""
    of_users = {0: [10, 11], 1: [10, 11, 10], 2: [10, 12, 13], 3: [11, 12, 13], 4: [14, 15]}
    log = synth.log(
        [(u, item, 9.0 - n) for u, items in of_users.items() for n, item in enumerate(items)]
    )
    histories = synth.dataset(spark, log).histories
    items = np.array([10, 11, 12, 13, 14], np.int32)

    def rows(rules: PairRules) -> set[tuple[int, int, float]]:
        folder = str(tmp_path / str(len([*tmp_path.iterdir()])))
        written = write_training_pairs(histories, items, rules, folder, 2)
        files = [uri for uri, _ in written.training.files]
        table = spark.read.parquet(*files).toArrow().to_pylist()
        return {(row["item_a"], row["item_b"], row["label"]) for row in table}

    found = rows(RULES)
    assert {row for row in found if row[2] == 1} == {(12, 13, 1.0)}
    negative = {row[:2] for row in found if row[2] == 0}
    assert negative
    assert negative.isdisjoint({(12, 13)})
    assert all(12 in pair or 13 in pair for pair in negative)
    # Of the two newest, 10 and 11 have 2 users each: lift 2 * 5 / 4.
    newest = rows(replace(RULES, max_history=2))
    assert {row for row in newest if row[2] == 1} == {(10, 11, 1.0), (12, 13, 1.0)}
    with pytest.raises(EmptyDataError, match="no two items have 3 users or more in common"):
        rows(replace(RULES, min_users=3))


@pytest.mark.spark
def test_a_pair_of_a_held_out_item_is_no_training_row(spark: SparkSession, tmp_path: Path) -> None:
    log, _ = synth.checkerboard(40, 20)
    histories = synth.dataset(spark, log).histories
    rules = replace(RULES, min_users=5, validation=0.3)
    items = np.arange(20, dtype=np.int32)
    written = write_training_pairs(histories, items, rules, str(tmp_path / "a"), 2)
    assert written.held_out is not None
    tables = [
        spark.read.parquet(*[uri for uri, n in part.files if n]).toArrow()
        for part in (written.training, written.held_out)
    ]
    sets = []
    for table in tables:
        a, b, bits = (table.column(n).to_numpy() for n in ("item_a", "item_b", "held_out"))
        sets.append({*a[bits & 1 > 0].tolist(), *b[bits & 2 > 0].tolist()})
        # Positive are all pairs of one colour, and no negative is one of them.
        assert set(table.column("label").to_pylist()) == {0.0, 1.0}
        assert np.array_equal((a + b) % 2 == 0, table.column("label").to_numpy() == 1)
    assert sets[0] == set()
    trained_on = {*tables[0].column("item_a").to_pylist(), *tables[0].column("item_b").to_pylist()}
    assert sets[1]
    assert sets[1].isdisjoint(trained_on)
    other = synth.dataset(spark, log.only(RNG.permutation(len(log.age))), 5).histories
    again = write_training_pairs(other, items, rules, str(tmp_path / "b"), 2)
    assert [n for _, n in again.training.files] == [n for _, n in written.training.files]


# --- the model: items without events -------------------------------------------------------------

N_WARM, N_COLD, N_GROUPS = 60, 16, 4
GROUP = np.arange(N_WARM + N_COLD) % N_GROUPS
OPTIONS = FitOptions(train=Train(ranks=1), in_process=True)  # type: ignore[call-arg]
SHORT: dict[str, Any] = {
    "min_users": 5, "min_lift": 1.5, "epochs": 12, "batch_size": 64, "learning_rate": 0.02,
    "hidden_size": 16, "n_matched": 30, "n_neighbours": 10,
}  # fmt: skip


def vectors_frame(spark: SparkSession, item_idx: Array, vectors: Array) -> Any:
    rows = pa.table(
        {
            "item_idx": pa.array(item_idx, pa.int32()),
            "vector": pa.array(list(vectors.astype(np.float32)), pa.list_(pa.float32())),
        }
    )
    return spark.createDataFrame(rows, schema.VECTORS)


@pytest.fixture(scope="module")
def data(spark: SparkSession) -> Dataset:
    """Users of a group act on its items. Words tell the group, pictures nothing; every fifth item has
    no picture, and the last 16 items have no event.
    """
    rng = np.random.default_rng(4)
    log = synth.log(
        [
            (user, item, float(rng.uniform(1, 60)))
            for user in range(120)
            for item in rng.choice(
                np.flatnonzero(GROUP[:N_WARM] == user % N_GROUPS), 8, replace=False
            )
        ]
    )
    n = N_WARM + N_COLD
    words = np.eye(N_GROUPS)[GROUP] + 0.2 * rng.normal(size=(n, N_GROUPS))
    pictures, has_picture = rng.normal(size=(n, 6)), np.arange(n) % 5 > 0
    return replace(
        synth.dataset(spark, log),
        vectors={
            "words": vectors_frame(spark, np.arange(n), words),
            "pictures": vectors_frame(spark, np.flatnonzero(has_picture), pictures[has_picture]),
        },
    )


def needs(n_factors: int = N_WARM, wild: float = 0.0, only_events: bool = False) -> Needed:
    """A factor model that knows the groups, and two encoders. Factors beyond N_WARM are `wild`."""
    rng = np.random.default_rng(6)
    factors = (np.eye(N_GROUPS)[GROUP] + 0.3 * rng.normal(size=(len(GROUP), N_GROUPS)))[:n_factors]
    factors[N_WARM:] = wild * rng.normal(size=(len(factors[N_WARM:]), N_GROUPS))
    items = np.arange(n_factors, dtype=np.int32)
    als = AlsModel(AlsSettings(), synth.CUTOFF, items, factors.astype(np.float32))
    encoders = {name: PlantedEncoder(Settings(), synth.CUTOFF) for name in ("words", "pictures")}
    return {"als": als} if only_events else {"als": als, **encoders}


def fitted(data: Dataset, needed: Needed, **more: Any) -> Content2VecModel:
    algorithm = Content2Vec.from_dict({**SHORT, **more})
    algorithm.check_needs({name: model.kind for name, model in needed.items()})
    return algorithm.fit(data, OPTIONS, needed)


def scores(model: RetrieverModel, items_of_users: list[list[int]]) -> Array:
    """Of users with these items, of the same age, for every item of the model; -inf = not listed."""
    log = synth.log([(u, item, 5.0) for u, items in enumerate(items_of_users) for item in items])
    users, column = synth.history_column(log)
    nothing_seen = Ragged(np.zeros(len(users) + 1, np.int64), np.zeros(0, np.int32))
    scored = model.scorer().score(QueryBlock(users, parse_histories(column), nothing_seen))
    rows, items = np.divmod(np.arange(len(users) * len(model.items)), len(model.items))
    return np.asarray(scored.exact(rows, items)).reshape(len(users), -1)


@pytest.mark.spark
@pytest.mark.parametrize("merger", MERGERS)
def test_items_without_events_are_placed_by_their_content(data: Dataset, merger: str) -> None:
    """They have no vector by the factor model. A user of a group gets the four of the own group; what
    the factor model says of them, where it says anything, changes no bit.
    """
    model = fitted(data, needs(), merger=merger)
    assert model.items.tolist() == [*range(N_WARM + N_COLD)]
    has_vector = model.arrays()["has_vector"]
    assert has_vector[:N_WARM, 0].all()
    assert not has_vector[N_WARM:, 0].any()
    users = [[group, group + 4, group + 8] for group in range(N_GROUPS)]
    cold = scores(model, users)[:, N_WARM:]
    best = np.argsort(-cold, axis=1)[:, : N_COLD // N_GROUPS]
    assert (GROUP[N_WARM:][best] == np.arange(N_GROUPS)[:, None]).mean() >= 0.9
    leaky = fitted(data, needs(N_WARM + N_COLD, wild=5.0), merger=merger)
    for name, array in model.arrays().items():
        np.testing.assert_array_equal(leaky.arrays()[name], array, err_msg=name)


@pytest.mark.spark
def test_lists_are_the_sums_of_probabilities(data: Dataset) -> None:
    """Each item keeps its ten likeliest items with events; only cold items; the two newest events. An
    event as old as the half-life counts half.
    """
    more = {"items": "cold", "n_recent": 2, "half_life_days": 5.0}
    model = fitted(data, needs(), merger="crossfeat", **more)
    n = len(model.items)
    i, j = np.divmod(np.arange(n * n), n)
    probability = model.pair_probabilities(model.items[i], model.items[j]).reshape(n, n)
    kept = np.zeros((n, n))
    for item in range(N_WARM, n):
        best = np.argsort(-probability[item, :N_WARM], kind="stable")[:10]
        kept[item, best] = probability[item, best]
    got = scores(model, [[0, 1, 2], [7]])
    expected = np.stack([kept[:, 1] + kept[:, 2], kept[:, 7]]) / 2
    is_listed = np.isfinite(got)
    assert is_listed.any()
    assert not is_listed[:, :N_WARM].any()
    np.testing.assert_allclose(got[is_listed], expected[is_listed], rtol=1e-5)
    assert (expected[~is_listed] == 0).all()


@pytest.mark.spark
def test_a_linear_merger_can_sum_over_all_items(data: Dataset) -> None:
    model = fitted(data, needs(), merger="linear", n_neighbours=None)
    n = len(model.items)
    i, j = np.divmod(np.arange(n * n), n)
    logits = model.pair_vectors.logits(i, j).reshape(n, n)
    got = scores(model, [[3, 9], [12]])
    np.testing.assert_allclose(got[0], (logits[3] + logits[9]) / 2, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got[1], logits[12], rtol=1e-3, atol=1e-4)


@pytest.mark.spark
def test_what_cannot_be_learnt_from_is_named(data: Dataset) -> None:
    for kinds in ({}, {"als": "retriever", "blend": "ranker"}):
        with pytest.raises(ConfigError, match=r"joins the item vectors of .*needs = \["):
            Content2Vec.from_dict({}).check_needs(kinds)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="n_neighbours: null needs merger: linear"):
        Content2Vec.from_dict({"n_neighbours": None})
    popular = PopularModel(
        PopularSettings(), synth.CUTOFF, np.arange(3, dtype=np.int32), np.ones(3, np.float32)
    )
    with pytest.raises(ModelError, match="content2vec: the needed model 'popular' has no item"):
        fitted(data, {"popular": popular})
    nothing = replace(data, vectors={name: v.limit(0) for name, v in data.vectors.items()})
    words = {"words": PlantedEncoder(Settings(), synth.CUTOFF)}
    with pytest.raises(EmptyDataError, match=r"0 items with an event before 2020-07-01 have a vec"):
        fitted(nothing, words)
    with pytest.raises(EmptyDataError, match="no two items have 1000 users or more in common"):
        fitted(data, words, min_users=1000)
    with pytest.raises(CatalogueTooLargeError, match="76 items before the cutoff, max_items is 9"):
        fitted(data, words, max_items=9)

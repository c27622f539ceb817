"""Rankers that are networks of fields: what each must learn that others cannot, and its equations.

The contract of rankers checks each of them whole (tests/contract).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from pyspark.sql import SparkSession

from recspark import schema
from recspark.config import Train
from recspark.data import pair_features
from recspark.data.blocks import Array
from recspark.data.dataset import Examples
from recspark.data.feature_encoding import CATEGORY_LEVELS, Encoding, parse_encoded
from recspark.data.training_fields import (
    examples_of_table,
    quantiles_of,
    write_training_rows,
)
from recspark.errors import ConfigError, EmptyDataError, ModelError
from recspark.models.base import FitOptions, PairBlock
from recspark.models.rankers.fields import (
    FieldsAlgorithm,
    FieldsRankerModel,
    Inputs,
    fields_batch,
    scoring_arrays,
)
from recspark.models.rankers.pnn import Pnn
from recspark.models.rankers.wide_deep import (
    DEFAULT_CROSSES,
    WideDeep,
    WideDeepModel,
    cross_row,
)
from recspark.models.rankers.youtube_rank import YoutubeRank
from recspark.nets.pnn import decomposed_products, inner_products, outer_product
from recspark.train.feed import Batch
from recspark.train.optimisers import Ftrl

OPTIONS = FitOptions(train=Train(ranks=1), in_process=True)  # type: ignore[call-arg]
ALGORITHMS = (WideDeep, Pnn, YoutubeRank)
SMALL: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [16], "dropout": 0.0, "patience": 0}


def auc(label: Array, score: Array) -> float:
    """Return the share of pairs of a positive and a negative row that are in order."""
    order = np.argsort(score, kind="stable")
    _, index, counts = np.unique(score[order], return_inverse=True, return_counts=True)
    rank = np.empty(len(score))
    rank[order] = (np.cumsum(counts) - (counts - 1) / 2)[index]
    n_positive, is_positive = (label > 0).sum(), label > 0
    n_negative = len(label) - n_positive
    return float(
        (rank[is_positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    )


def table(spark: SparkSession, columns: dict[str, Any]) -> Any:
    """Return a frame; texts are fields."""
    rows = list(zip(*(np.asarray(values).tolist() for values in columns.values())))
    return spark.createDataFrame(rows, list(columns))


def texts(letter: str, values: Array) -> list[str]:
    return [f"{letter}{value:03}" for value in values]


def scores(model: FieldsRankerModel, examples: Examples) -> tuple[Array, Array]:
    """Return label and score of each row."""
    [batch] = examples.rows.toArrow().combine_chunks().to_batches()
    numbers, fields = parse_encoded(batch, model.encoding)
    nobody = np.zeros(len(numbers), np.int64)
    block = PairBlock(nobody, nobody.astype(np.int32), numbers, fields)
    return batch.column("label").to_numpy(), model.pair_scorer().score(block)


# ------------------------------------------------------------------------- what each must learn


@pytest.mark.spark
def test_wide_learns_exceptions_and_deep_the_rule(spark: SparkSession) -> None:
    """A user of a group likes the items of its genre, but for some pairs that follow no rule."""
    rng = np.random.default_rng(1)
    user, item = (index.ravel() for index in np.indices((60, 60)))
    group, genre = user % 3, item % 3
    is_exception = (group == genre) & (rng.random(len(user)) < 0.08)
    label = ((group == genre) & ~is_exception).astype(float)
    is_seen = rng.random(len(user)) < 0.7
    frame = {
        "label": label, "user": texts("u", user), "item": texts("i", item),
        "group": texts("g", group), "genre": texts("c", genre),
    }  # fmt: skip

    def part(mask: Array) -> Any:
        return table(spark, {name: np.asarray(v)[mask] for name, v in frame.items()})

    train = examples_of_table(part(is_seen))
    settings = {
        **SMALL, "embedding_size": 2, "hidden_sizes": [8], "epochs": 30, "batch_size": 128,
        "learning_rate": 0.02, "validation": 0.0, "cross_rows": 1 << 16,
    }  # fmt: skip
    wide_settings = {"crosses": [["user", "item"]], "wide_rate": 1.0, "wide_l1": 0.5}
    wide = WideDeep.from_dict({**settings, **wide_settings}).learn(train, OPTIONS)
    # Without crosses, and with weights of single features that the penalty keeps at 0.
    deep = WideDeep.from_dict({**settings, "crosses": [], "wide_l1": 1e6}).learn(train, OPTIONS)
    assert isinstance(deep, WideDeepModel)
    assert deep.zero_share == 1

    exceptions = examples_of_table(part(is_seen & is_exception), encoding=train.encoding)
    assert (scores(wide, exceptions)[1] < 0.5).mean() >= 0.95
    assert (scores(deep, exceptions)[1] < 0.5).mean() <= 0.3
    unseen = examples_of_table(part(~is_seen & ~is_exception), encoding=train.encoding)
    for model in (wide, deep):
        unseen_label, unseen_score = scores(model, unseen)
        assert ((unseen_score > 0.5) == (unseen_label > 0)).mean() >= 0.95


@pytest.mark.spark
def test_products_find_what_is_equal(spark: SparkSession) -> None:
    """A row is positive if the parent of the item's category is the one that the user prefers."""
    rng = np.random.default_rng(2)
    n_parents = 40

    def draw(n: int) -> Any:
        parent = rng.integers(n_parents, size=n)
        is_positive = rng.random(n) < 0.5
        other = (parent + rng.integers(1, n_parents, size=n)) % n_parents
        category = 3 * parent + rng.integers(3, size=n)
        return table(
            spark,
            {
                "label": is_positive.astype(float),
                "prefers": texts("p", np.where(is_positive, parent, other)),
                "category": [[f"p{p:03}", f"c{c:03}"] for p, c in zip(parent, category)],
            },
        )

    train = examples_of_table(draw(5000))
    assert [*train.encoding.fields][1:] == ["category_1", "category_2", "category_3"]
    test = examples_of_table(draw(4000), encoding=train.encoding)
    # Four units: a larger tower finds equal parents without any product.
    settings = {
        **SMALL, "embedding_size": 10, "hidden_sizes": [4], "epochs": 20, "batch_size": 128,
        "learning_rate": 0.02, "embedding_reg": 1e-3, "validation": 0.0,
    }  # fmt: skip

    def misordered(algorithm: type[FieldsAlgorithm[Any]], **others: Any) -> float:
        return 1 - auc(
            *scores(algorithm.from_dict({**settings, **others}).learn(train, OPTIONS), test)
        )

    by_product = {
        "concat": misordered(Pnn, layer="concat"),
        "decomposed": misordered(Pnn, layer="decomposed"),
        "both": misordered(Pnn, layer="concat", product="both"),
    }
    assert max(by_product.values()) <= 0.02, by_product
    tower_alone = misordered(WideDeep, crosses=[], wide_l1=1e6)
    assert tower_alone > 2 * by_product["decomposed"], (tower_alone, by_product)


@pytest.mark.spark
def test_odds_are_what_a_row_is_expected_to_bring(spark: SparkSession) -> None:
    """Two items are watched by 1% and 2% of those who see them, for 1,000 and 100 seconds."""
    n = 4000
    item = np.arange(2 * n) % 2
    is_watched = np.arange(2 * n) // 2 % 100 < np.where(item == 0, 1, 2)
    label = np.where(is_watched, np.where(item == 0, 1000.0, 100.0), 0.0)
    train = examples_of_table(table(spark, {"label": label, "item": texts("i", item)}))
    settings = {
        **SMALL, "epochs": 40, "batch_size": 400, "learning_rate": 0.01, "validation": 0.0,
    }  # fmt: skip
    model = YoutubeRank.from_dict(settings).learn(train, OPTIONS)
    one_each = table(spark, {"label": [0.0, 0.0], "item": ["i000", "i001"]})
    odds = scores(model, examples_of_table(one_each, encoding=train.encoding))[1]
    np.testing.assert_allclose(odds, [10, 2], rtol=0.1)
    plain = YoutubeRank.from_dict({**settings, "weigh_by": "one"}).learn(train, OPTIONS)
    odds = scores(plain, examples_of_table(one_each, encoding=train.encoding))[1]
    np.testing.assert_allclose(odds, [1 / 99, 2 / 98], rtol=0.1)


@pytest.mark.spark
def test_training_rows_follow_from_the_values_alone(spark: SparkSession, tmp_path: Any) -> None:
    """Also where rows are equal; files are alike in size, and a second call writes nothing."""
    rng = np.random.default_rng(6)
    number = np.where(np.arange(400) < 300, 1.0, rng.random(400))  # 300 rows are equal
    frame = table(
        spark,
        {"label": (np.arange(400) >= 300) * 1.0, "x": number, "a": texts("v", 0 * np.arange(400))},
    )
    examples = examples_of_table(frame)
    quantiles = quantiles_of(examples, 400, 11, seed=1)
    mirrored = examples_of_table(frame.orderBy("x").repartition(3), encoding=examples.encoding)
    assert np.array_equal(quantiles_of(mirrored, 400, 11, seed=1).values, quantiles.values)
    written = [
        write_training_rows(rows, quantiles, f"{tmp_path}/{n}", 4)
        for n, rows in enumerate((examples, mirrored))
    ]
    first, second = ([pq.read_table(uri) for uri, _ in rows.files] for rows in written)
    assert first == second
    assert sum(len(rows) for rows in first) == 400
    assert min(len(rows) for rows in first) > 60
    assert write_training_rows(mirrored, quantiles, f"{tmp_path}/0", 4) == written[0]


@pytest.mark.spark
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_numbers_fields_and_what_is_missing(
    spark: SparkSession, algorithm: type[FieldsAlgorithm[Any]]
) -> None:
    """A number counts above its middle, or where it is missing, or else with one colour."""
    rng = np.random.default_rng(3)
    n = 3000
    number = np.exp(3 * rng.normal(size=n))  # the middle is 1, the largest about 10,000
    is_missing = rng.random(n) < 0.2
    colour = rng.integers(3, size=n)
    label = np.where(is_missing, colour == 0, number > 1).astype(float)
    frame = spark.createDataFrame(
        [
            (float(y), None if gone else float(x), f"c{c}")
            for y, x, gone, c in zip(label, number, is_missing, colour)
        ],
        "label float, number double, colour string",
    )
    train = examples_of_table(frame)
    assert train.encoding == Encoding(("number",), {"colour": ("c0", "c1", "c2")})
    settings = {**SMALL, "epochs": 20, "batch_size": 64, "learning_rate": 0.02}
    lines: list[str] = []
    options = FitOptions(train=Train(ranks=2), in_process=True, progress=lines.append)  # type: ignore[call-arg]
    model = algorithm.from_dict(settings).learn(train, options)
    assert auc(*scores(model, train)) >= 0.97
    assert any("weights are read by the training rows" in line for line in lines) == (
        algorithm is WideDeep
    )


# ------------------------------------------------------------------------------------- equations


def test_decomposed_products_are_those_of_the_matrix_of_rank_one() -> None:
    embedded, theta = torch.randn(7, 5, 4), torch.randn(6, 5)  # (B, F, D), (H1, F)
    products = torch.einsum("bid,bjd->bij", embedded, embedded)
    weights = torch.einsum("ni,nj->nij", theta, theta)  # W_p^n
    full = torch.einsum("nij,bij->bn", weights, products)
    torch.testing.assert_close(decomposed_products(embedded, theta), full, atol=1e-5, rtol=1e-5)


def test_the_outer_product_is_the_double_sum() -> None:
    embedded = torch.randn(7, 5, 4)
    double_sum = sum(
        embedded[:, i, :, None] * embedded[:, j, None, :] for i in range(5) for j in range(5)
    )
    assert isinstance(double_sum, torch.Tensor)
    torch.testing.assert_close(outer_product(embedded), double_sum.flatten(1))


def test_inner_products_of_each_pair_once() -> None:
    embedded = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert inner_products(embedded).tolist() == [[11, 17, 39]]


def test_the_wide_step_is_the_closed_form_of_its_paper() -> None:
    """Ten steps by hand: FTRL of the sums of a step's rows, though the loop gives their means."""
    settings = {"batch_size": 64, "wide_rate": 0.3, "wide_l1": 1.5, "wide_l2": 0.2}
    ftrl = WideDeep.from_dict(settings).optimisers()["wide"]
    assert isinstance(ftrl, Ftrl)
    sums = [2.0, -1.0, 0.5, 4.0, 0.25, -3.0, 1.0, 0.0, -0.5, 2.5]
    weights = torch.zeros(1, 1, dtype=torch.float64)
    slots = ftrl.start(weights)
    by_hand, w, z, n = [], 0.0, 0.0, 0.0
    for step, g in enumerate(sums):
        ftrl.move_rows(step, 10, weights, torch.full_like(weights, g / 64), slots)
        sigma = (np.sqrt(n + g * g) - np.sqrt(n)) / 0.3
        z, n = z + g - sigma * w, n + g * g
        w = 0.0 if abs(z) <= 1.5 else -(z - np.sign(z) * 1.5) / ((1 + np.sqrt(n)) / 0.3 + 0.2)
        by_hand.append(w)
        assert float(weights) == pytest.approx(w, rel=1e-12)
        assert (float(weights) == 0) == (abs(z) <= 1.5)
    assert by_hand[0] == pytest.approx(-0.5 / (3 / 0.3 + 0.2))
    assert by_hand[1] == 0.0 or abs(z) > 0


def test_a_weighted_row_is_the_logistic_loss_times_its_label() -> None:
    logits, labels = torch.tensor([0.3, 0.3, -2.0]), torch.tensor([2.5, 0.0, 1.0])
    losses = YoutubeRank.from_dict({}).row_loss(logits, labels)
    p = 1 / (1 + np.exp(-logits.numpy()))
    expected = [-2.5 * np.log(p[0]), -np.log(1 - p[1]), -np.log(p[2])]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_a_cross_has_one_row_in_training_and_in_scoring() -> None:
    codes = np.random.default_rng(4).integers(0, 1000, (5000, 3))
    for cross in ((0, 1), (2, 0), (0, 1, 2)):
        rows = cross_row(codes, cross, 1 << 30)
        assert np.array_equal(rows, cross_row(torch.from_numpy(codes), cross, 1 << 30).numpy())
        assert rows.min() >= 0
        n_different = len(np.unique(codes[:, cross], axis=0))
        assert len(np.unique(rows)) >= n_different - 1
    # The same codes of other features are another cross.
    same = codes[:, [0, 0, 0]]
    assert (cross_row(same, (0, 1), 1 << 30) != cross_row(same, (0, 2), 1 << 30)).all()


SHAPES = {
    "wide_deep": WideDeep.from_dict(
        {"crosses": [["x", "b"], ["a", "b", "y"]], "cross_rows": 97, "batch_norm": True}
    ),
    "pnn, inner": Pnn.from_dict({"layer": "concat"}),
    "pnn, decomposed": Pnn.from_dict({"layer": "decomposed", "batch_norm": True}),
    "pnn, outer": Pnn.from_dict({"product": "outer"}),
    "pnn, both": Pnn.from_dict({"product": "both", "layer": "concat"}),
    "youtube_rank": YoutubeRank.from_dict({"hidden_sizes": [8, 4], "batch_norm": True}),
}


@pytest.mark.torch
@pytest.mark.parametrize("algorithm", SHAPES.values(), ids=SHAPES)
def test_scoring_computes_the_network(algorithm: FieldsAlgorithm[Any]) -> None:
    """In numpy and in torch, with every parameter moved away from where it begins."""
    encoding = Encoding(("x", "y"), {"a": ("p", "q"), "b": ("r", "s", "t")})
    inputs = algorithm.inputs(encoding)
    net = algorithm.make_net(inputs, seed=1)
    rng = np.random.default_rng(5)
    with torch.no_grad():
        for _, value in sorted(
            {**dict(net.named_parameters()), **dict(net.named_buffers())}.items()
        ):
            if value.is_floating_point():
                value.copy_(torch.from_numpy(rng.random(value.shape) - 0.2 * (value.dim() > 1)))
    numbers = rng.random((300, 2)).astype(np.float32)
    numbers[rng.random((300, 2)) < 0.2] = np.nan
    fields = np.stack([rng.integers(4, size=300), rng.integers(5, size=300)], 1).astype(np.int32)
    # The distribution of each number is even, so that a number is its own position.
    even = np.tile(np.linspace(0, 1, 101, dtype=np.float32), (2, 1))
    model = algorithm.fitted(None, encoding, {"quantiles": even, **scoring_arrays(net)})  # type: ignore[arg-type]
    scorer = model.pair_scorer()
    nobody = np.zeros(300, np.int64)
    logits = scorer.logits(PairBlock(nobody, nobody, numbers, fields))
    positions = torch.from_numpy(scorer.quantiles.positions(numbers))
    batch = Batch(
        {"label": torch.zeros(300), "numbers": positions, "codes": torch.from_numpy(fields)},
        torch.ones(300),
    )
    net.eval()
    with torch.no_grad():
        expected = algorithm.logits(net, inputs, fields_batch(batch, inputs)).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_each_code_of_a_number_is_a_bucket() -> None:
    inputs = Inputs.of(Encoding(("x",), {"a": ("p",)}), n_buckets=4)
    positions = np.array([[0], [0.24], [0.25], [0.999], [1], [np.nan]], np.float32)
    codes = inputs.codes(np.array([[2]] * 6, np.int32), positions)
    assert codes.tolist() == [[2, 1], [2, 1], [2, 2], [2, 4], [2, 4], [2, 0]]
    assert inputs.rows(codes).tolist() == [[2, 4], [2, 4], [2, 5], [2, 7], [2, 7], [2, 3]]
    assert inputs.n_codes == 8


def test_the_standard_crosses_are_of_features_that_there_are() -> None:
    levels = [f"item_category_{level}" for level in range(1, CATEGORY_LEVELS + 1)]
    known = {
        *(f"user_{name}" for name in schema.USER_FEATURES.names),
        *(f"item_{name}" for name in schema.ITEM_FEATURES.names),
        *pair_features.names([*pair_features.FEATURES]),
        *levels,
        "n_sources",
    }
    assert {name for cross in DEFAULT_CROSSES for name in cross} <= known


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("crosses", "message"),
    [
        ([["a", "colour"]], "crosses names 'colour', which is no feature. Known: a, b, x"),
        ([["a", "a"]], "two or more different features"),
        ([["a"]], "two or more different features"),
    ],
)
def test_wrong_crosses_are_named(crosses: Any, message: str) -> None:
    encoding = Encoding(("x",), {"a": ("p",), "b": ("q",)})
    with pytest.raises(ConfigError, match=message):
        WideDeep.from_dict({"crosses": crosses}).inputs(encoding)


@pytest.mark.spark
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_rows_of_one_kind_are_refused(spark: SparkSession, label: float) -> None:
    rows = examples_of_table(table(spark, {"label": [label] * 3, "a": ["p", "q", "p"]}))
    with pytest.raises(EmptyDataError, match=rf"pnn: {3 * label:.0f} of 3 examples are positive"):
        Pnn.from_dict({}).learn(rows, OPTIONS)


@pytest.mark.spark
def test_examples_of_one_user_cannot_be_split(spark: SparkSession) -> None:
    encoding = Encoding((), {"a": ("p", "q")})
    frame = spark.createDataFrame(
        [(7, float(n % 2), [], [2 + n % 2]) for n in range(20)],
        "user_idx long, label float, numbers array<float>, fields array<int>",
    )
    with pytest.raises(EmptyDataError, match="pnn: the examples are of too few users"):
        Pnn.from_dict({}).learn(Examples(frame, encoding), OPTIONS)


@pytest.mark.spark
@pytest.mark.horovod
def test_two_horovod_ranks_are_two_threads(spark: SparkSession) -> None:
    rng = np.random.default_rng(7)
    label = rng.random(600) < 0.5
    rows = examples_of_table(
        table(
            spark, {"label": label * 1.0, "x": rng.random(600) + label, "a": texts("a", label * 1)}
        )
    )
    algorithm = WideDeep.from_dict(
        {**SMALL, "epochs": 2, "batch_size": 50, "crosses": [["x", "a"]], "cross_rows": 64}
    )
    threads = FitOptions(train=Train(ranks=2), in_process=True)  # type: ignore[call-arg]
    processes = FitOptions(train=Train(ranks=2))  # type: ignore[call-arg]
    expected = algorithm.learn(rows, threads).arrays()
    for name, array in algorithm.learn(rows, processes).arrays().items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.spark
def test_a_table_without_its_label_is_named(spark: SparkSession) -> None:
    with pytest.raises(ModelError, match=r"no column 'clicked', but \['a', 'label'\]"):
        examples_of_table(table(spark, {"label": [1.0], "a": ["p"]}), "clicked")


@pytest.mark.spark
def test_the_columns_of_a_table_may_have_dots(spark: SparkSession) -> None:
    """Label, numbers and texts: the same examples as from plain names."""
    plain = table(spark, {"label": [1.0, 0.0], "x": [2.0, 3.0], "a": ["p", "q"]})
    odd = plain.withColumnsRenamed({"label": "ad.clicked", "x": "ad.x", "a": "user.a"})
    examples = examples_of_table(odd, "ad.clicked")
    assert (examples.encoding.numbers, [*examples.encoding.fields]) == (("ad.x",), ["user.a"])
    expected = examples_of_table(plain).rows.orderBy("label").collect()
    assert examples.rows.orderBy("label").collect() == expected


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.name)
def test_it_needs_a_retriever(algorithm: type[FieldsAlgorithm[Any]]) -> None:
    algorithm.from_dict({}).check_needs({"ease": "retriever", "words": "encoder"})
    with pytest.raises(ConfigError, match=rf"{algorithm.name} ranks what retrievers list.*words"):
        algorithm.from_dict({}).check_needs({"words": "encoder"})

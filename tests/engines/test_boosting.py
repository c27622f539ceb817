"""Trees grown on several Spark tasks: the same bits in any order, whole groups, odd data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xgboost
from pyspark.sql import DataFrame, SparkSession

from recspark.config import Train
from recspark.data.blocks import Array
from recspark.data.feature_encoding import Encoding
from recspark.engines import boosting
from recspark.engines.boosting import Boosting, WorkerCodeError, feature_matrix, grow_trees
from recspark.models.base import PairBlock
from recspark.models.rankers.lambdamart import TreeScorer

pytestmark = pytest.mark.spark
ENCODING = Encoding(("price", "rank"), {"colour": ("blue", "red")})
PARAMS: dict[str, Any] = {
    "objective": "rank:ndcg", "lambdarank_pair_method": "topk", "lambdarank_num_pair_per_sample": 10,
    "tree_method": "hist", "grow_policy": "lossguide", "max_depth": 0, "max_leaves": 8, "eta": 0.3,
    "max_bin": 64, "seed": 1, "subsample": 0.8, "colsample_bytree": 0.7, "min_child_weight": 0.01,
}  # fmt: skip
TYPES = "mode string, user_idx bigint, item_idx int, label float, numbers array<float>, fields array<int>"


def examples(spark: SparkSession, n_users: int, seed: int = 0) -> DataFrame:
    """A user acts on the dearer items of each list, and on red ones (code 3) whatever they cost.

    Prices of user u lie around 1,000 u, so only a comparison within a list tells what is dear.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for mode in ("novel", "repeat"):
        for user in range(n_users):
            price = 1000 * user + generator.normal(size=12) * 10
            rank = price.argsort().argsort()
            colour = generator.integers(0, 4, 12)
            for item in range(12):
                label = float(rank[item] >= 8 or colour[item] == 3)
                numbers = [float(price[item]), float(rank[item])]
                rows.append((mode, user, item, label, numbers, [int(colour[item])]))
    return spark.createDataFrame(rows, TYPES)


def grown(rows: DataFrame, n_workers: int, **params: Any) -> bytes:
    how = Boosting({**PARAMS, **params}, 20, Train(ranks=n_workers))  # type: ignore[call-arg]
    return grow_trees(rows, ("mode", "user_idx"), ("item_idx",), ENCODING, how)


def scores(trees: bytes, rows: DataFrame) -> tuple[Array, Array]:
    table = rows.toArrow()
    numbers, fields = (
        np.array(table.column(name).to_pylist(), kind)
        for name, kind in (("numbers", np.float32), ("fields", np.int32))
    )
    user, item = (table.column(name).to_numpy() for name in ("user_idx", "item_idx"))
    block = PairBlock(user, item, numbers, fields)
    return TreeScorer(trees).score(block), table.column("label").to_numpy()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_the_order_of_rows_does_not_matter(spark: SparkSession, n_workers: int) -> None:
    rows = examples(spark, 30)
    trees = grown(rows.coalesce(1), n_workers)
    shuffled = rows.orderBy("label", "item_idx", "user_idx").repartition(5)
    assert grown(shuffled, n_workers) == trees
    assert grown(rows, n_workers, seed=2) != trees
    score, label = scores(trees, rows)
    assert score[label > 0].min() > score[label == 0].max() - 0.5
    both = score[label > 0][:, None] - score[label == 0]
    assert (both > 0).mean() > 0.98


def test_two_workers_learn_what_one_learns(spark: SparkSession) -> None:
    """Each worker sees half of the groups only; apart, they could not give the same scores."""
    rows = examples(spark, 40)
    together, alone = (
        scores(grown(rows, n, subsample=1, colsample_bytree=1), rows)[0] for n in (2, 1)
    )
    assert np.corrcoef(together, alone)[0, 1] > 0.99


def test_one_worker_gives_the_trees_of_xgboost_itself(spark: SparkSession) -> None:
    """The same lists as groups, in the same order, by xgboost in this process: the same bytes."""
    rows = examples(spark, 25)
    table = rows.toArrow().sort_by([(n, "ascending") for n in ("mode", "user_idx", "item_idx")])
    numbers, fields = (
        np.array(table.column(name).to_pylist(), kind)
        for name, kind in (("numbers", np.float32), ("fields", np.int32))
    )
    lists = list(
        zip(table.column("mode").to_pylist(), table.column("user_idx").to_pylist(), strict=True)
    )
    data = xgboost.QuantileDMatrix(
        np.concatenate([numbers, fields], axis=1),
        label=table.column("label").to_numpy(),
        qid=[sorted(set(lists)).index(of_row) for of_row in lists],
        feature_types=["q", "q", "c"],
        enable_categorical=True,
        max_bin=PARAMS["max_bin"],
        nthread=1,
    )
    expected = bytes(xgboost.train({**PARAMS, "nthread": 1}, data, 20).save_raw("json"))
    assert grown(rows.repartition(3), 1) == expected
    whole = grow_trees(
        rows,
        ("mode",),
        ("user_idx", "item_idx"),
        ENCODING,
        Boosting(PARAMS, 20, Train(ranks=1)),  # type: ignore[call-arg]
    )
    assert whole != expected  # with other groups the trees are others


def test_a_worker_without_rows(spark: SparkSession) -> None:
    """One list and two workers: one of them has nothing, and the trees are grown all the same."""
    rows = examples(spark, 1).where("mode = 'novel'")
    score, label = scores(grown(rows, 2, min_child_weight=0, subsample=1), rows)
    assert score[label > 0].mean() > score[label == 0].mean()


def test_missing_and_infinite_numbers_and_new_codes(spark: SparkSession) -> None:
    rows = examples(spark, 20)
    trees = grown(rows, 1)
    odd = spark.createDataFrame(
        [
            ("novel", 1, 1, 0.0, [float("nan"), float("nan")], [0]),
            ("novel", 1, 2, 0.0, [float("inf"), float("-inf")], [1]),
            ("novel", 1, 3, 0.0, [3e38, -3e38], [999]),
        ],
        TYPES,
    )
    assert np.isfinite(scores(trees, odd)[0]).all()
    with_odd = rows.unionByName(odd)
    assert np.isfinite(scores(grown(with_odd, 2), with_odd)[0]).all()


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_error_in_the_code_of_a_worker_is_no_lost_worker(
    spark: SparkSession, n_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A column is missing in every task, then one row is odd in one task: the traceback, no retry."""
    rows = examples(spark, 4)
    with pytest.raises(boosting._SPARK_ERRORS, match="KeyError") as missing:
        grown(rows.withColumnRenamed("label", "clicked"), n_workers)
    short = spark.createDataFrame([("novel", 9, 1, 0.0, [1.0], [0])], TYPES)
    with pytest.raises(boosting._SPARK_ERRORS, match="ModelError") as odd:
        grown(rows.unionByName(short), n_workers)
    for caught in (missing, odd):
        assert "read_share" in str(caught.value)
        assert "worker was lost" not in str(caught.value)
    assert "tried once more" not in caplog.text


def test_an_error_of_xgboost_is_a_lost_worker_only_where_there_are_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(boosting, "_SETTLING_S", 0)
    with pytest.raises(WorkerCodeError, match="label"), boosting._code_errors_marked(1):
        raise xgboost.core.XGBoostError("label is NaN")
    with pytest.raises(xgboost.core.XGBoostError), boosting._code_errors_marked(2):
        raise xgboost.core.XGBoostError("connection reset by peer")
    with pytest.raises(MemoryError), boosting._code_errors_marked(1):
        raise MemoryError


def test_groups_go_on_over_batches() -> None:
    names = ["mode", "user_idx"]
    first = pa.record_batch([["novel", "novel", "novel"], [1, 1, 2]], names=names)
    second = pa.record_batch([["novel", "repeat"], [2, 2]], names=names)
    is_first, last = boosting._group_starts(first, names, None)
    assert (is_first.tolist(), last) == ([True, False, True], {"mode": "novel", "user_idx": 2})
    is_first, last = boosting._group_starts(second, names, last)
    assert (is_first.tolist(), last) == ([False, True], {"mode": "repeat", "user_idx": 2})
    assert boosting._group_starts(second.slice(0, 0), names, last) == (pytest.approx([]), last)


def test_the_matrix_has_numbers_then_codes() -> None:
    numbers = np.array([[1.5, np.inf, np.nan]], np.float32)
    matrix = feature_matrix(numbers, np.array([[3]], np.int32))
    assert matrix.dtype == np.float32
    assert matrix[0, [0, 3]].tolist() == [1.5, 3.0]
    assert matrix[0, 1] == np.finfo(np.float32).max
    assert np.isnan(matrix[0, 2])

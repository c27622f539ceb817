"""The blocked engine: the same loss as its kernel, the same bits whatever its way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession
from scipy import sparse

from recspark.data.blocks import Array
from recspark.engines import als as engine
from recspark.engines.als import BlockedAls, Plan
from recspark.engines.als_objective import Objective, loss
from recspark.errors import EmptyDataError, KeyViolationError, ModelError

pytestmark = [pytest.mark.spark, pytest.mark.timeout(900)]
# A fit is 30 short jobs and more, 2 to 3 s on two cores: most ways of it are not for every run.
slow = pytest.mark.slow
OBJECTIVE = Objective(0.05, 4.0, unobserved_weight=0.7, reg_exponent=0.5)
PLAN = Plan(rank=6, iterations=4, n_blocks=3)


def interactions(n_users: int = 90, n_items: int = 40, seed: int = 1) -> sparse.csr_matrix:
    """Users with tastes, a user id being 7 times the row; the last item has no user."""
    rng = np.random.default_rng(seed)
    near = rng.random((n_users, n_items)) < np.where(
        np.arange(n_items) % 4 == np.arange(n_users)[:, None] % 4, 0.4, 0.04
    )
    near[:, -1] = False
    near[np.arange(n_users), np.arange(n_users) % (n_items - 1)] = True
    return sparse.csr_matrix(near * rng.uniform(0.2, 2, near.shape).astype(np.float32))


def pairs(spark: SparkSession, rows: sparse.csr_matrix, n_partitions: int = 2) -> DataFrame:
    start, at = pa.array(rows.indptr, pa.int32()), pa.array(rows.indices, pa.int32())
    table = pa.table(
        {
            "user": pa.array(np.arange(rows.shape[0]) * 7, pa.int64()),
            "items": pa.ListArray.from_arrays(start, at),
            "weights": pa.ListArray.from_arrays(start, pa.array(rows.data, pa.float32())),
        }
    )
    shuffled = table.take(np.random.default_rng(n_partitions).permutation(rows.shape[0]))
    return spark.createDataFrame(shuffled).repartition(n_partitions)


def factorise(
    frame: DataFrame, objective: Objective = OBJECTIVE, plan: Plan = PLAN, n_items: int = 40
) -> tuple[Array, Array, list[float]]:
    """(users by id, items, losses)."""
    with BlockedAls(frame, n_items, objective, plan) as als:
        als.run()
        found = als.user_factors().collect()
        order = np.argsort(np.concatenate([ids for ids, _ in found]))
        return np.concatenate([x for _, x in found])[order], als.item_factors(), als.losses


def equal(one: tuple[Array, Array, list[float]], other: tuple[Array, Array, list[float]]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def reference(spark: SparkSession) -> tuple[Array, Array, list[float]]:
    return factorise(pairs(spark, interactions()))


def true_loss(x: Array, y: Array, objective: Objective) -> float:
    rows = interactions()
    return loss(rows.indptr.astype(np.int64), rows.indices, rows.data, x, y, objective)


def test_reported_loss_is_the_loss_and_falls(reference: tuple[Array, Array, list[float]]) -> None:
    x, y, losses = reference
    assert (x.shape, y.shape, len(losses)) == ((90, 6), (40, 6), 4)
    assert losses[-1] == pytest.approx(true_loss(x, y, OBJECTIVE), rel=1e-6)
    assert (np.diff(losses) <= 0).all()
    assert (y[-1] == 0).all()  # nobody acted on it


@slow
@pytest.mark.parametrize("n_partitions", [1, 4])
def test_input_partitions_do_not_matter(
    spark: SparkSession, reference: tuple[Array, Array, list[float]], n_partitions: int
) -> None:
    assert equal(factorise(pairs(spark, interactions(), n_partitions)), reference)


def test_sent_factors_equal_a_broadcast(
    spark: SparkSession, reference: tuple[Array, Array, list[float]]
) -> None:
    sent = factorise(pairs(spark, interactions()), plan=replace(PLAN, broadcast_bytes=0))
    assert equal(sent, reference)


@slow
def test_sums_as_a_tree(
    spark: SparkSession,
    reference: tuple[Array, Array, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "_FAN", 2)
    _, y, losses = factorise(pairs(spark, interactions()))
    assert np.allclose(y, reference[1], atol=1e-4)
    assert losses == pytest.approx(reference[2], rel=1e-5)


@slow
def test_seed_and_blocks_decide(
    spark: SparkSession, reference: tuple[Array, Array, list[float]]
) -> None:
    other = factorise(pairs(spark, interactions()), plan=replace(PLAN, seed=2))
    assert not np.allclose(other[1], reference[1])
    assert other[2][-1] == pytest.approx(reference[2][-1], rel=0.02)


@slow
def test_more_blocks_than_users(spark: SparkSession) -> None:
    rows = interactions()[:3]
    plan = replace(PLAN, n_blocks=5, method="cholesky")
    x, _, losses = factorise(pairs(spark, rows), plan=plan)
    assert x.shape == (3, 6)
    assert (np.diff(losses) <= 1e-9).all()


@slow
def test_explicit_feedback(spark: SparkSession) -> None:
    objective = Objective(0.05, feedback="explicit")
    for method in ("cg", "cholesky"):
        plan = replace(PLAN, method=method)
        x, y, losses = factorise(pairs(spark, interactions()), objective, plan)
        assert losses[-1] == pytest.approx(true_loss(x, y, objective), rel=1e-5)
        assert (np.diff(losses) <= 0).all()


@slow
@pytest.mark.parametrize("broadcast_bytes", [0, 1 << 20])
def test_resumed_equals_uninterrupted(
    spark: SparkSession,
    reference: tuple[Array, Array, list[float]],
    tmp_path: Path,
    broadcast_bytes: int,
) -> None:
    told: list[str] = []
    plan = replace(
        PLAN, scratch=str(tmp_path), checkpoint_every=1, broadcast_bytes=broadcast_bytes,
        progress=told.append,
    )  # fmt: skip
    frame = pairs(spark, interactions())
    factorise(frame, plan=replace(plan, iterations=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iteration-000001", "iteration-000002"]
    told.clear()
    assert equal(factorise(frame, plan=plan), reference)
    assert [line.split(",")[0] for line in told] == [
        "  als: goes on after iteration 2", "  als: iteration 3 of 4", "  als: iteration 4 of 4",
    ]  # fmt: skip

    (tmp_path / "iteration-000003" / "_complete").unlink()  # killed while it was written
    told.clear()
    assert equal(factorise(frame, plan=plan), reference)
    assert told[0].startswith("  als: goes on after iteration 2")

    told.clear()  # another factorisation does not take it
    factorise(frame, replace(OBJECTIVE, alpha=1.0), replace(plan, iterations=1))
    assert len(told) == 1


@slow
def test_many_iterations_without_a_checkpoint(spark: SparkSession) -> None:
    """The lineage ends every few iterations; else tasks grow with each."""
    plan = replace(PLAN, iterations=12, n_blocks=2, checkpoint_every=4)
    with BlockedAls(pairs(spark, interactions()), 40, OBJECTIVE, plan) as als:
        als.run()
        assert als._users.solved is not None
        lineage = als._users.solved.toDebugString()
        assert lineage is not None
        assert lineage.decode().count("PythonRDD") < 60


@slow
def test_nothing_stays_behind(spark: SparkSession) -> None:
    def persisted() -> set[Any]:
        context: Any = spark.sparkContext
        return set(dict(context._jsc.getPersistentRDDs()))

    before = persisted()
    factorise(pairs(spark, interactions()))
    assert persisted() == before


def test_named_errors(spark: SparkSession) -> None:
    empty = pairs(spark, interactions()).where("user < 0")
    with pytest.raises(EmptyDataError, match="weight above 0"):
        BlockedAls(empty, 40, OBJECTIVE, PLAN)
    frame = pairs(spark, interactions()[:5])
    with pytest.raises(Exception, match=r"user \d+ has more than one row") as raised:
        BlockedAls(frame.union(frame), 40, OBJECTIVE, PLAN)
    assert KeyViolationError.__name__ in str(raised.value)
    infinite = interactions()
    infinite.data[3] = np.inf
    with pytest.raises(ModelError, match="not finite after iteration 1: the loss is nan"):
        factorise(pairs(spark, infinite))

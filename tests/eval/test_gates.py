"""Audit counts of lists with every fault, and each gate on both sides of its threshold."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime

import pytest
from pyspark.sql import SparkSession

from recspark.config import Mode, Publish
from recspark.eval.evaluate import MetricRow
from recspark.eval.gates import (
    AuditCounts,
    audit,
    backtest_gate,
    coverage_gate,
    full_lists_gate,
    publish_gates,
)

GOOD = AuditCounts(
    n_active=1000,
    n_answered=1000,
    n_lists=1000,
    n_full=1000,
    n_unknown_items=0,
    n_seen_items=0,
    n_broken_lists=0,
)


def row(diff: float | None, low: float | None, high: float | None, **changes: object) -> MetricRow:
    plain = MetricRow(
        date(2020, 1, 2),
        "backtest",
        datetime(2020, 1, 1),
        7,
        "published",
        "novel",
        "warm",
        "ndcg",
        10,
        0.1,
        50,
        "popular",
        diff,
        low,
        high,
    )
    return plain._replace(**changes)


@pytest.mark.spark
@pytest.mark.parametrize(
    ("mode", "n_answered", "n_full", "n_seen"), [("novel", 6, 6, 1), ("repeat", 5, 5, 1)]
)
def test_audit_counts_every_fault(
    spark: SparkSession, mode: Mode, n_answered: int, n_full: int, n_seen: int
) -> None:
    lists = {
        1: [(0, 1), (1, 2), (2, 3)],  # full
        2: [(0, 1), (1, 2)],  # short; all there is in novel, as 2 and 3 are seen
        3: [(0, 1), (9, 2), (8, 3)],  # two unknown items
        4: [(0, 1), (1, 2), (3, 3)],  # 3 is seen
        5: [(0, 1), (0, 2), (1, 3)],  # an item twice
        7: [(0, 2), (1, 3), (2, 4)],  # not active, ranks from 2
    }
    seen = {1: [], 2: [2, 3], 3: [], 4: [3], 5: [], 6: [0, 1, 2, 3], 8: [0]}  # 6, 8: no list
    active = spark.createDataFrame(list(seen.items()), "user_idx long, seen array<int>")
    listed = spark.createDataFrame(
        [(user, item, rank) for user, rows in lists.items() for item, rank in rows],
        "user_idx long, item_idx int, rank int",
    )
    known = spark.createDataFrame([(item,) for item in range(4)], "item_idx int")
    assert audit(listed.repartition(3), active, known, 3, mode) == AuditCounts(
        n_active=7,
        n_answered=n_answered,  # in novel, user 6 has nothing left to list
        n_lists=6,
        n_full=n_full,
        n_unknown_items=2,
        n_seen_items=n_seen,
        n_broken_lists=2,
    )


@pytest.mark.spark
def test_items_without_events_may_be_listed_and_fill_no_list(spark: SparkSession) -> None:
    """Where they are given: item 7 is known then. A list is full without them."""
    lists = {1: [(0, 1), (7, 2)], 2: [(7, 1), (9, 2)], 3: [(0, 1), (1, 2)]}
    listed = spark.createDataFrame(
        [(user, item, rank) for user, rows in lists.items() for item, rank in rows],
        "user_idx long, item_idx int, rank int",
    )
    active = spark.createDataFrame([(user, []) for user in lists], "user_idx long, seen array<int>")
    known, cold = (spark.createDataFrame([(i,) for i in n], "item_idx int") for n in ((0, 1), (7,)))
    for cold_items, n_unknown in ((None, 3), (cold, 1)):
        counts = audit(listed, active, known, 3, "novel", cold_items=cold_items)
        assert (counts.n_unknown_items, counts.n_full) == (n_unknown, 3)


@pytest.mark.spark
def test_audit_of_no_list(spark: SparkSession) -> None:
    lists = spark.createDataFrame([], "user_idx long, item_idx int, rank int")
    active = spark.createDataFrame([(1, [])], "user_idx long, seen array<int>")
    known = spark.createDataFrame([(0,)], "item_idx int")
    assert audit(lists, active, known, 3, "novel") == AuditCounts(1, 0, 0, 0, 0, 0, 0)
    nobody = audit(lists, active.where("false"), known, 3, "novel")
    assert nobody == AuditCounts(0, 0, 0, 0, 0, 0, 0)


def test_share_gates_on_both_sides_of_the_threshold() -> None:
    assert coverage_gate(replace(GOOD, n_answered=999), 0.999).passed
    refused = coverage_gate(replace(GOOD, n_answered=998), 0.999)
    assert not refused.passed
    assert (refused.value, refused.threshold) == (0.998, 0.999)
    assert refused.detail == (
        "998 of 1000 active users have a list (99.8000%), at least 99.9000% must"
    )
    assert full_lists_gate(replace(GOOD, n_full=990), 0.99).passed
    assert not full_lists_gate(replace(GOOD, n_full=989), 0.99).passed


def test_nobody_active_is_refused_and_no_list_is_left_to_coverage() -> None:
    nobody = AuditCounts(0, 0, 0, 0, 0, 0, 0)
    assert not coverage_gate(nobody, 0.999).passed
    assert coverage_gate(nobody, 0.999).value is None
    assert full_lists_gate(nobody, 0.99).passed


@pytest.mark.parametrize(
    ("figures", "passed"),
    [
        ((0.02, 0.01, 0.03), True),
        ((-0.01, -0.02, 0.0), True),  # touches 0: not wholly below
        ((-0.01, -0.02, -0.001), False),
        ((-0.01, None, None), False),  # no replicates: the difference itself
        ((0.0, None, None), True),
        ((None, None, None), True),  # no baseline: nothing to compare
    ],
)
def test_backtest_gate(
    figures: tuple[float | None, float | None, float | None], passed: bool
) -> None:
    gate = backtest_gate([row(*figures)], "published", "novel", "ndcg", 10)
    assert gate.passed is passed
    assert gate.name == "backtest_ndcg"


def test_backtest_gate_looks_at_its_own_row() -> None:
    bad = row(-0.2, -0.3, -0.1)
    others = [
        row(0.2, 0.1, 0.3, model="ease"),
        row(0.2, 0.1, 0.3, mode="repeat"),
        row(0.2, 0.1, 0.3, segment="all"),
        row(0.2, 0.1, 0.3, metric="recall"),
        row(0.2, 0.1, 0.3, k=20),
    ]
    gate = backtest_gate([*others, bad], "published", "novel", "ndcg", 10)
    assert not gate.passed
    assert gate.detail == (
        "published is -0.2000 (-0.3000 to -0.1000) in ndcg@10 against popular over 50 users, "
        "mode novel; the upper end must be at least 0"
    )
    none = backtest_gate(others, "published", "novel", "ndcg", 10)
    assert none.passed
    assert none.value is None
    assert "not compared" in none.detail


@pytest.mark.parametrize(
    ("fault", "gate"),
    [
        ({"n_answered": 900}, "active_coverage"),
        ({"n_full": 900}, "full_lists"),
        ({"n_unknown_items": 1}, "unknown_items"),
        ({"n_broken_lists": 1}, "broken_lists"),
        ({"n_seen_items": 1}, "seen_items"),
    ],
)
def test_each_fault_is_refused_by_its_gate_alone(fault: dict[str, int], gate: str) -> None:
    rows = [row(0.02, 0.01, 0.03)]
    gates = publish_gates(
        replace(GOOD, **fault), Publish(mode="novel").published_lists[0], rows, "ndcg", 10
    )
    assert [g.name for g in gates if not g.passed] == [gate]
    assert len({g.name for g in gates}) == len(gates) == 6


def test_seen_items_are_fine_in_repeat_mode() -> None:
    rows = [row(0.02, 0.01, 0.03, mode="repeat")]
    gates = publish_gates(
        replace(GOOD, n_seen_items=5), Publish(mode="repeat").published_lists[0], rows, "ndcg", 10
    )
    assert all(g.passed for g in gates)
    assert "seen_items" not in {g.name for g in gates}

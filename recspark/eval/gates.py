"""Conditions that lists must meet before they are published.

One pass over the lists counts what the conditions need; pure functions of the counts decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Mode, PublishedList
from recspark.eval.evaluate import MetricRow

# What gate `unknown_items` counts.
_NOT_LISTABLE = (
    "listed items are not available, or neither acted on nor described before the cutoff"
)


@dataclass(frozen=True)
class AuditCounts:
    """Counts of one set of lists.

    Parameters
    ----------
    n_active : users who must get a list
    n_answered : active users with at least one item, or for whom no item remains to be listed
    n_lists : users with at least one item, active or not
    n_full : lists with k items, or with all items that may be listed for the user
    n_unknown_items : listed items that may not be listed
    n_seen_items : listed items that the user had seen
    n_broken_lists : lists with an item or a rank twice, or whose ranks are not 1, 2, … n
    """

    n_active: int
    n_answered: int
    n_lists: int
    n_full: int
    n_unknown_items: int
    n_seen_items: int
    n_broken_lists: int


@dataclass(frozen=True)
class Gate:
    """The result of one condition: the measured value, the threshold, and whether the gate passed.

    `value` is None where there was nothing to measure. `detail` explains the result in a sentence.
    """

    name: str
    value: float | None
    threshold: float
    passed: bool
    detail: str


def audit(
    lists: DataFrame,
    active: DataFrame,
    known_items: DataFrame,
    k: int,
    mode: Mode,
    *,
    broadcast_items: bool = False,
    cold_items: DataFrame | None = None,
) -> AuditCounts:
    """Return the counts of `lists` that the gates need.

    Parameters
    ----------
    lists : user_idx bigint, item_idx int, rank int; one list per user
    active : user_idx, seen array<int>: a row per user who must be answered. The list of a user who
        is not in `active` counts as a list of a user who has seen nothing.
    known_items : item_idx: the items with events that may be listed; distinct
    k : items of a full list
    mode : `novel`: the user's list may hold `known_items` without `seen`; `repeat`: all
        `known_items`

    broadcast_items : whether `known_items` is small enough to be sent to every executor; otherwise
        Spark chooses how to join it
    cold_items : item_idx: the items without events that may be listed too; distinct. A list is
        full without them, because most models do not know them. None = there are none

    Runs one job, with one shuffle by user of lists and active users. One row of counts comes back
    to the driver.
    """
    listable = known_items.select("item_idx")
    if cold_items is not None:
        listable = listable.unionByName(cold_items.select("item_idx"))
    is_known_by_item = listable.withColumn("is_known", F.lit(True))
    if broadcast_items:
        is_known_by_item = F.broadcast(is_known_by_item)
    per_user = (
        lists.select("user_idx", "item_idx", "rank")
        .join(is_known_by_item, on="item_idx", how="left")
        .groupBy("user_idx")
        .agg(
            F.collect_list("item_idx").alias("items"),
            F.collect_list("rank").alias("ranks"),
            F.count_if(F.col("is_known").isNull()).alias("n_unknown"),
        )
    )
    n_known = F.broadcast(known_items.agg(F.count(F.lit(1)).alias("n_known")))
    no_items = F.array().cast(schema.ITEM_IDXS)
    users = (
        per_user.join(
            active.select("user_idx", "seen", F.lit(True).alias("is_active")),
            on="user_idx",
            how="full",
        )
        .crossJoin(n_known)
        .select(
            F.coalesce("is_active", F.lit(False)).alias("is_active"),
            F.coalesce("items", no_items).alias("items"),
            F.coalesce("ranks", no_items).alias("ranks"),
            F.coalesce("n_unknown", F.lit(0)).alias("n_unknown"),
            F.coalesce("seen", no_items).alias("seen"),
            "n_known",
        )
    )
    n_items = F.size("items")
    n_seen = F.size(F.filter("items", lambda item: F.array_contains("seen", item)))
    n_eligible = F.col("n_known") - (F.size("seen") if mode == "novel" else F.lit(0))
    has_list = n_items > 0
    is_full = n_items >= F.least(F.lit(k), n_eligible)
    is_well_formed = (F.size(F.array_distinct("items")) == n_items) & (
        F.array_sort("ranks") == F.sequence(F.lit(1), n_items)
    )
    counts = users.agg(
        F.count_if("is_active").alias("n_active"),
        F.count_if(F.col("is_active") & (has_list | (n_eligible <= 0))).alias("n_answered"),
        F.count_if(has_list).alias("n_lists"),
        F.count_if(has_list & is_full).alias("n_full"),
        F.sum("n_unknown").alias("n_unknown_items"),
        F.sum(n_seen).alias("n_seen_items"),
        F.count_if(has_list & ~is_well_formed).alias("n_broken_lists"),
    ).collect()[0]
    return AuditCounts(**{name: int(n or 0) for name, n in counts.asDict().items()})


def publish_gates(
    counts: AuditCounts,
    published_list: PublishedList,
    rows: Sequence[MetricRow],
    metric: str,
    k: int,
) -> list[Gate]:
    """Return every gate that one of tonight's lists must pass, the most interesting for a reader
    first.

    Parameters
    ----------
    counts : of the list of each user
    published_list : its thresholds, mode and name in the backtest
    rows : metrics of the backtest (`evaluate`), of which the gate reads those of
        `published_list.judged_model`
    metric, k : what the backtest gate compares: `evaluate.metric` at `evaluate.ks[0]`
    """
    gates = [
        coverage_gate(counts, published_list.min_coverage),
        full_lists_gate(counts, published_list.min_full_lists),
        none_gate("unknown_items", counts.n_unknown_items, _NOT_LISTABLE),
        none_gate(
            "broken_lists", counts.n_broken_lists, "lists have an item or a rank twice or gaps"
        ),
    ]
    if published_list.mode == "novel":
        gates.append(none_gate("seen_items", counts.n_seen_items, "listed items were seen before"))
    return [
        *gates,
        backtest_gate(rows, published_list.judged_model, published_list.mode, metric, k),
    ]


def coverage_gate(counts: AuditCounts, minimum: float) -> Gate:
    """Return the gate that passes where at least the share `minimum` of active users has a list.

    Without any active user the gate refuses, because publishing would empty the table.
    """
    statement = "active users have a list"
    return _share_gate(
        "active_coverage",
        counts.n_answered,
        counts.n_active,
        minimum,
        statement,
        passes_if_empty=False,
    )


def full_lists_gate(counts: AuditCounts, minimum: float) -> Gate:
    """Return the gate that passes where the share of full lists is at least `minimum`.

    A list is full where it is as long as it can be. Without any list the gate passes.
    """
    statement = "lists are full"
    return _share_gate(
        "full_lists", counts.n_full, counts.n_lists, minimum, statement, passes_if_empty=True
    )


def none_gate(name: str, n: int, fault: str) -> Gate:
    """Return the gate that passes where the number `n` of faults is 0.

    `fault` continues a sentence that begins with `n`.

    >>> none_gate("seen_items", 2, "listed items were seen before").detail
    '2 listed items were seen before, at most 0 may'
    """
    return Gate(name, float(n), 0.0, n == 0, f"{n} {fault}, at most 0 may")


def backtest_gate(rows: Sequence[MetricRow], model: str, mode: str, metric: str, k: int) -> Gate:
    """Return the gate that refuses a model whose metric is surely below that of the baseline.

    The gate passes where the upper end of the 95 % interval of the difference to the baseline is at
    least 0. It reads segment `warm`. Without an interval (no replicates) the difference itself must
    be at least 0. Without a difference (no backtest yet, or no user with truth) the gate passes and
    says so.
    """
    name = f"backtest_{metric}"
    key = (model, mode, "warm", metric, k)
    row = next((r for r in rows if (r.model, r.mode, r.segment, r.metric, r.k) == key), None)
    if row is None or row.diff is None:
        return Gate(name, None, 0.0, True, f"no backtest of {model} in mode {mode}: not compared")
    upper = row.diff if row.ci_high is None else row.ci_high
    interval = "" if row.ci_high is None else f" ({row.ci_low:+.4f} to {row.ci_high:+.4f})"
    return Gate(
        name,
        upper,
        0.0,
        upper >= 0,
        f"{model} is {row.diff:+.4f}{interval} in {metric}@{k} against {row.baseline} over "
        f"{row.n_users} users, mode {mode}; the upper end must be at least 0",
    )


def _share_gate(
    name: str, n: int, n_total: int, minimum: float, statement: str, *, passes_if_empty: bool
) -> Gate:
    # The gate that passes where n / n_total is at least `minimum`. `statement` continues a sentence
    # that begins with "n of n_total".
    if n_total == 0:
        return Gate(name, None, minimum, passes_if_empty, f"nothing to measure: 0 of 0 {statement}")
    share = n / n_total
    detail = f"{n} of {n_total} {statement} ({share:.4%}), at least {minimum:.4%} must"
    return Gate(name, share, minimum, share >= minimum, detail)

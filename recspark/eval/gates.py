"""What must hold before lists are published: counts in one pass, then pure functions over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Mode, Publish
from recspark.eval.evaluate import MetricRow


@dataclass(frozen=True)
class AuditCounts:
    """Counts of one set of lists.

    Parameters
    ----------
    n_active : users who must get a list
    n_answered : of those, users with at least one item, or with nothing left to list
    n_lists : users with at least one item, active or not
    n_full : lists with k items, or with all the items there are for that user
    n_unknown_items, n_seen_items : listed items that are in no catalogue; that the user had seen
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
    """One condition: what was measured, what was asked for, and whether that is enough.

    `value` None: there was nothing to measure. `detail` says it all in a sentence.
    """

    name: str
    value: float | None
    threshold: float
    passed: bool
    detail: str


def audit(
    lists: DataFrame, active: DataFrame, known_items: DataFrame, k: int, mode: Mode
) -> AuditCounts:
    """Return what the gates need to know of `lists`.

    Parameters
    ----------
    lists : user_idx bigint, item_idx int, rank int; one list per user
    active : user_idx, seen array<int>: a row per user who must be answered. A list of somebody else
        counts as a list, with nothing seen.
    known_items : item_idx: what may be listed; distinct
    k : items of a full list
    mode : `novel`: a user has `known_items` minus `seen` to choose from; `repeat`: all of them

    Runs one job: one shuffle by user of lists and active users; `known_items` is broadcast, and a
    row of counts comes back.
    """
    known = F.broadcast(known_items.select("item_idx", F.lit(True).alias("is_known")))
    per_user = (
        lists.select("user_idx", "item_idx", "rank")
        .join(known, on="item_idx", how="left")
        .groupBy("user_idx")
        .agg(
            F.collect_list("item_idx").alias("items"),
            F.collect_list("rank").alias("ranks"),
            F.count_if(F.col("is_known").isNull()).alias("n_unknown"),
        )
    )
    n_known = F.broadcast(known_items.agg(F.count(F.lit(1)).alias("n_known")))
    nothing = F.array().cast(schema.ITEM_IDXS)
    users = (
        per_user.join(
            active.select("user_idx", "seen", F.lit(True).alias("is_active")),
            on="user_idx",
            how="full",
        )
        .crossJoin(n_known)
        .select(
            F.coalesce("is_active", F.lit(False)).alias("is_active"),
            F.coalesce("items", nothing).alias("items"),
            F.coalesce("ranks", nothing).alias("ranks"),
            F.coalesce("n_unknown", F.lit(0)).alias("n_unknown"),
            F.coalesce("seen", nothing).alias("seen"),
            "n_known",
        )
    )
    n_items = F.size("items")
    n_seen = F.size(F.filter("items", lambda item: F.array_contains("seen", item)))
    n_left = F.col("n_known") - (F.size("seen") if mode == "novel" else F.lit(0))
    has_list = n_items > 0
    is_full = n_items >= F.least(F.lit(k), n_left)
    is_whole = (F.size(F.array_distinct("items")) == n_items) & (
        F.array_sort("ranks") == F.sequence(F.lit(1), n_items)
    )
    row = users.agg(
        F.count_if("is_active").alias("n_active"),
        F.count_if(F.col("is_active") & (has_list | (n_left <= 0))).alias("n_answered"),
        F.count_if(has_list).alias("n_lists"),
        F.count_if(has_list & is_full).alias("n_full"),
        F.sum("n_unknown").alias("n_unknown_items"),
        F.sum(n_seen).alias("n_seen_items"),
        F.count_if(has_list & ~is_whole).alias("n_broken_lists"),
    ).collect()[0]
    return AuditCounts(**{name: int(n or 0) for name, n in row.asDict().items()})


def publish_gates(
    counts: AuditCounts, settings: Publish, rows: Sequence[MetricRow], metric: str, k: int
) -> list[Gate]:
    """Return every gate that tonight's lists must pass, in the order of a reader's interest.

    Parameters
    ----------
    counts : of the lists about to be published
    settings : thresholds, mode
    rows : of the backtest (`evaluate`); those of model `published` are looked at
    metric, k : of the backtest gate: `evaluate.metric` at `evaluate.ks[0]`
    """
    gates = [
        coverage_gate(counts, settings.min_coverage),
        full_lists_gate(counts, settings.min_full_lists),
        none_gate("unknown_items", counts.n_unknown_items, "listed items are in no catalogue"),
        none_gate(
            "broken_lists", counts.n_broken_lists, "lists have an item or a rank twice or gaps"
        ),
    ]
    if settings.mode == "novel":
        gates.append(none_gate("seen_items", counts.n_seen_items, "listed items were seen before"))
    return [*gates, backtest_gate(rows, "published", settings.mode, metric, k)]


def coverage_gate(counts: AuditCounts, minimum: float) -> Gate:
    """Return whether enough active users have a list.

    Without any active user the gate refuses: publishing would empty the table.
    """
    what = "active users have a list"
    return _share_gate(
        "active_coverage", counts.n_answered, counts.n_active, minimum, what, empty=False
    )


def full_lists_gate(counts: AuditCounts, minimum: float) -> Gate:
    """Return whether enough lists are as long as they can be; without any list it passes."""
    what = "lists are full"
    return _share_gate("full_lists", counts.n_full, counts.n_lists, minimum, what, empty=True)


def none_gate(name: str, n: int, what: str) -> Gate:
    """Return whether a count that must be 0 is 0.

    >>> none_gate("seen_items", 2, "listed items were seen before").detail
    '2 listed items were seen before, at most 0 may'
    """
    return Gate(name, float(n), 0.0, n == 0, f"{n} {what}, at most 0 may")


def backtest_gate(rows: Sequence[MetricRow], model: str, mode: str, metric: str, k: int) -> Gate:
    """Return whether the interval of the difference to the baseline is not wholly below 0.

    Looks at segment `warm`. Without an interval (no replicates) the difference itself counts;
    without a difference (no backtest yet, nobody with truth) the gate passes and says so.
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
    name: str, part: int, whole: int, minimum: float, what: str, *, empty: bool
) -> Gate:
    if whole == 0:
        return Gate(name, None, minimum, empty, f"nothing to measure: 0 of 0 {what}")
    share = part / whole
    detail = f"{part} of {whole} {what} ({share:.4%}), at least {minimum:.4%} must"
    return Gate(name, share, minimum, share >= minimum, detail)

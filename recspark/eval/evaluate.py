"""One pass over the lists: all models, modes, segments, metrics and intervals at once.

Lists and truth are shuffled by user once. A task returns a few integer sums, whatever the number of
users: the difference of two models is a sum over users, so no model is joined to another.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from recspark import schema, storage
from recspark.config import Evaluate
from recspark.data.blocks import Array
from recspark.data.interactions import hash_sample, in_horizon
from recspark.errors import EmptyDataError
from recspark.eval import kernel
from recspark.eval.kernel import METRICS, SEGMENT_PART, SEGMENTS_OF_USERS, Plan, Sums
from recspark.eval.metrics import (
    NOTHING,
    TRUTH_METRICS,
    Catalogue,
    coverage,
    gini,
    most_listed_share,
    top20_share,
)
from recspark.eval.significance import percentile_interval

# Each segment of table `metrics`, and the segments of users that it is made of.
SEGMENTS: dict[str, tuple[str, ...]] = {
    "all": SEGMENTS_OF_USERS,
    "warm": ("light", "regular", "heavy"),
    **{segment: (segment,) for segment in SEGMENTS_OF_USERS},
}
# Segments of rows about items that had a description and no event before the cutoff. In the first,
# lists are as they are; in the second, they hold such items only.
COLD_ITEMS, AMONG_COLD_ITEMS = "cold_items", "among_cold_items"
POPULATION = "population"  # the `model` of rows that count users and items; their k is 0


class MetricRow(NamedTuple):
    """One row of table `metrics`; fields in the order of `schema.METRICS`."""

    run_date: date
    kind: str
    cutoff: datetime
    horizon_days: int
    model: str
    mode: str
    segment: str
    metric: str
    k: int
    value: float | None
    n_users: int
    baseline: str | None = None
    diff: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None


def truth(histories: DataFrame, cutoff: datetime, horizon_days: int) -> DataFrame:
    """Return `user_idx, items array<int>`: the items that each user acted on in the horizon.

    The horizon is [cutoff, cutoff + horizon_days).

    Parameters
    ----------
    histories : user_idx bigint, history array<struct<item_idx int, event_at timestamp, …>>; a row
        per user
    cutoff : UTC; a naive datetime is taken as UTC
    horizon_days : days

    Items are distinct and ascending; users without an item are left out. Narrow: no shuffle, no
    action.
    """
    events_after = F.filter("history", in_horizon(cutoff, horizon_days))
    items = F.array_sort(F.array_distinct(F.transform(events_after, lambda e: e["item_idx"])))
    return histories.select("user_idx", items.alias("items")).where(F.size("items") > 0)


def population(truths: DataFrame, users: DataFrame) -> DataFrame:
    """Return `user_idx, items, seen, segment`, a row per user with truth.

    Parameters
    ----------
    truths : user_idx, items, as `truth` returns
    users : user_idx, seen array<int> (every item before the cutoff), activity (`light`, `regular`
        or `heavy`, as in `user_features`); a row per user with an event before the cutoff

    A user who is not in `users` is cold, with an empty `seen`. Cost: a join by user, no action.
    """
    warm_users = users.select("user_idx", "seen", "activity")
    return truths.join(warm_users, on="user_idx", how="left").select(
        "user_idx",
        "items",
        F.coalesce("seen", F.array().cast(schema.ITEM_IDXS)).alias("seen"),
        F.coalesce("activity", F.lit("cold")).alias("segment"),
    )


def catalogue(items: DataFrame, users: DataFrame | None = None, folder: str = "") -> Catalogue:
    """Return the items that a list may hold, with vectors where `users` are given.

    Parameters
    ----------
    items : item_idx int, n_users bigint: every item with an event before the cutoff, and the number
        of its users (as in `item_features`)
    users : as `item_vectors` takes them; None = intra-list diversity is not defined
    folder : URI of a folder that all workers reach. The vectors become a file there, which has to
        stay until the catalogue is no longer used. On a local or mounted disk the workers of a
        machine share its pages. "" = every worker gets a copy of the vectors, 256 bytes per item

    Runs one job, or two with `users`. Driver memory: 12 bytes per item, and that of `item_vectors`.
    Raises EmptyDataError where `items` is empty.
    """
    table = items.select("item_idx", "n_users").toArrow().sort_by("item_idx")
    item_idx = table.column("item_idx").to_numpy().astype(np.int32)
    if len(item_idx) == 0:
        raise EmptyDataError("no item has an event before the cutoff: nothing can be evaluated")
    vectors = None if users is None else item_vectors(users, item_idx)
    if vectors is not None and folder:
        file = storage.join(folder, f"vectors-{uuid.uuid4().hex}.npy")
        storage.write_array(file, vectors)
        vectors = storage.read_array(file, mmap=True)
    return Catalogue(item_idx, table.column("n_users").to_numpy().astype(np.int64), vectors)


def item_vectors(users: DataFrame, vocabulary: Array, dims: int = 64) -> Array:
    """Return a short vector per item, such that items with the same users have similar vectors.

    The cosine of two vectors estimates the cosine of the items' columns in the user-item matrix.
    The vectors are the sparsest random projection of these columns: a hash gives each user one of
    `dims` dimensions and a sign, and an item's vector is the sum of the signs of its users, scaled
    to length 1. The error of one cosine has mean 0 and a standard deviation of about 1 /
    sqrt(dims).

    Parameters
    ----------
    users : user_idx bigint, seen array<int>: the distinct items of each before the cutoff
    vocabulary : item_idx int32, ascending; an item that nobody has seen gets zeros
    dims : length of a vector

    Returns
    -------
    float32 (n_items, dims), the same for any order of rows: the sums are of integers. One job, one
    shuffle by item of partly summed rows; driver memory 16 × dims bytes per item.
    Source: Achlioptas 2003; Li, Hastie & Church 2006; one entry per user: Weinberger et al. 2009.
    """
    user_hash = F.xxhash64("user_idx")
    sign = F.when(user_hash < 0, -1).otherwise(1)
    table = (
        users.select("user_idx", F.explode("seen").alias("item_idx"))
        .groupBy("item_idx", F.pmod(user_hash, F.lit(dims)).cast("int").alias("dim"))
        .agg(F.sum(sign).alias("sum"))
        .toArrow()
    )
    item_idx, dim, total = (table.column(name).to_numpy() for name in table.column_names)
    item_row = Catalogue(vocabulary, np.ones(len(vocabulary))).positions(item_idx)
    in_vocabulary = item_row != NOTHING
    vectors = np.zeros((len(vocabulary), dims))
    vectors[item_row[in_vocabulary], dim[in_vocabulary]] = total[in_vocabulary]
    norm = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
    return (vectors / np.maximum(norm, 1)).astype(np.float32)


def evaluate(
    lists: DataFrame,
    users: DataFrame,
    items: Catalogue,
    settings: Evaluate,
    *,
    run_date: date,
    kind: str,
    cutoff: datetime,
    models: Sequence[str],
    modes: Sequence[str] = schema.MODES,
) -> list[MetricRow]:
    """Return the rows of table `metrics` for one kind and cutoff.

    Parameters
    ----------
    lists : model, mode, user_idx, item_idx, rank (from 1): rows of `candidates` made at `cutoff`.
        No list has a rank or an item twice. Ranks above max(ks) are not read.
    users : as `population` returns
    items : what a list may hold. A truth item outside it is dropped and counted; a listed item
        outside it is a miss.
    settings : ks, baseline, n_bootstrap, max_eval_users, seed, horizon_days
    run_date, kind, cutoff : the values of these columns in every row
    models : each gets its rows, and a model without any list gets 0; other models in `lists` are
        left out
    modes : `novel` takes `seen` out of the truth; a user whose truth is then empty is not in the
        population of that mode

    Returns
    -------
    A row per mode × segment × k × model × metric, in this order, for the segments that have users.
    Then, for model `population` with k = 0: n_users, n_cold_users and n_cold_items_in_truth (pairs
    of a user and an item that was unknown before the cutoff). `diff` and its 95 % interval are
    against `settings.baseline`. They are null where the baseline is not among `models`. The
    interval is also null without replicates, and for coverage.

    The figures do not depend on partitions or the order of rows, to the last bit. Per-user values
    are rounded to 2^-32, so the error of a mean is below 2^-33.

    Cost: a count of `users`, then one job with one shuffle by user (20 bytes per listed item) and
    one shuffle of the sums. A task and the driver hold models × modes × segments × metrics × ks ×
    replicates numbers, and a bit per item, model, mode, segment and k. A segment that is not in
    `SEGMENTS_OF_USERS` fails the job by name.
    """
    plan = Plan(
        tuple(models),
        tuple(modes),
        tuple(sorted(set(settings.ks))),
        items,
        settings.n_bootstrap,
        settings.seed,
    )
    is_sampled = in_sample(users, settings)
    rows = rows_by_user(lists.where(is_sampled), users.where(is_sampled), plan)
    shared = users.sparkSession.sparkContext.broadcast(plan)
    try:
        table = (
            rows.mapInArrow(lambda batches: kernel.sum_users(batches, shared.value), kernel.SUMS)
            .repartition("mode", "segment")
            .mapInArrow(kernel.add_up, kernel.SUMS)
            .toArrow()
        )
    finally:
        shared.destroy()
    sums_of = {
        (row["mode"], SEGMENTS_OF_USERS[row["segment"]]): Sums.unpack(
            row["sums"], row["listed"], plan
        )
        for row in table.to_pylist()
    }
    head = (run_date, kind, cutoff, settings.horizon_days)
    baseline = settings.baseline if settings.baseline in plan.models else None
    return [
        row
        for mode in range(len(plan.modes))
        for row in _mode_rows(head, mode, sums_of, plan, baseline)
    ]


def concentration(
    lists: DataFrame,
    n_items: int,
    settings: Evaluate,
    *,
    run_date: date,
    kind: str,
    cutoff: datetime,
    models: Sequence[str],
    modes: Sequence[str] = schema.MODES,
) -> list[MetricRow]:
    """Return the rows of table `metrics` that say how few items fill the lists.

    Parameters
    ----------
    lists : model, mode, user_idx, item_idx, rank (from 1, without gaps): all lists of the cutoff,
        those of users without truth included
    n_items : number of items in the catalogue of the cutoff
    settings : ks, horizon_days
    run_date, kind, cutoff : the values of these columns in every row
    models, modes : the lists that are counted

    Returns
    -------
    A row per mode × k × model × metric, for the metrics `top20_share`, `most_listed_share` and
    `gini` (`recspark.eval.metrics`) and segment `all`. `n_users` is the number of lists; a model
    without a list has no rows. There is no interval and no baseline.

    Cost: one job. Its first shuffle has a row per model, mode and item of each task; what comes to
    the driver is, for each model, mode and k, how many items are in how many lists.
    """
    ks = sorted(set(settings.ks))
    of_item = (
        lists.where(F.col("model").isin(*models) & F.col("mode").isin(*modes))
        .groupBy("model", "mode", "item_idx")
        .agg(
            F.array(
                *[
                    F.struct(
                        F.lit(k).alias("k"),
                        F.count_if(F.col("rank") <= k).alias("n_lists"),
                        F.count_if(F.col("rank") == 1).alias("n_first"),
                    )
                    for k in ks
                ]
            ).alias("counts")
        )
        .select("model", "mode", F.inline("counts"))
        .where("n_lists > 0")
    )
    table = of_item.groupBy("model", "mode", "k", "n_lists").agg(
        F.count(F.lit(1)).alias("n_items"), F.sum("n_first").alias("n_first")
    )
    counts_of: dict[tuple[str, int, str], list[tuple[int, int, int]]] = {}
    for row in table.collect():
        key = row["mode"], row["k"], row["model"]
        counts_of.setdefault(key, []).append((row["n_lists"], row["n_items"], row["n_first"]))
    rows = []
    for mode, k, model in itertools.product(modes, ks, models):
        if (mode, k, model) not in counts_of:
            continue
        n_lists, n_listed_items, n_first = np.array(sorted(counts_of[mode, k, model])).T
        n_all_lists = int(n_first.sum())  # every list has one item of rank 1
        values = {
            "top20_share": top20_share(n_lists, n_listed_items),
            "most_listed_share": most_listed_share(n_lists, n_all_lists),
            "gini": gini(n_lists, n_listed_items, n_items),
        }
        head = (run_date, kind, cutoff, settings.horizon_days, model, mode, "all")
        rows += [
            MetricRow(*head, metric, k, _number(value), n_all_lists)
            for metric, value in values.items()
        ]
    return rows


def cold_items(
    lists: DataFrame,
    users: DataFrame,
    items: Array,
    settings: Evaluate,
    segment: str,
    *,
    run_date: date,
    kind: str,
    cutoff: datetime,
    models: Sequence[str],
) -> list[MetricRow]:
    """Return the rows of table `metrics` about items without events, mode `novel`.

    Parameters
    ----------
    lists, users, settings, run_date, kind, cutoff, models : as `evaluate` takes them
    items : item_idx, int32 (n_items,) ascending, at least one: the items that were described, and
        that nobody acted on, before the cutoff
    segment : `COLD_ITEMS` or `AMONG_COLD_ITEMS`, which the rows get

    Returns
    -------
    A row per k × model × metric of `TRUTH_METRICS` and coverage, over the users who acted on one of
    `items` in the horizon; these are the truth, and other items in a list are misses. Then, for
    model `population` with k = 0: n_users, and n_items. No rows without such users. `diff` is null:
    what a baseline like popularity knows is nothing.

    Cost: that of `evaluate` for one mode.
    """
    catalogue_of_cold = Catalogue(items, np.ones(len(items), np.int64))
    head: dict[str, Any] = {"run_date": run_date, "kind": kind, "cutoff": cutoff}
    without_baseline = settings.model_copy(update={"baseline": ""})
    rows = evaluate(
        lists,
        users,
        catalogue_of_cold,
        without_baseline,
        **head,
        models=models,
        modes=("novel",),
    )
    kept = (*TRUTH_METRICS, "coverage")
    of_all = [
        row._replace(segment=segment)
        for row in rows
        if row.segment == "all" and (row.metric in kept or row.metric == "n_users")
    ]
    if not any(row.model != POPULATION for row in of_all):
        return []
    [population_row] = [row for row in of_all if row.model == POPULATION]
    n_items = population_row._replace(metric="n_items", value=float(len(items)))
    return [*of_all, n_items]


def nobody_known(
    users: DataFrame, settings: Evaluate, *, run_date: date, kind: str, cutoff: datetime
) -> list[MetricRow]:
    """Return the rows of table `metrics` for a cutoff before which no item has an event.

    No model can be compared then. Of the rows that `evaluate` returns, only those of model
    `population` remain, and every user and item counts as cold. Cost: two jobs, which count rows.
    """
    sampled = users.where(in_sample(users, settings))
    n_users, n_items = sampled.agg(F.count(F.lit(1)), F.sum(F.size("items"))).collect()[0]
    counts = {
        "n_users": n_users,
        "n_cold_users": n_users,
        "n_cold_items_in_truth": n_items or 0,
    }
    head = (run_date, kind, cutoff, settings.horizon_days, POPULATION)
    return [
        MetricRow(*head, mode, "all", metric, 0, float(value), n_users)
        for mode in schema.MODES
        for metric, value in counts.items()
    ]


# --- the rows that kernel.py reads ---------------------------------------------------------------


def rows_by_user(lists: DataFrame, users: DataFrame, plan: Plan) -> DataFrame:
    """Return `user_idx, part, rank, item_idx` as kernel.py reads them, sorted by user.

    Cost: one shuffle.
    """
    rows = _user_rows(users, plan).unionByName(_list_rows(lists, plan))
    return rows.repartition("user_idx").sortWithinPartitions("user_idx")


def in_sample(users: DataFrame, settings: Evaluate, n_users: int | None = None) -> Column:
    """Return a column that says whether a user is evaluated; see `hash_sample`.

    `users` are the users with truth, and `n_users` is their number where it is known.
    """
    return hash_sample(users, settings.max_eval_users, settings.seed, n_users)


def _user_rows(users: DataFrame, plan: Plan) -> DataFrame:
    """Return the row of each user's segment, and the rows of the user's truth in each mode."""
    unknown = F.raise_error(F.concat(F.lit("users: no segment is called "), "segment"))
    code = _position("segment", SEGMENTS_OF_USERS)
    segment = F.when(code < 0, unknown.cast("int")).otherwise(code)
    rows = [F.array(_row(SEGMENT_PART, segment))]
    for mode, name in enumerate(plan.modes):
        truth_items = F.array_except("items", "seen") if name == "novel" else F.col("items")
        rows.append(_rows(plan.truth_part(mode), truth_items))
    return users.select("user_idx", F.inline(F.concat(*rows)))


def _rows(part: int, items: Column) -> Column:
    return F.transform(items, lambda item: _row(part, item))


def _row(part: int, item_idx: Column) -> Column:
    return F.struct(F.lit(part).alias("part"), F.lit(1).alias("rank"), item_idx.alias("item_idx"))


def _list_rows(lists: DataFrame, plan: Plan) -> DataFrame:
    """Return the rows of each model's list in each mode."""
    mode, model = _position("mode", plan.modes), _position("model", plan.models)
    part = F.lit(plan.first_list_part(0)) + mode * F.lit(len(plan.models)) + model
    return lists.where(
        F.col("mode").isin(*plan.modes)
        & F.col("model").isin(*plan.models)
        & F.col("rank").between(1, plan.longest)
    ).select("user_idx", part.alias("part"), "rank", "item_idx")


def _position(column: str, names: Sequence[str]) -> Column:
    """Return the position of the value of `column` in `names`, int; -1 for any other value."""
    values = F.array(*[F.lit(name) for name in names])
    return (F.array_position(values, F.col(column)) - 1).cast("int")


# --- figures, on the driver ---------------------------------------------------------------------

_Head = tuple[date, str, datetime, int]  # run_date, kind, cutoff, horizon_days


def _mode_rows(
    head: _Head,
    mode: int,
    sums_of: dict[tuple[int, str], Sums],
    plan: Plan,
    baseline: str | None,
) -> Iterator[MetricRow]:
    """Yield the rows of one mode: the rows of each segment, then the rows of the population.

    `head` holds the first columns of every row. `sums_of` holds sums by (mode, segment of users).
    """
    totals = {}
    for segment, segments_of_users in SEGMENTS.items():
        sums = [sums_of[mode, name] for name in segments_of_users if (mode, name) in sums_of]
        totals[segment] = reduce(Sums.__add__, sums, Sums.zero(plan))
    for segment, total in totals.items():
        if total.n_users:
            yield from _segment_rows(head, plan.modes[mode], segment, total, plan, baseline)
    counts = {
        "n_users": totals["all"].n_users,
        "n_cold_users": totals["cold"].n_users,
        "n_cold_items_in_truth": totals["all"].n_cold_items,
    }
    for metric, value in counts.items():
        columns = (POPULATION, plan.modes[mode], "all")
        yield MetricRow(*head, *columns, metric, 0, float(value), totals["all"].n_users)


def _segment_rows(
    head: _Head, mode: str, segment: str, total: Sums, plan: Plan, baseline: str | None
) -> Iterator[MetricRow]:
    """Yield the rows of one mode and segment, ordered by k, model and metric.

    `total` are the sums over the users of the segment.
    """
    means, counts = total.means, total.counts  # (1 + n_bootstrap, n_metrics, n_ks, n_models)
    covered = np.array(  # (n_ks, n_models)
        [
            [coverage(total.is_listed(i_k, i_model, plan)) for i_model in range(len(plan.models))]
            for i_k in range(len(plan.ks))
        ]
    )
    diffs, covered_diffs = np.full_like(means, np.nan), np.full_like(covered, np.nan)
    if baseline:
        baseline_index = plan.models.index(baseline)
        diffs, covered_diffs = (
            means - means[..., [baseline_index]],
            covered - covered[:, [baseline_index]],
        )
    interval_ends = percentile_interval(diffs[1:].reshape(plan.n_bootstrap, diffs[0].size))
    low, high = (values.reshape(diffs[0].shape) for values in interval_ends)
    for i_k, k in enumerate(plan.ks):
        for i_model, model in enumerate(plan.models):
            model_columns = (model, mode, segment)
            for i_metric, metric in enumerate(METRICS):
                value, n_users = (
                    _number(means[0, i_metric, i_k, i_model]),
                    int(counts[0, i_metric, i_k, i_model]),
                )
                difference = (
                    diffs[0, i_metric, i_k, i_model],
                    low[i_metric, i_k, i_model],
                    high[i_metric, i_k, i_model],
                )
                yield MetricRow(
                    *head,
                    *model_columns,
                    metric,
                    k,
                    value,
                    n_users,
                    baseline,
                    *map(_number, difference),
                )
            item_coverage, diff = (
                _number(covered[i_k, i_model]),
                _number(covered_diffs[i_k, i_model]),
            )
            yield MetricRow(
                *head, *model_columns, "coverage", k, item_coverage, total.n_users, baseline, diff
            )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

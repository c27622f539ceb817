"""Re-ranks lists by the rules of the settings: section `rules` (`recspark.config.rules`).

`hybrid.ladder.fill` gives each user a pool, which is longer than a list. Rules choose among the
items of the pool and order them; the first k are the list. They never add an item. Rules that leave
items out come first, then the rules that order or cap, both in the order of the setting. Else a
rule that caps could keep an item that a later rule leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType

from recspark import schema
from recspark.config.rules import (
    SEGMENTS,
    Calibrated,
    Cap,
    Diversity,
    ExcludeBought,
    Freshness,
    LeaveOut,
    Pin,
    PriceBand,
    RuleBase,
    SelectingRule,
)
from recspark.data.blocks import MICROS_PER_DAY, Array, Histories, local_index, parse_histories
from recspark.errors import ModelError
from recspark.hybrid import rule_kernels
from recspark.hybrid.ladder import FILLED
from recspark.hybrid.rule_items import RuleItems, check_known
from recspark.hybrid.rule_kernels import Similarity

# The rows that `apply` returns. `rules` names the rules that let the row in or raised it.
RERANKED = StructType([*FILLED.fields, StructField("rules", schema.STRINGS, True)])
UNCHANGED = "unchanged"  # the `source` of a row that an earlier night has re-ranked
_COLD = SEGMENTS.index("cold")


@dataclass(frozen=True)
class Pools:
    """The pools of n users, in the order of their rows: entries of one user follow one another.

    `row` int64 (p,), ascending: the user of each entry. `item` int64 (p,): the local index of its
    item. `n_users` : users, also those without an entry.
    """

    row: Array
    item: Array
    n_users: int

    @property
    def start(self) -> Array:
        """User u has the entries `start[u]:start[u + 1]`; int64 (n_users + 1,)."""
        return np.searchsorted(self.row, np.arange(self.n_users + 1))

    @property
    def place(self) -> Array:
        """The place of each entry in its user's pool, from 0; int64 (p,)."""
        return np.arange(len(self.row)) - self.start[self.row]

    def take(self, entries: Array) -> Pools:
        """Return the pools of `entries`, positions of entries by user."""
        return Pools(self.row[entries], self.item[entries], self.n_users)


@dataclass(frozen=True)
class Users:
    """What rules read of the n users of `Pools`.

    `segment` int64 (n,): positions in `SEGMENTS`. `history` : the events before the cutoff, with
    local indexes of items (-1 = not among the items).
    """

    segment: Array
    history: Histories


class Step(Protocol):
    """What a rule does with pools; it is sent to the executors, so it can be pickled."""

    def entries(self, pools: Pools, users: Users, k: int) -> Array:
        """Return the entries that stay, int64, by user and in their new order.

        No entry is returned twice. `k` : of each user, the first k suffice.
        """


@dataclass(frozen=True)
class _LeaveOut:
    is_left_out: Array  # bool (n_items,)

    def entries(self, pools: Pools, users: Users, k: int) -> Array:
        return np.flatnonzero(~self.is_left_out[pools.item])


@dataclass(frozen=True)
class _PriceBand:
    price: Array  # float64 (n_items,), NaN = unknown
    factor: float

    def entries(self, pools: Pools, users: Users, k: int) -> Array:
        history, n = users.history, pools.n_users
        price = np.where(history.item_idx >= 0, self.price[history.item_idx], np.nan)
        has_price = ~np.isnan(price)
        rows = history.rows[has_price]
        n_prices = np.bincount(rows, minlength=n)
        total = np.bincount(rows, weights=price[has_price], minlength=n)
        mean = np.divide(total, n_prices, out=np.full(n, np.nan), where=n_prices > 0)[pools.row]
        price = self.price[pools.item]
        # A comparison with NaN is false: without a price of the item or of the user it stays.
        is_far = (price > mean * self.factor) | (price < mean / self.factor)
        return np.flatnonzero(~is_far)


@dataclass(frozen=True)
class _ExcludeBought:
    days: Array  # float64 (n_items,), inf = for ever
    as_of: int  # microseconds since 1970 UTC

    def entries(self, pools: Pools, users: Users, k: int) -> Array:
        history = users.history
        is_known = history.item_idx >= 0
        key = history.rows[is_known] * len(self.days) + history.item_idx[is_known]
        order = np.lexsort((history.event_at[is_known], key))
        key, event_at = key[order], history.event_at[is_known][order]
        wanted = pools.row * len(self.days) + pools.item
        last = np.searchsorted(key, wanted, side="right") - 1  # the newest event of the item
        is_bought = last >= 0
        is_bought[is_bought] = key[last[is_bought]] == wanted[is_bought]
        age_days = np.full(len(wanted), np.inf)
        age_days[is_bought] = (self.as_of - event_at[last[is_bought]]) / MICROS_PER_DAY
        return np.flatnonzero(~(is_bought & (age_days < self.days[pools.item])))


@dataclass(frozen=True)
class _ToTheTop:
    is_raised: Array  # bool (n_items,)
    places: int

    def entries(self, pools: Pools, users: Users, k: int) -> Array:
        is_raised = self.is_raised[pools.item]
        nth = np.cumsum(is_raised)
        n_before = np.concatenate([[0], nth])[pools.start[pools.row]]  # of the users before
        is_raised &= nth - n_before <= self.places
        return np.lexsort((pools.place, ~is_raised, pools.row))


@dataclass(frozen=True)
class _CapOfGroups:
    group: Array  # int32 (n_items,); the smallest number and -1 = no group
    at_most: int

    def entries(self, pools: Pools, users: Users, k: int) -> Array:
        group = self.group[pools.item]
        order = np.lexsort((pools.place, group, pools.row))
        row, sorted_group = pools.row[order], group[order]
        is_first = np.ones(len(order), bool)
        is_first[1:] = (row[1:] != row[:-1]) | (sorted_group[1:] != sorted_group[:-1])
        begin = np.flatnonzero(is_first)
        nth = np.arange(len(order)) - np.repeat(begin, np.diff([*begin, len(order)]))
        is_kept = np.zeros(len(order), bool)
        has_group = (sorted_group != -1) & (sorted_group != np.iinfo(np.int32).min)
        is_kept[order] = (nth < self.at_most) | ~has_group
        return np.flatnonzero(is_kept)


@dataclass(frozen=True)
class _CapOfSimilar:
    similarity: Similarity
    at_most: int
    least: float

    def entries(self, pools: Pools, users: Users, k: int) -> Array:
        is_kept = rule_kernels.capped(
            pools.start, pools.item, self.similarity, self.at_most, self.least, k
        )
        return np.flatnonzero(is_kept)


@dataclass(frozen=True)
class _Diversity:
    similarity: Similarity
    relevance: float
    pool: int

    def entries(self, pools: Pools, users: Users, k: int) -> Array:
        return rule_kernels.diverse(
            pools.start, pools.item, self.similarity, self.relevance, self.pool, k
        )


@dataclass(frozen=True)
class _Calibrated:
    category: Array  # int32 (n_items,), -1 = none
    weight: float
    pool: int

    def entries(self, pools: Pools, users: Users, k: int) -> Array:
        history = users.history
        code = np.where(history.item_idx >= 0, self.category[history.item_idx], -1)
        pairs, n_events = np.unique(
            np.stack([history.rows[code >= 0], code[code >= 0]], axis=1), axis=0, return_counts=True
        )
        total = np.bincount(pairs[:, 0], weights=n_events, minlength=pools.n_users)
        return rule_kernels.calibrated(
            pools.start,
            self.category[pools.item],
            np.searchsorted(pairs[:, 0], np.arange(pools.n_users + 1)),
            pairs[:, 1].astype(np.int32),
            n_events / total[pairs[:, 0]],
            self.weight,
            self.pool,
            k,
        )


@dataclass(frozen=True)
class AppliedRule:
    """A rule of the settings, with what it reads of the items.

    Parameters
    ----------
    name : as the column `rules` has it
    segments : positions in `SEGMENTS` of the users whom it concerns; () = all users
    leaves_out : whether it only leaves items out
    raises : whether it orders items; otherwise it keeps their order
    step : what it does
    """

    name: str
    segments: tuple[int, ...]
    leaves_out: bool
    raises: bool
    step: Step


@dataclass(frozen=True)
class RuleBook:
    """The rules of one list, in the order in which they are applied.

    `items` int32 (n_items,), ascending: the item_idx of each local index. `pool` : the length of a
    user's pool. `reads_segments` and `reads_histories` say which columns `apply` reads of the users.
    """

    rules: tuple[AppliedRule, ...]
    items: Array
    pool: int
    reads_segments: bool
    reads_histories: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the rules."""
        return tuple(rule.name for rule in self.rules)


def refused_items(book: RuleBook) -> Array:
    """Return the item_idx of the items that a rule leaves out for some users, whatever they did."""
    masks = [rule.step.is_left_out for rule in book.rules if isinstance(rule.step, _LeaveOut)]
    is_left_out = np.logical_or.reduce([np.zeros(len(book.items), bool), *masks])
    return np.asarray(book.items[is_left_out])


def vector_models(rules: Iterable[RuleBase]) -> list[str]:
    """Return the models whose item vectors the rules read."""
    names = [rule.by for rule in rules if isinstance(rule, Diversity)]
    return [name for name in dict.fromkeys(names) if name not in ("category", "name")]


def check(rules: Mapping[str, RuleBase], items: RuleItems) -> None:
    """Raise ConfigError, with a suggestion, where a rule names an item, a category or a word that
    `items` do not have.
    """
    for name, rule in rules.items():
        if isinstance(rule, SelectingRule):
            items.check(name, rule)
        if isinstance(rule, ExcludeBought):
            setting = f"rules.{name}.categories"
            check_known(setting, "categories", rule.categories, items.categories[1])


def rule_book(
    rules: Mapping[str, RuleBase],
    items: RuleItems,
    as_of: int,
    pool: int,
    vectors: Mapping[str, tuple[Array, Array]],
) -> RuleBook:
    """Return the rules of a list, ready to be applied.

    Parameters
    ----------
    rules : name -> rule, in the order of the list's setting
    items : all items as of the cutoff
    as_of : the cutoff, in microseconds since 1970 UTC
    pool : the length of a user's pool
    vectors : model -> item_idx (m,) and vectors (m, size), of the models of `vector_models`

    Where a list has several rules that need the same similarity, it is computed once.
    """
    steps = {name: _step(rule, items, as_of, pool, vectors) for name, rule in rules.items()}
    applied = [
        AppliedRule(
            name,
            tuple(SEGMENTS.index(segment) for segment in rule.segments),
            isinstance(steps[name], _LeaveOut | _PriceBand | _ExcludeBought),
            isinstance(steps[name], _ToTheTop | _Diversity | _Calibrated),
            steps[name],
        )
        for name, rule in rules.items()
    ]
    applied.sort(key=lambda rule: not rule.leaves_out)  # stable: each group keeps its order
    return RuleBook(
        tuple(applied),
        items.items,
        pool,
        any(rule.segments for rule in applied),
        any(isinstance(rule.step, _PriceBand | _ExcludeBought | _Calibrated) for rule in applied),
    )


def _step(
    rule: RuleBase,
    items: RuleItems,
    as_of: int,
    pool: int,
    vectors: Mapping[str, tuple[Array, Array]],
) -> Step:
    match rule:
        case LeaveOut():
            return _LeaveOut(items.selected(rule))
        case Pin():
            return _ToTheTop(items.selected(rule), rule.places)
        case Freshness():
            is_new = ~(items.age_days > rule.days)  # also without an event (NaN)
            return (
                _LeaveOut(~is_new) if rule.older == "leave_out" else _ToTheTop(is_new, rule.places)
            )
        case PriceBand():
            return _PriceBand(items.price, rule.factor)
        case ExcludeBought():
            return _ExcludeBought(items.days_after_event(rule.categories, rule.days), as_of)
        case Cap(by="name"):
            return _CapOfSimilar(items.name_similarity, rule.at_most, rule.similarity)
        case Cap(by="price"):
            return _CapOfGroups(items.price_step(rule.factor), rule.at_most)
        case Cap():
            return _CapOfGroups(items.category_at(rule.level), rule.at_most)
        case Diversity():
            return _Diversity(_similarity(rule.by, items, vectors), rule.relevance, pool)
        case Calibrated():
            return _Calibrated(items.category_at(rule.level), rule.weight, pool)
    raise NotImplementedError(f"rule of the kind {type(rule).__name__}")


def _similarity(
    by: str, items: RuleItems, vectors: Mapping[str, tuple[Array, Array]]
) -> Similarity:
    if by == "category":
        return items.category_similarity
    if by == "name":
        return items.name_similarity
    item_idx, of_model = vectors[by]
    local = local_index(items.items, item_idx)
    of_items = np.zeros((len(items), of_model.shape[1]), np.float32)
    of_items[local[local >= 0]] = of_model[local >= 0]
    return Similarity.of_vectors(of_items)


# --- on a block of users -------------------------------------------------------------------------


def rerank(
    pools: Pools, users: Users, rules: Sequence[AppliedRule], k: int, fixed: Array | None = None
) -> tuple[Array, Array]:
    """Return the entries of the lists, and which rules each owes its place to.

    Parameters
    ----------
    pools : the users' pools
    users : the same users
    rules : in the order in which they are applied
    k : the length of a list
    fixed : bool (n_users,): users whose pool no rule changes; None = there are none

    Returns
    -------
    entries : int64 (m,), by user, then in the order of the list; at most k of each user
    marks : bool (m, n_rules): the rule took the entry from behind the first k to among them, or it
        orders and put the entry before its former place
    """
    entries = np.arange(len(pools.row))
    marks = np.zeros((len(entries), len(rules)), bool)
    n_rules = len(rules)
    for number, rule in enumerate(rules):
        before = pools.take(entries)
        is_concerned = np.ones(pools.n_users, bool) if fixed is None else ~fixed
        if rule.segments:
            is_concerned &= np.isin(users.segment, rule.segments)
        concerned = np.flatnonzero(is_concerned[before.row])
        others = np.flatnonzero(~is_concerned[before.row])
        n_needed = k if number == n_rules - 1 else len(entries)
        stay = concerned[rule.step.entries(before.take(concerned), users, n_needed)]
        stay = np.concatenate([stay, others])
        stay = stay[np.argsort(before.row[stay], kind="stable")]
        old_place = before.place[stay]
        entries = entries[stay]
        new_place = pools.take(entries).place
        has_come_in = (old_place >= k) & (new_place < k)
        is_raised = rule.raises & (new_place < old_place)
        marks[entries, number] = has_come_in | is_raised
    entries = entries[pools.take(entries).place < k]
    return entries, marks[entries]


# --- on Spark ------------------------------------------------------------------------------------


def user_columns(book: RuleBook) -> list[Column]:
    """Return the columns that `apply` reads of `activity` and `history`, beside `user_idx`."""
    of_event = lambda event: F.struct(event["item_idx"], event["event_at"])
    columns = [F.col("user_idx")]
    if book.reads_segments:
        columns.append(F.col("activity"))
    if book.reads_histories:
        columns.append(F.transform("history", of_event).alias("history"))
    return columns


def apply(rows: DataFrame, book: RuleBook, users: DataFrame | None, k: int) -> DataFrame:
    """Return the lists that the rules of `book` make of pools: `RERANKED`.

    Parameters
    ----------
    rows : `FILLED` rows of `hybrid.ladder.fill` with `book.pool` items of each user. A user with a
        row of the source `unchanged` keeps the list: an earlier night has applied the rules to it
    book : the rules
    users : `user_columns(book)`, a row per user; None where the book reads nothing of the users.
        A user without a row has the segment `cold` and no events
    k : the length of a list

    Ranks count from 1 without gaps. A list has at most k items of the user's pool, and no item
    twice; it is shorter than k only where the rules leave fewer items. What one user gets depends on
    no other user, and not on the order of the rows.

    Lazy. No shuffle of `rows`, which `fill` has brought together by user; one of `users`. A task
    holds the pools of one Arrow batch of users.
    """
    of_row = F.struct("rank", *[name for name in FILLED.names if name not in ("user_idx", "rank")])
    pools = rows.groupBy("user_idx").agg(F.array_sort(F.collect_list(of_row)).alias("pool"))
    if users is not None:
        pools = pools.join(users, on="user_idx", how="left")
    shared = rows.sparkSession.sparkContext.broadcast(book)

    def rerank_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield _rerank_batch(batch, shared.value, k)

    return pools.mapInArrow(rerank_batches, RERANKED)


def _rerank_batch(batch: pa.RecordBatch, book: RuleBook, k: int) -> pa.RecordBatch:
    column = batch.column("pool")
    pool = column.flatten()
    row = np.repeat(np.arange(batch.num_rows), column.value_lengths().to_numpy())
    item = local_index(book.items, pool.field("item_idx").to_numpy())
    if (item < 0).any():
        raise ModelError("a list holds an item that is not in item_ids: are the pins of one run?")
    fixed = np.zeros(batch.num_rows, bool)
    is_unchanged = pc.equal(pool.field("source"), UNCHANGED).to_numpy(zero_copy_only=False)
    fixed[row[is_unchanged]] = True
    pools = Pools(row, item, batch.num_rows)
    entries, marks = rerank(pools, _users(batch, book), book.rules, k, fixed)
    taken = pa.array(entries)
    names = pa.array(book.names, pa.string())
    start = np.concatenate([[0], np.cumsum(marks.sum(axis=1))]).astype(np.int32)
    rules = pa.ListArray.from_arrays(
        pa.array(start), names.take(pa.array(np.nonzero(marks)[1], pa.int64()))
    )
    place = pools.take(entries).place
    return pa.RecordBatch.from_arrays(
        [
            batch.column("user_idx").take(pa.array(row[entries])),
            pool.field("item_idx").take(taken),
            pa.array((place + 1).astype(np.int32)),
            *(pool.field(name).take(taken) for name in ("score", "model", "source", "because")),
            rules,
        ],
        names=RERANKED.names,
    )


def _users(batch: pa.RecordBatch, book: RuleBook) -> Users:
    n = batch.num_rows
    segment = np.full(n, _COLD)
    if book.reads_segments:
        value_set = pa.array(SEGMENTS, pa.string())
        codes = pc.index_in(batch.column("activity"), value_set=value_set).fill_null(_COLD)
        segment = codes.to_numpy(zero_copy_only=False).astype(np.int64)
    if not book.reads_histories:
        return Users(segment, Histories(np.zeros(n + 1, np.int64), *[np.zeros(0, np.int64)] * 3))
    history = parse_histories(batch.column("history"))
    local = local_index(book.items, history.item_idx).astype(np.int64)
    return Users(segment, Histories(history.start, local, history.event_at, history.weight))

"""The rules of tonight's lists, with what they read of items and users as of a cutoff."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from datetime import datetime

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Rule
from recspark.config.rules import Freshness, LeaveOut
from recspark.data import features
from recspark.data.blocks import micros
from recspark.data.interactions import before
from recspark.hybrid.ladder import fill
from recspark.hybrid.rule_items import RuleItems
from recspark.hybrid.rules import (
    RuleBook,
    apply,
    check,
    refused_items,
    rule_book,
    user_columns,
    vector_models,
)
from recspark.pipeline.context import RunContext
from recspark.pipeline.item_vectors import vectors_of
from recspark.pipeline.training_sets import features_as_of


class NightRules:
    """The rules of the settings, as of a cutoff.

    What they read of the items comes to the driver once, when it is first needed (one job: names,
    categories, prices and ages), whatever the number of lists. Where no list has rules, no job runs.
    """

    def __init__(self, context: RunContext, cutoff: datetime) -> None:
        self._context = context
        self._cutoff = cutoff

    @functools.cached_property
    def _items(self) -> RuleItems:
        return items_of_rules(self._context, self._cutoff)

    def check(self, names: Iterable[str]) -> None:
        """Raise ConfigError where one of these rules names an item, a category or a word that no
        item has at the cutoff.
        """
        if rules := self._named(names):
            check(rules, self._items)

    def book(self, names: Iterable[str]) -> RuleBook | None:
        """Return the rules of one list, in this order; None where `names` is empty.

        Cost: one job for each encoder whose vectors a rule reads.
        """
        rules = self._named(names)
        if not rules:
            return None
        vectors = {
            model: vectors_of(self._context, model, self._cutoff)
            for model in vector_models(rules.values())
        }
        pool = self._context.config.publish.pool
        return rule_book(rules, self._items, micros(self._cutoff), pool, vectors)

    def _named(self, names: Iterable[str]) -> dict[str, Rule]:
        return {name: self._context.config.rules[name] for name in names}


def refused_tonight(context: RunContext) -> DataFrame | None:
    """Return `list, item_idx` of the items that a rule of the list leaves out tonight, for all users
    or some; None where no rule leaves out items.

    The list of an earlier night does not hold where it has such an item: the item may have grown
    too old, or come into another category.
    """
    rules, night_rules = context.config.rules, NightRules(context, context.cutoffs.tonight)
    refused: list[pa.Table] = []
    for published_list in context.config.publish.published_lists:
        leaving_out = [
            name for name in published_list.rules if isinstance(rules[name], LeaveOut | Freshness)
        ]
        if (book := night_rules.book(leaving_out)) is not None:
            items = refused_items(book)
            names = pa.array([published_list.name] * len(items), pa.string())
            refused.append(pa.table({"list": names, "item_idx": items}))
    return context.spark.createDataFrame(pa.concat_tables(refused)) if refused else None


def items_of_rules(context: RunContext, cutoff: datetime) -> RuleItems:
    """Return all items of the dictionary, as they were described before `cutoff`."""
    described = features.items_as_of(context.read("items"), cutoff)
    _, item_features = features_as_of(context, cutoff)
    rows = (
        context.read("item_ids")
        .select("item_idx", "item_id")
        .join(
            described.select("item_idx", "item_name", "category", "price"),
            on="item_idx",
            how="left",
        )
        .join(item_features.select("item_idx", "age_days"), on="item_idx", how="left")
    )
    return RuleItems.of(rows)


def users_of(context: RunContext, book: RuleBook, cutoff: datetime) -> DataFrame | None:
    """Return what `book` reads of the users as of `cutoff`; None where it reads nothing."""
    if not (book.reads_segments or book.reads_histories):
        return None
    users, _ = features_as_of(context, cutoff)
    users = users.select("user_idx", "activity")
    if book.reads_histories:
        histories = before(context.read("histories"), cutoff)
        users = users.join(histories.select("user_idx", "history"), on="user_idx", how="inner")
    return users.select(*user_columns(book))


def filled_lists(
    context: RunContext,
    steps: Sequence[tuple[str, DataFrame]],
    users: DataFrame,
    k: int,
    cutoff: datetime,
    unchanged_lists: DataFrame | None = None,
    book: RuleBook | None = None,
) -> DataFrame:
    """Return the lists that the ladder fills and the rules re-rank: `hybrid.rules.RERANKED`.

    Parameters
    ----------
    steps, users, k : as `hybrid.ladder.fill` takes them
    cutoff : of the lists
    unchanged_lists : as `fill` takes them, with their column `rules`
    book : the rules; None = none, and then the plan is that of `fill` alone, with an empty column
        `rules`
    """
    if book is None:
        filled = fill(steps, users, k, unchanged_lists)
        return filled.withColumn("rules", F.array().cast(schema.STRINGS))
    pools = fill(steps, users, max(book.pool, k), unchanged_lists)
    lists = apply(pools, book, users_of(context, book, cutoff), k)
    return lists if unchanged_lists is None else _with_earlier_rules(lists, unchanged_lists)


def _with_earlier_rules(lists: DataFrame, unchanged_lists: DataFrame) -> DataFrame:
    # An unchanged row keeps what its own night wrote into `rules`.
    earlier = unchanged_lists.select("user_idx", "item_idx", F.col("rules").alias("earlier_rules"))
    return lists.join(earlier, on=["user_idx", "item_idx"], how="left").select(
        *[name for name in lists.columns if name != "rules"],
        F.coalesce("earlier_rules", "rules").alias("rules"),
    )

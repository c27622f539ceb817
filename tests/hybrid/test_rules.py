"""Each rule does to a user's pool what a plain loop over one user does; and the column `rules` says
so."""

from __future__ import annotations

import math
import re
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from pydantic import TypeAdapter
from pyspark.sql import DataFrame, SparkSession

from recspark import schema
from recspark.config.rules import SEGMENTS, Rule
from recspark.data.blocks import MICROS_PER_DAY, Histories
from recspark.errors import ConfigError
from recspark.hybrid import ladder, rules
from recspark.hybrid.rule_items import RuleItems
from recspark.hybrid.rules import Pools, Users

RULE: TypeAdapter[Any] = TypeAdapter(Rule)
POOL = 12
TODAY = 100 * MICROS_PER_DAY

Item = dict[str, Any]
User = dict[str, Any]  # segment, pool (positions of items), history ((position, days ago), …)

# Twelve items: two families of names, categories of two levels, one price missing, one never sold.
ITEMS: list[Item] = [
    {"name": "Hot water bottle, red", "category": ["Home", "Warm"], "price": 4.0, "age": 3.0},
    {"name": "HOT WATER BOTTLE white", "category": ["Home", "Warm"], "price": 4.5, "age": 90.0},
    {"name": "Hot-water bottle", "category": ["Home", "Cold"], "price": 40.0, "age": 50.0},
    {"name": "Jumbo bag red", "category": ["Bags"], "price": 2.0, "age": 7.0},
    {"name": "Jumbo bag blue", "category": ["Bags"], "price": 2.1, "age": 8.0},
    {"name": "Tea pot", "category": ["Home", "Tea"], "price": None, "age": 60.0},
    {"name": "Tea pot small", "category": ["Home", "Tea"], "price": 9.0, "age": None},
    {"name": None, "category": None, "price": 1.0, "age": 1.0},
    {"name": "Red candle", "category": [], "price": 0.0, "age": 30.0},
    {"name": "Candle", "category": ["Home"], "price": 1.1, "age": 2.0},
    {"name": "!?", "category": ["Warm"], "price": 100.0, "age": 4.0},
    {"name": "White candle", "category": ["Tea", "Home"], "price": 1.2, "age": 80.0},
]
N = len(ITEMS)
VECTORS = np.array([[math.cos(i), math.sin(i)] for i in range(N - 1)], np.float32)  # of all but one


def rule_items() -> RuleItems:
    return RuleItems(
        np.arange(N, dtype=np.int32) * 10 + 5,
        pa.array([f"i{n}" for n in range(N)]),
        pa.array([item["name"] for item in ITEMS], pa.string()),
        pa.array([item["category"] for item in ITEMS], pa.list_(pa.string())),
        np.array([math.nan if i["price"] is None else i["price"] for i in ITEMS]),
        np.array([math.nan if i["age"] is None else i["age"] for i in ITEMS]),
    )


def book_of(settings: dict[str, dict[str, Any]]) -> rules.RuleBook:
    parsed = {name: RULE.validate_python(values) for name, values in settings.items()}
    items = rule_items()
    rules.check(parsed, items)
    return rules.rule_book(parsed, items, TODAY, POOL, {"words": (items.items[:-1], VECTORS)})


def reranked(users: list[User], book: rules.RuleBook, k: int) -> list[list[tuple[int, list[str]]]]:
    """Each user's list: (position of the item, names of rules)."""
    pools = Pools(
        np.repeat(np.arange(len(users)), [len(user["pool"]) for user in users]),
        np.array([item for user in users for item in user["pool"]], np.int64),
        len(users),
    )
    events = [event for user in users for event in reversed(user["history"])]
    start = np.cumsum([0, *(len(user["history"]) for user in users)])
    history = Histories(
        start,
        np.array([item for item, _ in events], np.int64),
        np.array([TODAY - round(days * MICROS_PER_DAY) for _, days in events], np.int64),
        np.ones(len(events), np.float32),
    )
    segment = np.array([SEGMENTS.index(user["segment"]) for user in users])
    entries, marks = rules.rerank(pools, Users(segment, history), book.rules, k)
    lists: list[list[tuple[int, list[str]]]] = [[] for _ in users]
    for entry, marked in zip(entries, marks):
        names = [name for name, is_marked in zip(book.names, marked) if is_marked]
        lists[pools.row[entry]].append((int(pools.item[entry]), names))
    return lists


# --- the same by plain loops, on one user at a time ----------------------------------------------


def words(item: int) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", (ITEMS[item]["name"] or "").lower()))


def weight_of_word(word: str) -> float:
    return math.log((N + 1) / sum(word in words(item) for item in range(N)))


def similarity(by: str, a: int, b: int) -> float:
    if by == "words":  # the model of VECTORS
        return float(VECTORS[a] @ VECTORS[b]) if max(a, b) < N - 1 else 0.0
    if by == "name":
        common = sum(map(weight_of_word, words(a) & words(b)))
        total = sum(map(weight_of_word, words(a) | words(b)))
    else:
        left, right = (set(ITEMS[item]["category"] or []) for item in (a, b))
        common, total = len(left & right), len(left | right)
    return common / total if total else 0.0


def names_item(rule: dict[str, Any], item: int) -> bool:
    return (
        f"i{item}" in rule.get("items", ())
        or not {*rule.get("categories", ())}.isdisjoint(ITEMS[item]["category"] or [])
        or not {w.lower() for w in rule.get("words", ())}.isdisjoint(words(item))
    )


def leave(rule: dict[str, Any], user: User, pool: list[int]) -> list[int]:
    """What stays of the pool, where the rule only leaves items out."""
    kept = []
    prices = [ITEMS[item]["price"] for item, _ in user["history"]]
    prices = [price for price in prices if price is not None]
    for item in pool:
        price = ITEMS[item]["price"]
        if rule["kind"] == "leave_out":
            out = names_item(rule, item)
        elif rule["kind"] == "freshness":
            out = ITEMS[item]["age"] is not None and ITEMS[item]["age"] > rule["days"]
        elif rule["kind"] == "price_band":
            mean = sum(prices) / len(prices) if prices else None
            out = (
                mean is not None
                and price is not None
                and not (mean / rule["factor"] <= price <= mean * rule["factor"])
            )
        else:
            days = rule.get("days")
            for category in ITEMS[item]["category"] or []:
                days = rule.get("categories", {}).get(category, days)
            ages = [age for bought, age in user["history"] if bought == item]
            out = bool(ages) and min(ages) < (math.inf if days is None else days)
        if not out:
            kept.append(item)
    return kept


def order(rule: dict[str, Any], user: User, pool: list[int]) -> list[int]:
    """The pool in its new order, or capped."""
    if rule["kind"] in ("pin", "freshness"):
        is_up = [
            names_item(rule, item)
            if rule["kind"] == "pin"
            else ITEMS[item]["age"] is None or ITEMS[item]["age"] <= rule["days"]
            for item in pool
        ]
        up = [item for item, is_it in zip(pool, is_up) if is_it][: rule.get("places", 2)]
        return up + [item for item in pool if item not in up]
    picked: list[int] = []
    if rule["kind"] == "cap":

        def alike(a: int, b: int) -> bool:
            if rule["by"] == "name":
                return similarity("name", a, b) >= rule["similarity"]
            if rule["by"] == "price":
                steps = [
                    math.floor(math.log(price) / math.log(rule["factor"])) if price else None
                    for price in (ITEMS[a]["price"], ITEMS[b]["price"])
                ]
                return steps[0] is not None and steps[0] == steps[1]
            level = rule["level"] - 1
            at_level = [(ITEMS[item]["category"] or [])[level : level + 1] for item in (a, b)]
            return at_level[0] != [] and at_level[0] == at_level[1]

        for item in pool:
            if sum(alike(item, other) for other in picked) < rule["at_most"]:
                picked.append(item)
        return picked

    def value(item: int) -> float:
        relevance = 1 - pool.index(item) / POOL
        if rule["kind"] == "diversity":
            closest = max((similarity(rule["by"], item, other) for other in picked), default=0.0)
            return rule["relevance"] * relevance - (1 - rule["relevance"]) * closest
        return (1 - rule["weight"]) * relevance - rule["weight"] * divergence([*picked, item])

    def category(item: int) -> str | None:
        return next(iter((ITEMS[item]["category"] or [])[rule["level"] - 1 :]), None)

    def divergence(listed: list[int]) -> float:
        of_events = [category(item) for item, _ in user["history"]]
        of_events = [name for name in of_events if name is not None]
        total = 0.0
        for name in {*of_events}:
            p = of_events.count(name) / len(of_events)
            q = sum(category(item) == name for item in listed) / len(listed)
            total += p * math.log(p / (0.99 * q + 0.01 * p))
        return total

    while len(picked) < len(pool):
        remaining = [item for item in pool if item not in picked]
        values = [value(item) for item in remaining]
        # Sums in another order differ in the last digits: nearly equal values are a tie.
        picked.append(next(i for i, v in zip(remaining, values) if v > max(values) - 1e-12))
    return picked


def by_hand(settings: dict[str, dict[str, Any]], user: User, k: int) -> list[tuple[int, list[str]]]:
    leaves = ("leave_out", "price_band", "exclude_bought")
    only_leaves = {
        name: rule["kind"] in leaves or rule.get("older") == "leave_out"
        for name, rule in settings.items()
    }
    names = sorted(settings, key=lambda name: not only_leaves[name])
    pool, marks = list(user["pool"]), {item: [] for item in user["pool"]}
    for name in names:
        rule = settings[name]
        if user["segment"] not in rule.get("segments", SEGMENTS):
            continue
        new = (leave if only_leaves[name] else order)(rule, user, pool)
        for place, item in enumerate(new):
            old = pool.index(item)
            has_come_in = old >= k > place
            is_raised = not only_leaves[name] and rule["kind"] != "cap" and place < old
            if has_come_in or is_raised:
                marks[item].append(name)
        pool = new
    return [(item, marks[item]) for item in pool[:k]]


def selections() -> st.SearchStrategy[dict[str, Any]]:
    return st.sampled_from(
        [
            {"items": ["i0", "i7"]},
            {"categories": ["Home"]},
            {"categories": ["Warm", "Bags"], "items": ["i5"]},
            {"words": ["RED"]},
            {"words": ["pot", "candle"]},
        ]
    )


def kinds() -> st.SearchStrategy[dict[str, Any]]:
    places, share = st.integers(1, 3), st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])
    days = st.sampled_from([0.0, 2.5, 7.0, 60.0])
    by_kind = {
        "leave_out": selections(),
        "pin": st.tuples(selections(), places).map(lambda v: {**v[0], "places": v[1]}),
        "cap": st.fixed_dictionaries(
            {
                "by": st.sampled_from(["category", "price", "name"]),
                "at_most": places,
                "level": st.integers(1, 2),
                "factor": st.sampled_from([1.3, 3.0]),
                "similarity": st.sampled_from([0.2, 0.4, 0.9]),
            }
        ),
        "freshness": st.fixed_dictionaries(
            {"days": days, "older": st.sampled_from(["keep", "leave_out"]), "places": places}
        ),
        "price_band": st.fixed_dictionaries({"factor": st.sampled_from([1.2, 3.0])}),
        "exclude_bought": st.fixed_dictionaries(
            {
                "days": st.none() | days,
                "categories": st.dictionaries(
                    st.sampled_from(["Home", "Warm", "Tea"]), st.none() | days
                ),
            }
        ),
        "diversity": st.fixed_dictionaries(
            {"relevance": share, "by": st.sampled_from(["category", "name", "words"])}
        ),
        "calibrated": st.fixed_dictionaries({"weight": share, "level": st.integers(1, 2)}),
    }
    segments = st.sampled_from([{}, {}, {"segments": ["light", "cold"]}])
    return st.sampled_from(sorted(by_kind)).flatmap(
        lambda kind: st.tuples(by_kind[kind], segments).map(
            lambda values: {"kind": kind, **values[0], **values[1]}
        )
    )


def users() -> st.SearchStrategy[list[User]]:
    user = st.fixed_dictionaries(
        {
            "segment": st.sampled_from(SEGMENTS),
            "pool": st.permutations(range(N)).flatmap(
                lambda items: st.integers(0, N).map(lambda n: list(items)[:n])
            ),
            "history": st.lists(
                st.tuples(st.integers(0, N - 1), st.sampled_from([0.5, 2.5, 3.0, 30.0, 99.0])),
                max_size=6,
            ).map(lambda events: sorted(events, key=lambda event: event[1])),
        }
    )
    return st.lists(user, min_size=1, max_size=3)


@given(st.lists(kinds(), min_size=1, max_size=3), users(), st.integers(1, 5))
def test_rules_do_what_a_loop_over_one_user_does(
    kinds_of_rules: list[dict[str, Any]], of_users: list[User], k: int
) -> None:
    settings = {f"r{number}": rule for number, rule in enumerate(kinds_of_rules)}
    lists = reranked(of_users, book_of(settings), k)
    for user, listed in zip(of_users, lists):
        assert listed == by_hand(settings, user, k)
        items = [item for item, _ in listed]
        assert len({*items}) == len(items) <= k
        assert {*items} <= {*user["pool"]}


# --- on Spark ------------------------------------------------------------------------------------


def filled(
    spark: SparkSession, pools: dict[int, list[int]], kept: tuple[int, ...] = ()
) -> DataFrame:
    """Rows as `fill` gives them: a pool for each user; the lists of `kept` are of another night."""
    rows = [
        (user, 5 + 10 * item, rank, 1.0 / rank, "ease", *origin)
        for user, pool in pools.items()
        for origin in [
            ("unchanged", [("i", "an item", 0.5)]) if user in kept else ("champion", None)
        ]
        for rank, item in enumerate(pool, 1)
    ]
    return spark.createDataFrame(rows, ladder.FILLED)


SETTINGS = {
    "family": {"kind": "cap", "by": "name", "at_most": 1},
    "no_bags": {"kind": "leave_out", "categories": ["Bags"], "segments": ["heavy"]},
    "warm_up": {"kind": "pin", "categories": ["Warm"], "places": 1},
    "not_again": {"kind": "exclude_bought", "days": 30},
}


@pytest.mark.spark
@pytest.mark.parametrize("n_partitions", [1, 5])
def test_lists_on_spark(spark: SparkSession, n_partitions: int) -> None:
    pools = {7: [3, 4, 0, 1, 8, 10, 5], 8: [3, 4, 0, 1, 8, 10, 5], 9: [3, 4, 0], 10: [8, 9]}
    users = {7: ("heavy", [(8, 2.0), (5, 40.0)]), 8: ("light", []), 9: ("heavy", [])}
    book = book_of(SETTINGS)
    assert book.names == ("no_bags", "not_again", "family", "warm_up")
    history = [
        (user, segment, [(5 + 10 * item, TODAY - int(d * MICROS_PER_DAY)) for item, d in events])
        for user, (segment, events) in users.items()
    ]
    frame = spark.createDataFrame(
        history, "user_idx bigint, activity string, history array<struct<item_idx int, at bigint>>"
    ).selectExpr(
        "user_idx", "activity",
        "transform(history, e -> struct(e.item_idx, timestamp_micros(e.at) AS event_at)) AS history",
    )  # fmt: skip
    rows = filled(spark, pools, kept=(9,)).repartition(n_partitions, "rank")
    lists = rules.apply(rows, book, frame.select(*rules.user_columns(book)), 3)
    assert lists.schema.simpleString() == rules.RERANKED.simpleString()
    found: dict[int, list[Any]] = {}
    for row in sorted(lists.collect(), key=lambda row: (row["user_idx"], row["rank"])):
        item = (row["item_idx"] - 5) // 10
        assert (row["score"], row["model"]) == (
            pytest.approx(1 / (pools[row["user_idx"]].index(item) + 1)), "ease"
        )  # fmt: skip
        found.setdefault(row["user_idx"], []).append((row["rank"], item, row["rules"]))
        assert (row["because"] is not None) == (row["user_idx"] == 9)  # as it came
    # User 7 (heavy) gets no bags, no candle (bought 2 days ago) and one bottle; the tea pot was
    # bought 40 days ago. User 8 gets one bag and one bottle, and the bottle goes to the top. The
    # list of user 9 is of another night. User 10 is unknown, and "candle" is like "red candle".
    assert found == {
        7: [(1, 0, []), (2, 10, ["not_again"]), (3, 5, ["family"])],
        8: [(1, 0, ["warm_up"]), (2, 3, []), (3, 8, ["family"])],
        9: [(1, 3, []), (2, 4, []), (3, 0, [])],
        10: [(1, 8, [])],
    }


@pytest.mark.spark
def test_rules_cost_no_shuffle_of_the_pools_and_no_job(spark: SparkSession) -> None:
    pools = {7: [3, 4, 0, 1, 8, 10, 5]}
    lists = spark.createDataFrame(
        [(7, 5 + 10 * item, rank, 1.0) for rank, item in enumerate(pools[7], 1)], schema.RECOMMENDED
    )
    users = lists.select("user_idx").distinct()
    book = book_of({"family": SETTINGS["family"]})
    spark.sparkContext.setJobGroup("rules", "plan only")
    try:
        pool = ladder.fill([("ease", lists)], users, POOL)
        plans = [
            frame._jdf.queryExecution().executedPlan().toString()
            for frame in (pool, rules.apply(pool, book, None, 3))
        ]
        assert spark.sparkContext.statusTracker().getJobIdsForGroup("rules") == []
    finally:
        spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)
    n_exchanges = [len(re.findall(r"\bExchange ", plan)) for plan in plans]
    assert n_exchanges[0] == n_exchanges[1]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"kind": "leave_out", "items": ["i3", "i99"]},
            r"rules\.r\.items names items that the catalogue does not have: 'i99'\. Did you mean 'i9'",
        ),
        (
            {"kind": "pin", "categories": ["Bag"], "places": 1},
            r"categories .* 'Bag'\. Did you mean 'Bags'",
        ),
        ({"kind": "leave_out", "words": ["Bottel"]}, r"words .* 'bottel'\. Did you mean 'bottle'"),
        (
            {"kind": "exclude_bought", "categories": {"Tee": 3}},
            r"rules\.r\.categories .* 'Tee'\. Did you mean 'Tea'",
        ),
    ],
)
def test_a_rule_that_names_what_is_not_there(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        book_of({"r": rule})

"""Pairs that rankers read: what is proposed, its label, its features, and the sample, by hand."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.config import Examples
from recspark.data import examples
from recspark.data.feature_encoding import CATEGORY_LEVELS, Encoding
from recspark.data.pair_features import FEATURES, names
from recspark.data.pair_similarity import similarity_names
from recspark.errors import LeakError
from tests.conftest import ROOT

pytestmark = pytest.mark.spark
CUT = datetime(2024, 5, 2, tzinfo=UTC)
LISTS = [
    ("novel", "als", 1, 10, 1, 0.5),
    ("novel", "ease", 1, 10, 3, 2.0),
    ("novel", "ease", 1, 11, 1, 4.0),
    ("novel", "other", 1, 12, 1, 4.0),  # no source
    ("novel", "als", 2, 11, 2, 0.1),
]


def proposed(spark: SparkSession) -> Any:
    kinds = "mode string, model string, user_idx bigint, item_idx int, rank int, score float"
    lists = spark.createDataFrame(LISTS, kinds)
    return examples.proposed(lists, ("ease", "als"))


def test_a_pair_has_what_its_sources_say_in_their_order(spark: SparkSession) -> None:
    rows = proposed(spark).collect()
    found = {
        (r["user_idx"], r["item_idx"]): [(s["model"], s["rank"], s["score"]) for s in r["sources"]]
        for r in rows
    }
    assert found == {
        (1, 10): [("ease", 3, 2.0), ("als", 1, 0.5)],
        (1, 11): [("ease", 1, 4.0)],
        (2, 11): [("als", 2, pytest.approx(0.1))],
    }


def test_features_of_a_pair(spark: SparkSession) -> None:
    users = spark.createDataFrame(
        [(CUT, 1, 5, "light")], "cutoff timestamp, user_idx bigint, n_events int, activity string"
    )
    items = spark.createDataFrame(
        [(CUT, 10, 2.5, ["a", "b"])],
        "cutoff timestamp, item_idx int, price double, category array<string>",
    )
    pairs = proposed(spark).withColumns(  # as `describe_pairs` adds them
        {
            f"{name}_{number}": F.lit(0.5).cast("float")
            for name in ("ease", "als")
            for number in ("score", "relative")
        }
    )
    frame = examples.with_pair_features(pairs, ("ease", "als"), users, items)
    rows = {(r["user_idx"], r["item_idx"]): r.asDict() for r in frame.collect()}
    first, second = rows[1, 10], rows[2, 11]
    assert (first["n_sources"], first["ease_rank"], first["als_rank"]) == (2, 3, 1)
    assert (first["user_n_events"], first["item_price"], first["item_category_2"]) == (5, 2.5, "b")
    assert (second["n_sources"], second["ease_rank"], second["als_rank"]) == (1, None, 2)
    assert (second["user_activity"], second["item_price"]) == (None, None)
    encoding = examples.make_pair_encoding(("ease", "als"), (), users, items)
    assert encoding.encode(frame, ("user_idx", "item_idx")).count() == 3
    assert encoding.numbers == (
        "n_sources", "ease_rank", "ease_score", "ease_relative", "als_rank", "als_score",
        "als_relative", "user_n_events", "item_price",
    )  # fmt: skip
    with_orders = examples.make_pair_encoding(("ease",), ("orders",), users, items)
    assert "pair_due" in with_orders.numbers
    assert encoding.fields["item_category_1"] == ("a",)
    users, items = (
        spark.createDataFrame([], table) for table in (schema.USER_FEATURES, schema.ITEM_FEATURES)
    )
    encoding = examples.make_pair_encoding(("ease", "als"), tuple(FEATURES), users, items)
    named = examples.feature_names(("ease", "als"), tuple(FEATURES))
    assert sorted(named) == sorted([*encoding.numbers, *encoding.fields])


def test_labels_are_what_came_in_the_horizon(spark: SparkSession) -> None:
    """At the cutoff counts, at its end does not; an act that weighs nothing is an act all the same."""

    def event(item: int, days: float, weight: float | None) -> tuple[Any, ...]:
        return (item, CUT + timedelta(days=days), "buy", weight, 1.0, "s", "o")

    history = [
        event(11, -1, 9.0), event(10, 0, 2.0), event(10, 3, 0.5), event(11, 6.9, 0.0),
        event(12, 7, 1.0), event(13, 2, None),
    ]  # fmt: skip
    histories = spark.createDataFrame([(1, history, [], 0)], schema.HISTORIES)
    truths = examples.truths_of(histories, CUT, 7)
    [row] = truths.collect()
    found = {act["item_idx"]: act["weight"] for act in row["truth"]}
    assert (row["user_idx"], found) == (1, {10: 2.5, 11: 1.0, 13: 1.0})
    labels = examples.labelled(proposed(spark), truths).collect()
    assert {(r["user_idx"], r["item_idx"]): r["label"] for r in labels} == {
        (1, 10): 2.5, (1, 11): 1.0, (2, 11): 0.0,
    }  # fmt: skip


def test_the_sample_keeps_what_was_acted_on_and_some_of_the_rest(spark: SparkSession) -> None:
    pairs = spark.createDataFrame(
        [
            (m, u, i, float(i % 10 == 0))
            for m in ("novel", "repeat")
            for u in range(20)
            for i in range(50)
        ],
        "mode string, user_idx bigint, item_idx int, label float",
    )
    settings = Examples(n_negatives=7)  # type: ignore[call-arg]

    def kept(seed: int, partitions: int) -> set[tuple[str, int, int]]:
        rows = examples.sampled(pairs.repartition(partitions), settings, seed).collect()
        assert len(rows) == 2 * 20 * 50
        return {(r["mode"], r["user_idx"], r["item_idx"]) for r in rows if r["is_kept"]}

    first = kept(1, 2)
    assert first == kept(1, 7)  # whatever the order
    assert first != kept(2, 2)
    positives = {
        (m, u, i) for m in ("novel", "repeat") for u in range(20) for i in range(0, 50, 10)
    }
    assert positives <= first
    assert len(first) == 2 * 20 * (5 + 7)


def test_a_feature_of_tomorrow_is_refused_by_its_name(spark: SparkSession) -> None:
    """Two canaries, a number and a text, made of the label; honest features pass."""
    generator = np.random.default_rng(4)
    label = generator.random(2000) < 0.2
    honest = label + generator.normal(size=2000)  # tells something, as good features do: AUC .76
    canary = np.where(label, 5.0, np.where(generator.random(2000) < 0.5, np.nan, 1.0))
    colour = np.where(generator.random(2000) < 0.5, 2, 3)
    code = np.where(label, 4, generator.integers(0, 4, 2000))

    def frame(numbers: list[Any], fields: list[Any]) -> Any:
        rows = [
            (
                int(user),
                float(act),
                [float(n[user]) for n in numbers],
                [int(f[user]) for f in fields],
            )
            for user, act in enumerate(label)
        ]
        kinds = "user_idx bigint, label float, numbers array<float>, fields array<int>"
        return spark.createDataFrame(rows, kinds)

    texts = ("a", "b", "c")
    examples.check_no_leak(frame([honest], [colour]), Encoding(("x",), {"colour": texts}), 1)
    for canary_values in (canary, -np.nan_to_num(canary)):
        encoding = Encoding(("x", "bought_tomorrow"), {"colour": texts})
        with pytest.raises(LeakError, match=r"examples: bought_tomorrow alone tells") as error:
            examples.check_no_leak(frame([honest, canary_values], [colour]), encoding, 1)
        assert error.value.exit_code == 26
    encoding = Encoding(("x",), {"colour": texts, "next_order": texts})
    with pytest.raises(LeakError, match=r"examples: next_order alone"):
        examples.check_no_leak(frame([honest], [colour, code]), encoding, 1)
    canaries = frame([honest, canary], [colour, code])
    both = Encoding(("x", "bought_tomorrow"), {"colour": texts, "next_order": texts})
    with pytest.raises(LeakError, match=r"examples: next_order alone.*examples\.honest_features"):
        examples.check_no_leak(canaries, both, 1, ["bought_tomorrow"])
    examples.check_no_leak(canaries, both, 1, ["bought_tomorrow", "next_order"])
    few = frame([honest, canary], [colour]).where("user_idx < 60")
    examples.check_no_leak(few, Encoding(("x", "bought_tomorrow"), {"colour": texts}), 1)
    nothing = frame([honest], [colour]).where("user_idx < 0")
    examples.check_no_leak(nothing, Encoding(("x",), {"colour": texts}), 1)


def test_the_page_lists_every_feature() -> None:
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in row.split(", ")
    }
    tables = [*schema.USER_FEATURES.names, *schema.ITEM_FEATURES.names]
    columns = {f"`{n}`" for n in tables if n not in ("cutoff", "user_idx", "item_idx", "category")}
    levels = {f"`category_{level}`" for level in range(1, CATEGORY_LEVELS + 1)}
    pairs = {"`n_sources`", "`NAME_rank`", "`NAME_score`", "`NAME_relative`"}
    pairs |= {f"`{name}`" for name in (*names(tuple(FEATURES)), *similarity_names(["NAME"]))}
    assert named == columns | levels | pairs

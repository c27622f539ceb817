"""Hashed tokens of items: trigrams, categories, prices and features, and the view of an item."""

from __future__ import annotations

import dataclasses
import zlib
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from recspark.data.blocks import Array
from recspark.models.towers.item_tokens import (
    NO_VIEW,
    ItemTokens,
    TokenRules,
    item_tokens,
    token_hash,
    tokens_of,
    trigrams,
    views_of,
)
from recspark.testing import synth

RULES = TokenRules(
    ("item_name", "text", "category", "price"), ("age_days", "kind"), 1 << 30, 50, {}
)
NOTHING = pa.array([None, None, None], pa.string())


def batch(**changed: pa.Array) -> pa.RecordBatch:
    """Three items; the last one is not described."""
    columns = {
        "item_name": pa.array(["Tin box", "To go", None]),
        "text": pa.array(["tin", None, None]),
        "category": pa.array([["home", "tin"], [], None], pa.list_(pa.string())),
        "price": pa.array([3.0, None, None], pa.float64()),
        "feature_age_days": pa.array([0, 100, None], pa.int64()),
        "feature_kind": pa.array([None, "new", None], pa.string()),
    }
    return pa.RecordBatch.from_pydict({**columns, **changed})


def code(part: str, token: str, n_buckets: int = 1 << 30) -> int:
    return token_hash(part, token) % n_buckets


def rows(starts: Array, codes: Array, weights: Array) -> list[dict[int, float]]:
    """The tokens of each item: code -> weight."""
    return [
        dict(zip(codes[a:b].tolist(), weights[a:b].tolist(), strict=True))
        for a, b in pairwise(starts)
    ]


def test_words_are_cut_into_trigrams() -> None:
    item, found, _ = trigrams(["to a box", None, "box"], "item_name")
    want = ["#to", "to#", "#a#", "#bo", "box", "ox#"]
    assert item.tolist() == [0] * 6 + [2] * 3
    assert found.tolist() == [token_hash("item_name", gram) for gram in [*want, *want[3:]]]
    assert token_hash("item_name", "box") != token_hash("text", "box")
    assert token_hash("item_name", "box") == zlib.crc32(b"item_name\0box")  # on every machine


def test_an_item_has_the_tokens_of_what_is_known_of_it() -> None:
    described, sparse, nothing = rows(*tokens_of(batch(), RULES))
    name = [code("item_name", gram) for gram in ("#ti", "tin", "in#", "#bo", "box", "ox#")]
    assert [described[gram] for gram in name] == pytest.approx([6**-0.5] * 6)
    text = [code("text", gram) for gram in ("#ti", "tin", "in#")]
    assert [described[gram] for gram in text] == pytest.approx([3**-0.5] * 3)
    categories = [code("category", value) for value in ("home", "tin")]
    assert [described[value] for value in categories] == pytest.approx([0.5**0.5] * 2)
    assert described[code("price", "4")] == 1  # 2 log2(1 + 3) = 4
    assert described[code("age_days", "0")] == 1
    assert len(described) == 6 + 3 + 2 + 1 + 1
    assert {*sparse} == {
        *(code("item_name", gram) for gram in ("#to", "to#", "#go", "go#")),
        code("age_days", "13"),
        code("kind", "new"),
    }
    assert nothing == {}
    for n in range(3):  # the tokens of an item depend on no other item
        assert rows(*tokens_of(batch().slice(n, 1), RULES)) == [[described, sparse, nothing][n]]


def test_only_the_first_trigrams_of_a_text_are_read_and_each_counts_once() -> None:
    rules = TokenRules(("text",), (), 1 << 30, 4, {})
    texts = pa.array(["tin tin box tin", "tin", None])
    [first, second, _] = rows(*tokens_of(batch(text=texts), rules))
    assert {*first} == {code("text", gram) for gram in ("#ti", "tin", "in#", "#bo")}
    assert [*first.values()] == [0.5] * 4
    assert len(second) == 3


def test_tokens_with_one_code_are_one_token() -> None:
    rules = TokenRules(("item_name",), (), 2, 50, {})
    described, *_ = rows(*tokens_of(batch(), rules))
    assert {*described} == {0, 1}
    assert [*described.values()] == pytest.approx([2**-0.5] * 2)


def test_an_item_is_in_the_first_view_that_has_one_of_its_categories() -> None:
    lists = pa.array([["x", "b"], ["b", "a"], ["x"], [], None], pa.list_(pa.string()))
    assert views_of(lists, {}).tolist() == [0] * 5
    assert views_of(lists, {"a": ("a",), "b": ("b",)}).tolist() == [1, 0, *[NO_VIEW] * 3]
    views = {"rest": (), "b": ("b", "c")}
    assert views_of(lists, views).tolist() == [1, 1, 0, 0, 0]


def test_items_can_be_chosen() -> None:
    tokens = ItemTokens(
        np.array([3, 5, 9], np.int32),
        np.array([0, 1, 0], np.int32),
        np.array([0, 2, 3, 5]),
        np.arange(5, dtype=np.int32),
        np.ones(5, np.float32),
    )
    some = tokens.of(np.array([5, 9, 20]))
    assert some.item_idx.tolist() == [5, 9]
    assert some.views.tolist() == [1, 0]
    assert some.starts.tolist() == [0, 1, 3]
    assert some.codes.tolist() == [2, 3, 4]


@pytest.mark.spark
def test_the_catalogue_is_read_whatever_its_partitions(spark: SparkSession) -> None:
    events = synth.log([(0, item, 2.0) for item in (1, 2, 4, 5)])
    data = synth.dataset(spark, events)
    catalogue = synth.items(spark, np.arange(8))  # 0, 3, 6 and 7 are without events
    features = data.item_features.select("item_idx", "n_users")
    rules = TokenRules(
        ("item_name", "category"), ("n_users",), 1 << 24, 50, {"one": ("c1",), "two": ("c2", "c3")}
    )
    found = [item_tokens(catalogue.repartition(n, "item_idx"), features, rules) for n in (1, 5)]
    for name in ("item_idx", "views", "starts", "codes", "weights"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))
    assert found[0].item_idx.tolist() == [1, 2, 3, 5, 6, 7]  # 0 and 4 are in no view
    assert found[0].views.tolist() == [0, 1, 1, 0, 1, 1]
    has_users = [
        code("n_users", "2", 1 << 24) in found[0].codes[a:b] for a, b in pairwise(found[0].starts)
    ]
    assert has_users == [True, True, False, True, False, False]
    odd_features = features.withColumnRenamed("n_users", "n.users")  # another name, other codes
    odd = item_tokens(catalogue, odd_features, dataclasses.replace(rules, features=("n.users",)))
    assert len(odd.codes) == len(found[0].codes)

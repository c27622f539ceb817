"""Features as arrays: codes by hand, what is missing and unknown, and the way through a saved model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.feature_encoding import (
    FIRST,
    MISSING,
    UNKNOWN,
    Encoding,
    flat,
    item_arrays,
    make_encoding,
    parse_encoded,
    with_features,
)
from recspark.errors import ModelError
from recspark.masking import mask

ENCODING = Encoding(("price", "age"), {"colour": ("blue", "red"), "size": ("l",)})


def batch(rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    numbers, texts = ("price", "age"), ("colour", "size")
    kinds = [*((name, pa.float64()) for name in numbers), *((name, pa.string()) for name in texts)]
    columns = list(zip(*rows, strict=True))
    arrays = [pa.array(c, kind) for c, (_, kind) in zip(columns, kinds, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=[name for name, _ in kinds])


def test_codes_by_hand() -> None:
    rows = [(1.5, None, "red", "l"), (None, 3.0, None, "xl"), (0.0, -2.0, "blue", None)]
    numbers, fields = ENCODING.columns(batch(rows))
    np.testing.assert_array_equal(
        np.array(numbers.to_pylist(), np.float32), [[1.5, np.nan], [np.nan, 3], [0, -2]]
    )
    assert fields.to_pylist() == [[FIRST + 1, FIRST], [MISSING, UNKNOWN], [FIRST, MISSING]]
    assert ENCODING.sizes == (4, 3)


text = st.text(max_size=5)


@settings(max_examples=100, deadline=None)
@given(
    vocabulary=st.lists(text, unique=True, max_size=5).map(sorted),
    values=st.lists(st.none() | text, max_size=8),
    numbers=st.integers(0, 2),
)
@example(vocabulary=["\x00"], values=[], numbers=0)
# In base64 it ends in "kB6iMlAw==", which looks like a secret that is assigned.
@example(
    vocabulary=["", "9>\U000625ae", ":f\U0001ff95\U000ab9a53", "½Í%", "\U000b1c3f"],
    values=[],
    numbers=1,
)
def test_what_is_encoded_is_read_back(
    vocabulary: list[str], values: list[str | None], numbers: int
) -> None:
    """Any texts, with and without numbers, an empty batch: as many rows, and the codes of the rule."""
    names = tuple(f"n{i}" for i in range(numbers))
    encoding = Encoding(names, {"f": tuple(vocabulary)})
    arrays = [pa.array(np.arange(len(values), dtype=np.float64)) for _ in names]
    whole = pa.RecordBatch.from_arrays(
        [*arrays, pa.array(values, pa.string())], names=[*names, "f"]
    )
    coded = pa.RecordBatch.from_arrays(list(encoding.columns(whole)), names=["numbers", "fields"])
    got_numbers, got_fields = parse_encoded(coded, encoding)
    assert got_numbers.shape == (len(values), numbers)
    want = [
        MISSING if v is None else FIRST + vocabulary.index(v) if v in vocabulary else UNKNOWN
        for v in values
    ]
    assert got_fields[:, 0].tolist() == want
    # As a column of queries: a user of whom nothing is known beside them.
    struct = pa.StructArray.from_arrays(coded.columns, names=["numbers", "fields"])
    with_none = pa.concat_arrays([struct, pa.nulls(1, struct.type)])
    got_numbers, got_fields = parse_encoded(with_none, encoding)
    assert got_fields[:, 0].tolist() == [*want, MISSING]
    assert np.isnan(got_numbers[-1]).all()
    saved = encoding.to_arrays()
    assert Encoding.of_arrays({**saved, "mine": np.ones(2)})[0] == encoding
    assert list(Encoding.of_arrays({**saved, "mine": np.ones(2)})[1]) == ["mine"]
    assert all(array.dtype.kind == "U" for array in saved.values())  # no pickle in a saved model
    assert Encoding.of_dict(encoding.to_dict()) == encoding
    assert mask(encoding.to_text()) == encoding.to_text()
    assert Encoding.of_text(encoding.to_text()) == encoding


def test_rows_of_another_encoding_are_an_error() -> None:
    numbers, fields = ENCODING.columns(batch([(1.0, 2.0, "red", "l")]))
    coded = pa.RecordBatch.from_arrays([numbers, fields], names=["numbers", "fields"])
    with pytest.raises(ModelError, match="other numbers than the 1"):
        parse_encoded(coded, Encoding(("price",), ENCODING.fields))


@pytest.mark.spark
def test_a_vocabulary_has_the_most_frequent_values(spark: SparkSession) -> None:
    rows = [(i, c, 1.0) for i, c in enumerate(["b", "b", "c", "a", "a", "d", None, None, None])]
    frame = spark.createDataFrame(rows, "user_idx bigint, colour string, price double")
    # "c" and "d" are equally frequent; the smaller stays.
    assert make_encoding(frame, 3) == Encoding(("price",), {"colour": ("a", "b", "c")})
    assert make_encoding(frame.repartition(5), 1) == Encoding(("price",), {"colour": ("a",)})
    assert make_encoding(frame, names=("price",)) == Encoding(("price",), {})
    with pytest.raises(ModelError, match=r"\['color'\] are not there"):
        make_encoding(frame, names=("color",))
    dates = frame.selectExpr("user_idx", "current_date() AS day")
    with pytest.raises(ModelError, match=r"\['day'\] are neither numbers nor texts"):
        make_encoding(dates)


@pytest.mark.spark
def test_a_category_path_is_a_field_a_level_and_items_come_in_order(spark: SparkSession) -> None:
    rows = [(7, ["home", "kitchen"], 2.0), (3, None, 1.0), (5, ["home"], None), (9, ["away"], 9.0)]
    frame = flat(spark.createDataFrame(rows, "item_idx int, category array<string>, price double"))
    assert frame.columns == ["item_idx", "category_1", "category_2", "category_3", "price"]
    items = np.array([3, 5, 6, 7], np.int32)  # 6 has no features, 9 is not asked for
    source = spark.createDataFrame(rows, "item_idx int, category array<string>, price double")
    encoding = make_encoding(frame, names=("price", "category_1", "category_2"))
    numbers, fields = item_arrays(source, items, encoding)
    np.testing.assert_array_equal(numbers[:, 0], [1, np.nan, np.nan, 2])
    assert fields.tolist() == [[0, 0], [3, 0], [0, 0], [3, 2]]  # away 2, home 3; kitchen 2


@pytest.mark.spark
def test_queries_carry_features_of_known_users(spark: SparkSession) -> None:
    users = spark.createDataFrame([(1, "light", 2)], "user_idx bigint, activity string, n int")
    queries = spark.createDataFrame([(1, [], []), (2, [], [])], schema.QUERIES)
    encoding = make_encoding(users)
    rows = with_features(queries, users, encoding).orderBy("user_idx").collect()
    assert rows[0]["features"].asDict() == {"numbers": [2.0], "fields": [FIRST]}
    assert rows[1]["features"] is None
    lacking = Encoding(("height",), {})
    with pytest.raises(ModelError, match=r"features \['height'\] are not there"):
        with_features(queries, users, lacking)


@pytest.mark.spark
def test_fields_take_the_codes_of_another_encoding(spark: SparkSession) -> None:
    """As if they had been encoded by the other encoding at once, but for texts that the first one
    does not know.
    """
    first = Encoding((), {"colour": ("blue", "red", "white"), "size": ("L", "S")})
    other = Encoding((), {"colour": ("black", "red", "white", "yellow"), "size": ("L", "S")})
    texts = [("red", "L"), ("blue", None), (None, "S"), ("white", "S"), ("yellow", "XL")]
    frame = spark.createDataFrame(texts, "colour string, size string").withColumn(
        "name", F.col("colour")
    )
    encoded = first.encode(frame, ("name",))
    recoded = encoded.select("name", first.recoded(F.col("fields"), other).alias("fields"))
    assert recoded.schema["fields"].dataType == encoded.schema["fields"].dataType
    codes = {row["name"]: row["fields"] for row in recoded.collect()}
    assert codes == {"red": [3, 2], "blue": [1, 0], None: [0, 3], "white": [4, 3], "yellow": [1, 1]}
    at_once = {row["name"]: row["fields"] for row in other.encode(frame, ("name",)).collect()}
    assert {**at_once, "yellow": [1, 1]} == codes
    assert encoded.select(first.recoded(F.col("fields"), first)).columns == ["fields"]


@pytest.mark.spark
def test_names_of_features_may_have_dots_blanks_and_backticks(spark: SparkSession) -> None:
    """Such names give the same codes as plain names: of numbers, texts and lists of texts."""
    plain = spark.createDataFrame(
        [(1, 1.5, "red", ["a", "b"]), (2, None, "blue", None)],
        "item_idx int, size double, colour string, path array<string>",
    )
    odd_names = {"size": "size.in cm", "colour": "a.colour", "path": "the `path`.full"}
    odd = plain.withColumnsRenamed(odd_names)
    encodings = [make_encoding(flat(features)) for features in (plain, odd)]
    assert encodings[1].numbers == ("size.in cm",)
    assert [*encodings[1].fields] == ["a.colour", *(f"the `path`.full_{n}" for n in (1, 2, 3))]
    rows = [
        encoding.encode(flat(features), ("item_idx",)).orderBy("item_idx").collect()
        for encoding, features in zip(encodings, (plain, odd), strict=True)
    ]
    assert str(rows[1]) == str(rows[0])  # NaN is not NaN
    assert rows[1][0]["fields"] == [FIRST + 1, FIRST, FIRST, MISSING]

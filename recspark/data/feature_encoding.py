"""Features as the arrays that models read: numbers, and fields as codes of a vocabulary.

A field is a feature whose values are texts. A missing number is NaN. In a field, code 0 stands for
a missing value and code 1 for a value that is not in the vocabulary; the values of the vocabulary
follow from code 2 on, in ascending order. The encoded values are those of the feature tables as of
a cutoff (`data.features`), so nothing later can be in them.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, NumericType, StringType, StructField, StructType

from recspark import schema
from recspark.data.blocks import Array, local_index
from recspark.errors import ModelError

MISSING, UNKNOWN, FIRST = 0, 1, 2  # codes of a field; FIRST is the code of the smallest value
CATEGORY_LEVELS = 3  # a category path gives one field for each of its first 3 levels
# Arrays of a saved encoding are named encoding.numbers, encoding.fields and encoding.fields.NAME.
_ARRAYS = "encoding"
_KEYS = ("cutoff", "user_idx", "item_idx")  # columns of feature tables that are not features


@dataclass(frozen=True)
class Encoding:
    """Which features are read, in which order, and the vocabulary of each field.

    Parameters
    ----------
    numbers : names of the features that are numbers
    fields : name of a field -> the values of its vocabulary, ascending

    Example: `Encoding(("price",), {"colour": ("blue", "red")})` encodes the rows (9.5, "red"),
    (null, "green") and (1.0, null) as `numbers` [9.5], [NaN], [1.0] and `fields` [3], [1], [0].
    """

    numbers: tuple[str, ...]
    fields: Mapping[str, tuple[str, ...]]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of codes of each field, including the codes MISSING and UNKNOWN."""
        return tuple(FIRST + len(values) for values in self.fields.values())

    def encode(self, frame: DataFrame, keys: Sequence[str]) -> DataFrame:
        """Return `keys, numbers array<float>, fields array<int>`, one row per row of `frame`.

        `frame` has the columns `keys` and a column for each feature; `keys` are passed through. The
        names of features may have dots and blanks. Raises ModelError where `frame` lacks one of the
        features. Lazy and narrow.
        """
        lacking = [name for name in (*self.numbers, *self.fields) if name not in frame.columns]
        if lacking:
            raise ModelError(f"features {lacking} are not there, but {sorted(frame.columns)}")
        numbers = [schema.quoted(name).cast("double") for name in self.numbers]
        fields = [schema.quoted(name).cast("string") for name in self.fields]
        # `mapInArrow` takes a dot in the name of a column for a field of a struct.
        features = [column.alias(f"_{n}") for n, column in enumerate([*numbers, *fields])]
        typed = frame.select(*keys, *features)
        encoded_schema = StructType([*(typed.schema[key] for key in keys), *schema.ENCODED.fields])
        encoding = Encoding(self.numbers, dict(self.fields))
        names = [*self.numbers, *self.fields]

        def encode_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                named = pa.RecordBatch.from_arrays(batch.columns[len(keys) :], names)
                arrays = [*batch.columns[: len(keys)], *encoding.columns(named)]
                yield pa.RecordBatch.from_arrays(arrays, names=encoded_schema.names)

        return typed.mapInArrow(encode_batches, encoded_schema)

    def columns(self, batch: pa.RecordBatch) -> tuple[pa.ListArray, pa.ListArray]:
        """Return `numbers` and `fields` of a batch that has a column for each feature."""
        numbers = np.empty((batch.num_rows, len(self.numbers)), np.float32)
        for n, name in enumerate(self.numbers):
            numbers[:, n] = batch.column(name).to_numpy(zero_copy_only=False)
        fields = np.empty((batch.num_rows, len(self.fields)), np.int32)
        for n, (name, values) in enumerate(self.fields.items()):
            column = batch.column(name)
            index = pc.index_in(column, value_set=pa.array(values, pa.string()))  # null: unknown
            code = pc.fill_null(pc.add(index, FIRST), UNKNOWN).to_numpy(zero_copy_only=False)
            fields[:, n] = np.where(column.is_valid().to_numpy(zero_copy_only=False), code, MISSING)
        return _lists(numbers, pa.float32()), _lists(fields, pa.int32())

    def recoded(self, fields: Column, target: Encoding) -> Column:
        """Return the column `fields` of rows that this encoding encoded, in the codes of `target`.

        Both encodings have the same fields. A value that is in one of the two vocabularies only
        becomes unknown. Narrow: one look-up per field.

        Example: where this encoding has the colours (blue, red) and `target` has (red, white), the
        code 3 (red) becomes 2, and the code 2 (blue) becomes 1 (unknown). The codes 0 and 1 stay.
        """
        if self.fields == target.fields:
            return fields
        codes = []
        for n, (name, values) in enumerate(self.fields.items()):
            code_of = {value: FIRST + place for place, value in enumerate(target.fields[name])}
            new_codes = [MISSING, UNKNOWN, *(code_of.get(value, UNKNOWN) for value in values)]
            codes.append(F.get(F.lit(new_codes), F.get(fields, F.lit(n))))
        return F.array(*codes).cast("array<int>")

    def missing(self, n: int) -> tuple[Array, Array]:
        """Return the arrays `numbers` and `fields` of n rows in which every feature is missing."""
        numbers = np.full((n, len(self.numbers)), np.nan, np.float32)
        return numbers, np.full((n, len(self.fields)), MISSING, np.int32)

    def to_dict(self) -> dict[str, Any]:
        """Return the encoding as a dict of lists and texts, which `of_dict` reads."""
        return {
            "numbers": list(self.numbers),
            "fields": {name: [*values] for name, values in self.fields.items()},
        }

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Encoding:
        """Return the encoding that `to_dict` returned as `values`."""
        fields = {name: tuple(texts) for name, texts in values["fields"].items()}
        return cls(tuple(values["numbers"]), fields)

    def to_text(self) -> str:
        """Return the encoding as one line in base64, which `of_text` reads.

        The names and values of the encoding cannot be read in this text, so the masking of secrets
        changes nothing in it. Nor has it the equals signs at the end that base64 usually has: with
        letters before them that happen to say "key" they would look like a secret.
        """
        compressed = zlib.compress(json.dumps(self.to_dict()).encode())
        return base64.b64encode(compressed).decode().rstrip("=")

    @classmethod
    def of_text(cls, text: str) -> Encoding:
        """Return the encoding that `to_text` returned as `text`, with or without equals signs."""
        padded = text + "=" * (-len(text) % 4)
        return cls.of_dict(json.loads(zlib.decompress(base64.b64decode(padded))))

    def to_arrays(self) -> dict[str, Array]:
        """Return names and vocabularies as arrays of texts, to be saved beside a model's arrays.

        A dot ends each text: numpy drops the NUL characters at the end of a text.
        """
        texts_by_name = {"numbers": self.numbers, "fields": tuple(self.fields)}
        texts_by_name.update({f"fields.{name}": values for name, values in self.fields.items()})
        return {
            f"{_ARRAYS}.{name}": np.array([f"{text}." for text in texts], np.str_)
            for name, texts in texts_by_name.items()
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> tuple[Encoding, dict[str, Array]]:
        """Return the encoding that `to_arrays` wrote into `arrays`, and the other arrays."""
        texts_by_name = {
            name.removeprefix(f"{_ARRAYS}."): tuple(text[:-1] for text in array.tolist())
            for name, array in arrays.items()
            if name.startswith(f"{_ARRAYS}.")
        }
        fields = {name: texts_by_name[f"fields.{name}"] for name in texts_by_name["fields"]}
        other_arrays = {n: array for n, array in arrays.items() if not n.startswith(f"{_ARRAYS}.")}
        return cls(texts_by_name["numbers"], fields), other_arrays


def make_encoding(
    features: DataFrame, max_values: int = 1000, names: Sequence[str] = ()
) -> Encoding:
    """Return the encoding of the columns `names` of `features`; without `names`, of all features.

    Numeric columns become numbers and texts become fields. A vocabulary has the `max_values` most
    frequent values; of values that are equally frequent the smaller comes first. All other values
    are unknown. Raises ModelError for a name that is not a column, and for a column that is neither
    number nor text. Cost: without a field nothing runs; else one job with two shuffles of distinct
    values, and the driver holds the vocabularies.
    """
    type_of = {
        field.name: field.dataType for field in features.schema.fields if field.name not in _KEYS
    }
    names = names or tuple(type_of)
    if unknown := sorted({*names} - {*type_of}):
        raise ModelError(f"features {unknown} are not there, but {sorted(type_of)}")
    numbers = tuple(name for name in names if isinstance(type_of[name], NumericType))
    fields = [name for name in names if isinstance(type_of[name], StringType)]
    if not_encodable := sorted({*names} - {*numbers, *fields}):
        raise ModelError(f"features {not_encodable} are neither numbers nor texts")
    vocabularies: dict[str, list[str]] = {name: [] for name in fields}
    if fields:
        values = F.explode(
            F.array(
                *[
                    F.struct(F.lit(n).alias("field"), schema.quoted(n).alias("value"))
                    for n in fields
                ]
            )
        )
        frequent_first = Window.partitionBy("field").orderBy(F.desc("count"), "value")
        frequent_values = (
            features.select(values.alias("v"))
            .select("v.*")
            .where("value IS NOT NULL")
            .groupBy("field", "value")
            .count()
            .withColumn("place", F.row_number().over(frequent_first))
            .where(F.col("place") <= max_values)
        )
        for row in frequent_values.select("field", "value").collect():
            vocabularies[row["field"]].append(row["value"])
    return Encoding(numbers, {name: tuple(sorted(texts)) for name, texts in vocabularies.items()})


def flat(features: DataFrame, prefix: str = "") -> DataFrame:
    """Return `user_features` or `item_features` with columns that can be encoded.

    A list of texts (a category path) becomes one text column for each of its first levels:
    `category_1`, `category_2`, and so on. The name of each feature gets the `prefix`; keys keep
    their names. Lazy and narrow.
    """
    columns = []
    for field in features.schema.fields:
        name = field.name
        if name in _KEYS:
            columns.append(schema.quoted(name))
        elif isinstance(field.dataType, ArrayType):
            for level, feature in enumerate(_flat_names(field)):
                columns.append(F.get(schema.quoted(name), F.lit(level)).alias(prefix + feature))
        else:
            columns.append(schema.quoted(name).alias(prefix + name))
    return features.select(*columns)


def flat_names(features: StructType, prefix: str = "") -> tuple[str, ...]:
    """Return the names of the features in `flat` of a table with the schema `features`."""
    return tuple(
        prefix + name
        for field in features.fields
        if field.name not in _KEYS
        for name in _flat_names(field)
    )


def _flat_names(field: StructField) -> list[str]:
    if isinstance(field.dataType, ArrayType):
        return [f"{field.name}_{level}" for level in range(1, CATEGORY_LEVELS + 1)]
    return [field.name]


def with_features(
    queries: DataFrame, user_features: DataFrame, encoding: Encoding | None
) -> DataFrame:
    """Return `queries` with a column `features`: the encoded row of `user_features` for each user.

    `features` is null for a user who is not in `user_features`. Both DataFrames are as of the same
    cutoff. Where `encoding` is None (the model reads no features), `queries` is returned unchanged.
    One join by user, no action.
    """
    if encoding is None:
        return queries
    encoded_users = encoding.encode(flat(user_features), ("user_idx",)).select(
        "user_idx", F.struct("numbers", "fields").alias("features")
    )
    return queries.join(encoded_users, on="user_idx", how="left")


def item_arrays(item_features: DataFrame, items: Array, encoding: Encoding) -> tuple[Array, Array]:
    """Return numbers float32 (n_items, n_numbers) and fields int32 (n_items, n_fields) of `items`.

    The rows are in the order of `items`, int32 (n_items,) ascending. For an item that is not in
    `item_features`, every feature is missing. One job; the driver holds 4 bytes per item and
    feature.
    """
    table = encoding.encode(flat(item_features), ("item_idx",)).toArrow().combine_chunks()
    numbers, fields = encoding.missing(len(items))
    if table.num_rows:
        [batch] = table.to_batches()
        item_idx = batch.column("item_idx").to_numpy()  # (n_rows,)
        position = local_index(items, item_idx)
        is_in_items = position >= 0
        coded = parse_encoded(batch, encoding)
        numbers[position[is_in_items]], fields[position[is_in_items]] = (
            coded[0][is_in_items],
            coded[1][is_in_items],
        )
    return numbers, fields


def parse_encoded(
    batch: pa.RecordBatch | pa.StructArray, encoding: Encoding
) -> tuple[Array, Array]:
    """Return numbers float32 (n, n_numbers) and fields int32 (n, n_fields) of an encoded batch.

    `batch` has the columns `numbers` and `fields`, or is a struct of the two. Where the struct is
    null, every feature of the row is missing. Raises ModelError where a row has another number of
    features than `encoding`.
    """
    if isinstance(batch, pa.StructArray):
        is_valid = batch.is_valid().to_numpy(zero_copy_only=False)
        coded = encoding.missing(len(batch))
        valid_rows = batch.filter(pa.array(is_valid))
        columns = valid_rows.field("numbers"), valid_rows.field("fields")
    else:
        is_valid = np.ones(batch.num_rows, bool)
        coded = encoding.missing(batch.num_rows)
        columns = batch.column("numbers"), batch.column("fields")
    for array, column, name in zip(coded, columns, ("numbers", "fields"), strict=True):
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if not (lengths == array.shape[1]).all():
            raise ModelError(f"a row has other {name} than the {array.shape[1]} that are encoded")
        values = column.flatten().to_numpy(zero_copy_only=False)
        array[is_valid] = values.reshape(int(is_valid.sum()), array.shape[1])
    return coded


def _lists(values: Array, value_type: pa.DataType) -> pa.ListArray:
    # The rows of `values`, (n, length), as Arrow lists.
    start = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    flat_values = pa.array(values.ravel(), value_type)
    return pa.ListArray.from_arrays(pa.array(start), flat_values)

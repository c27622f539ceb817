"""Features as the arrays that models read: numbers, and fields as codes of a vocabulary.

A missing number is NaN. Of a field, a missing value is code 0 and one that is not in the vocabulary
code 1; the vocabulary's values follow in ascending order. What is encoded is what the feature tables
hold as of a cutoff (`data.features`), so nothing later can be in it.
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
from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, NumericType, StringType, StructType

from recspark import schema
from recspark.data.blocks import Array
from recspark.errors import ModelError

MISSING, UNKNOWN, FIRST = 0, 1, 2  # codes of a field
CATEGORY_LEVELS = 3  # a category path gives a field for each of its first levels
_ARRAYS = "encoding"  # the arrays of an encoding are named encoding.numbers, encoding.fields.NAME
_KEYS = ("cutoff", "user_idx", "item_idx")


@dataclass(frozen=True)
class Encoding:
    """Which features are read, in order, and the vocabulary of each field.

    Parameters
    ----------
    numbers : names of numbers
    fields : name of a field to its values, ascending
    """

    numbers: tuple[str, ...]
    fields: Mapping[str, tuple[str, ...]]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of codes of each field, those of missing and unknown among them."""
        return tuple(FIRST + len(values) for values in self.fields.values())

    def encode(self, frame: DataFrame, keys: Sequence[str]) -> DataFrame:
        """Return `keys, numbers array<float>, fields array<int>`, a row for each of `frame`.

        Raises ModelError where `frame` lacks one of the features. Lazy and narrow.
        """
        lacking = [n for n in (*self.numbers, *self.fields) if n not in frame.columns]
        if lacking:
            raise ModelError(f"features {lacking} are not there, but {sorted(frame.columns)}")
        read = frame.select(
            *keys,
            *[F.col(name).cast("double").alias(name) for name in self.numbers],
            *[F.col(name).cast("string").alias(name) for name in self.fields],
        )
        out = StructType([*(read.schema[key] for key in keys), *schema.ENCODED.fields])
        encoding = Encoding(self.numbers, dict(self.fields))

        def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            for batch in batches:
                arrays = [*(batch.column(key) for key in keys), *encoding.columns(batch)]
                yield pa.RecordBatch.from_arrays(arrays, names=out.names)

        return read.mapInArrow(run, out)

    def columns(self, batch: pa.RecordBatch) -> tuple[pa.ListArray, pa.ListArray]:
        """Return `numbers` and `fields` of a batch that has a column for each feature."""
        numbers = np.empty((batch.num_rows, len(self.numbers)), np.float32)
        for n, name in enumerate(self.numbers):
            numbers[:, n] = batch.column(name).to_numpy(zero_copy_only=False)
        fields = np.empty((batch.num_rows, len(self.fields)), np.int32)
        for n, (name, values) in enumerate(self.fields.items()):
            column = batch.column(name)
            at = pc.index_in(column, value_set=pa.array(values, pa.string()))
            code = pc.fill_null(pc.add(at, FIRST), UNKNOWN).to_numpy(zero_copy_only=False)
            fields[:, n] = np.where(column.is_valid().to_numpy(zero_copy_only=False), code, MISSING)
        return _lists(numbers, pa.float32()), _lists(fields, pa.int32())

    def missing(self, n: int) -> tuple[Array, Array]:
        """Return the arrays of n rows of which nothing is known."""
        numbers = np.full((n, len(self.numbers)), np.nan, np.float32)
        return numbers, np.full((n, len(self.fields)), MISSING, np.int32)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as `of_dict` takes them."""
        return {"numbers": list(self.numbers), "fields": {n: [*v] for n, v in self.fields.items()}}

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Encoding:
        """Return the encoding of what `to_dict` gave."""
        fields = {name: tuple(texts) for name, texts in values["fields"].items()}
        return cls(tuple(values["numbers"]), fields)

    def to_text(self) -> str:
        """Return one line of letters and digits, as `of_text` takes it: no word of it can be masked."""
        return base64.b64encode(zlib.compress(json.dumps(self.to_dict()).encode())).decode()

    @classmethod
    def of_text(cls, text: str) -> Encoding:
        """Return the encoding of what `to_text` gave."""
        return cls.of_dict(json.loads(zlib.decompress(base64.b64decode(text))))

    def to_arrays(self) -> dict[str, Array]:
        """Return names and vocabularies as arrays of texts, to be saved beside a model's own."""
        named = {"numbers": self.numbers, "fields": tuple(self.fields)}
        named.update({f"fields.{name}": values for name, values in self.fields.items()})
        return {f"{_ARRAYS}.{name}": np.array(texts, np.str_) for name, texts in named.items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> tuple[Encoding, dict[str, Array]]:
        """Return the encoding among `arrays`, and the arrays that are not of it."""
        texts = {
            name.removeprefix(f"{_ARRAYS}."): tuple(array.tolist())
            for name, array in arrays.items()
            if name.startswith(f"{_ARRAYS}.")
        }
        fields = {name: texts[f"fields.{name}"] for name in texts["fields"]}
        others = {n: array for n, array in arrays.items() if not n.startswith(f"{_ARRAYS}.")}
        return cls(texts["numbers"], fields), others


def learn(features: DataFrame, max_values: int = 1000, names: Sequence[str] = ()) -> Encoding:
    """Return the encoding of the columns `names` of `features`, of all but the keys where none is
    named.

    Numeric columns are numbers, texts are fields. A vocabulary has the `max_values` most frequent
    values (of two as frequent the smaller); the rest is unknown. One job where there is a field, two
    shuffles of distinct values; the driver holds the vocabularies.
    """
    kinds = {f.name: f.dataType for f in features.schema.fields if f.name not in _KEYS}
    names = names or tuple(kinds)
    if unknown := sorted({*names} - {*kinds}):
        raise ModelError(f"features {unknown} are not there, but {sorted(kinds)}")
    numbers = tuple(n for n in names if isinstance(kinds[n], NumericType))
    fields = [n for n in names if isinstance(kinds[n], StringType)]
    if other := sorted({*names} - {*numbers, *fields}):
        raise ModelError(f"features {other} are neither numbers nor texts")
    vocabularies: dict[str, list[str]] = {name: [] for name in fields}
    if fields:
        values = F.explode(
            F.array(*[F.struct(F.lit(n).alias("field"), F.col(n).alias("value")) for n in fields])
        )
        frequent_first = Window.partitionBy("field").orderBy(F.desc("count"), "value")
        counts = (
            features.select(values.alias("v"))
            .select("v.*")
            .where("value IS NOT NULL")
            .groupBy("field", "value")
            .count()
            .withColumn("place", F.row_number().over(frequent_first))
            .where(F.col("place") <= max_values)
        )
        for row in counts.select("field", "value").collect():
            vocabularies[row["field"]].append(row["value"])
    return Encoding(numbers, {name: tuple(sorted(found)) for name, found in vocabularies.items()})


def flat(features: DataFrame, prefix: str = "") -> DataFrame:
    """Return `user_features` or `item_features` with columns that can be encoded: of a list of texts
    (a category path) a text for each of the first levels, `category_1`, …; `prefix` goes before the
    name of each feature. Lazy and narrow.
    """
    columns = []
    for field in features.schema.fields:
        name = field.name
        if name in _KEYS:
            columns.append(F.col(name))
        elif isinstance(field.dataType, ArrayType):
            for level in range(1, CATEGORY_LEVELS + 1):
                at_level = F.get(F.col(name), F.lit(level - 1))
                columns.append(at_level.alias(f"{prefix}{name}_{level}"))
        else:
            columns.append(F.col(name).alias(f"{prefix}{name}"))
    return features.select(*columns)


def with_features(
    queries: DataFrame, user_features: DataFrame, encoding: Encoding | None
) -> DataFrame:
    """Return `queries` with a column `features`: of each user what `user_features` says, encoded.

    Null where it says nothing of the user. Both as of one cutoff. One join by user, no action. Without
    an `encoding` (a model that reads no features) the queries as they are.
    """
    if encoding is None:
        return queries
    coded = encoding.encode(flat(user_features), ("user_idx",)).select(
        "user_idx", F.struct("numbers", "fields").alias("features")
    )
    return queries.join(coded, on="user_idx", how="left")


def item_arrays(item_features: DataFrame, items: Array, encoding: Encoding) -> tuple[Array, Array]:
    """Return numbers float32 (n_items, n_numbers) and fields int32 (n_items, n_fields) of `items`.

    In the order of `items`, int32 (n_items,) ascending; an item without features has everything
    missing. One job; the driver holds 4 bytes an item and feature.
    """
    table = encoding.encode(flat(item_features), ("item_idx",)).toArrow().combine_chunks()
    numbers, fields = encoding.missing(len(items))
    if table.num_rows:
        [batch] = table.to_batches()
        item = batch.column("item_idx").to_numpy()
        at = np.minimum(np.searchsorted(items, item), len(items) - 1)
        known = items[at] == item
        coded = parse_encoded(batch, encoding)
        numbers[at[known]], fields[at[known]] = coded[0][known], coded[1][known]
    return numbers, fields


def parse_encoded(
    batch: pa.RecordBatch | pa.StructArray, encoding: Encoding
) -> tuple[Array, Array]:
    """Return numbers float32 (n, n_numbers) and fields int32 (n, n_fields) of an encoded batch.

    `batch` : has columns, or is a struct of, `numbers` and `fields`. A null struct has everything
    missing. Raises ModelError where a row has another number of features.
    """
    if isinstance(batch, pa.StructArray):
        valid = batch.is_valid().to_numpy(zero_copy_only=False)
        coded = encoding.missing(len(batch))
        kept = batch.filter(pa.array(valid))
        columns = kept.field("numbers"), kept.field("fields")
    else:
        valid = np.ones(batch.num_rows, bool)
        coded = encoding.missing(batch.num_rows)
        columns = batch.column("numbers"), batch.column("fields")
    for out, column, what in zip(coded, columns, ("numbers", "fields"), strict=True):
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        if not (lengths == out.shape[1]).all():
            raise ModelError(f"a row has other {what} than the {out.shape[1]} that are encoded")
        values = column.flatten().to_numpy(zero_copy_only=False)
        out[valid] = values.reshape(int(valid.sum()), out.shape[1])
    return coded


def _lists(values: Array, kind: pa.DataType) -> pa.ListArray:
    start = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    flat_values = pa.array(values.ravel(), kind)
    return pa.ListArray.from_arrays(pa.array(start), flat_values)

"""What an item tower reads of an item: its texts, categories, price and features as hashed tokens.

A token is a letter trigram of a word of a text, a category, or a class of a number. Tokens are
hashed into a fixed number of codes, so no vocabulary is kept, and an item that nobody acted on yet
has tokens like any other. Where an item lacks something, the tokens of it are not there.

Source: Huang, He, Gao, Deng, Acero, Heck 2013, "Learning Deep Structured Semantic Models for Web
Search using Clickthrough Data", section 3.2 (word hashing by letter trigrams).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame
from pyspark.sql.types import ArrayType

from recspark import schema
from recspark.data.blocks import Array
from recspark.data.tokens import tokenise

Part = Literal["item_name", "text", "category", "price"]
NO_VIEW = -1
_TOKENS = schema.columns(
    item_idx=schema.INT,
    view=schema.INT,
    codes=schema.ITEM_IDXS,
    weights=ArrayType(schema.FLOAT),
)


@dataclass(frozen=True)
class TokenRules:
    """Which tokens an item has, and which view it is in.

    Parameters
    ----------
    parts : what is read of the catalogue
    features : columns of the flat `item_features` that are read too
    n_buckets : codes are 0 to n_buckets - 1
    max_trigrams : only the first that many different trigrams of a text are read
    views : the categories of each view, by its name. An item is in the first view, in this order,
        that has one of its categories; a view without categories has all other items. No views: all
        items are in the view 0
    """

    parts: tuple[Part, ...]
    features: tuple[str, ...]
    n_buckets: int
    max_trigrams: int
    views: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class ItemTokens:
    """The tokens of n items: item i has `codes[starts[i]:starts[i + 1]]`, and at least one.

    `item_idx` int32 (n,), ascending; `views` int32 (n,), the view of each item; `starts` int64
    (n + 1,); `codes` int32 and `weights` float32 (starts[-1],). The tokens of one part of an item
    weigh the same, and the squares of their weights add up to 1.
    """

    item_idx: Array
    views: Array
    starts: Array
    codes: Array
    weights: Array

    def only(self, is_kept: Array) -> ItemTokens:
        """Return the items for which `is_kept`, bool (n,), is True."""
        lengths = np.diff(self.starts)
        is_kept_token = np.repeat(is_kept, lengths)
        starts = np.concatenate([[0], np.cumsum(lengths[is_kept])])
        return ItemTokens(
            self.item_idx[is_kept],
            self.views[is_kept],
            starts,
            self.codes[is_kept_token],
            self.weights[is_kept_token],
        )

    def of(self, items: Array) -> ItemTokens:
        """Return those of `items`, item_idx ascending, that are here."""
        return self.only(np.isin(self.item_idx, items))


def item_tokens(catalogue: DataFrame, item_features: DataFrame, rules: TokenRules) -> ItemTokens:
    """Return the tokens of the items of `catalogue` that have any and are in a view.

    `catalogue` : item_idx, item_name, category, price, text. `item_features` : flat, see
    `feature_encoding.flat`; read if `rules` names features. One job, with a join by item in that
    case. The driver holds 8 bytes per token and 16 per item.
    """
    items = catalogue.select("item_idx", "item_name", "category", "price", "text")
    if rules.features:
        # `mapInArrow` takes a dot in the name of a column for a field of a struct.
        numbered = [schema.quoted(name).alias(f"_{n}") for n, name in enumerate(rules.features)]
        features = item_features.select("item_idx", *numbered)
        items = items.join(features, on="item_idx", how="left")
    n_described = len(items.columns) - len(rules.features)

    def tokens_of_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            described = batch.schema.names[:n_described]
            names = [*described, *(f"feature_{name}" for name in rules.features)]
            batch = pa.RecordBatch.from_arrays(batch.columns, names=names)
            starts, codes, weights = tokens_of(batch, rules)
            offsets = pa.array(starts, pa.int32())
            yield pa.RecordBatch.from_arrays(
                [
                    batch.column("item_idx"),
                    pa.array(views_of(batch.column("category"), rules.views), pa.int32()),
                    pa.ListArray.from_arrays(offsets, pa.array(codes, pa.int32())),
                    pa.ListArray.from_arrays(offsets, pa.array(weights, pa.float32())),
                ],
                names=_TOKENS.names,
            )

    rows = items.mapInArrow(tokens_of_batches, _TOKENS).toArrow().combine_chunks()
    rows = rows.sort_by("item_idx").combine_chunks()
    codes, weights = rows.column("codes").combine_chunks(), rows.column("weights").combine_chunks()
    lengths = codes.value_lengths().to_numpy(zero_copy_only=False)
    found = ItemTokens(
        rows.column("item_idx").to_numpy().astype(np.int32),
        rows.column("view").to_numpy().astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        codes.flatten().to_numpy(zero_copy_only=False),
        weights.flatten().to_numpy(zero_copy_only=False),
    )
    return found.only((lengths > 0) & (found.views != NO_VIEW))


def tokens_of(batch: pa.RecordBatch, rules: TokenRules) -> tuple[Array, Array, Array]:
    """Return `starts`, `codes` and `weights` of the items of a batch; see `ItemTokens`.

    `batch` has the columns of `catalogue` and, named `feature_NAME`, the features.
    """
    entries: list[tuple[Array, Array, Array]] = []  # item, code, weight of each token of a part
    for part in rules.parts:
        column = batch.column(part)
        if part in ("item_name", "text"):
            most = rules.max_trigrams
            entries.append(_weighed(*trigrams(column.to_pylist(), part), rules.n_buckets, most))
        elif part == "category":
            lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
            item = np.repeat(np.arange(len(column)), lengths)
            entries.append(_weighed(item, *_hashes(column.flatten(), part), rules.n_buckets))
        else:
            entries.append(_of_column(column, part, rules.n_buckets))
    columns_of_features = {name: batch.column(f"feature_{name}") for name in rules.features}
    entries += [_of_column(c, name, rules.n_buckets) for name, c in columns_of_features.items()]
    item, code, weight = (np.concatenate(columns) for columns in zip(*entries, strict=True))
    order = np.argsort(item, kind="stable")
    n_tokens = np.bincount(item, minlength=batch.num_rows)
    starts = np.concatenate([[0], np.cumsum(n_tokens)])
    return starts, code[order].astype(np.int32), weight[order].astype(np.float32)


def trigrams(texts: Sequence[str | None], part: str) -> tuple[Array, Array, Array]:
    """Return the item int64, the hash int64 and True of each letter trigram of the texts, in order.

    Words are those of `tokens.tokenise`; `#` stands at both ends of a word, so a word of two letters
    has two trigrams: "to" has #to and to#. A word of one letter has one. The `part` is hashed with
    the trigram.
    """
    tokens = tokenise(texts)
    coded = tokens.words.dictionary_encode()
    hashes = []
    for word in coded.dictionary.to_pylist():
        marked = f"#{word}#"
        grams = (marked[n : n + 3] for n in range(len(marked) - 2))
        hashes.append([token_hash(part, gram) for gram in grams])
    n_grams = np.array([len(grams) for grams in hashes], np.int64)
    flat = np.array([value for grams in hashes for value in grams], np.int64)
    begins = np.cumsum(n_grams) - n_grams
    word = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    item_of_word = np.repeat(np.arange(len(tokens.start) - 1), np.diff(tokens.start))
    lengths = n_grams[word]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found = flat[np.repeat(begins[word], lengths) + within] if len(flat) else flat
    return np.repeat(item_of_word, lengths), found, np.ones(len(found), bool)


def token_hash(part: str, token: str) -> int:
    """Return the hash of a token of a part, of 32 bits: the same on every machine and every day."""
    return zlib.crc32(f"{part}\0{token}".encode())


def views_of(categories: pa.ListArray, views: Mapping[str, Sequence[str]]) -> Array:
    """Return the number of the view of each item, int32 (n,), or NO_VIEW; see `TokenRules`.

    >>> lists = pa.array([["war"], ["crime", "comedy"], ["comedy"], None])
    >>> views_of(lists, {"light": ["comedy"], "dark": ["crime"], "others": []}).tolist()
    [2, 0, 0, 2]
    """
    if not views:
        return np.zeros(len(categories), np.int32)
    values = [value for of_view in views.values() for value in of_view]
    view_of_value = np.repeat(np.arange(len(views)), [len(of_view) for of_view in views.values()])
    rest = [n for n, of_view in enumerate(views.values()) if not of_view]
    lengths = categories.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    item = np.repeat(np.arange(len(categories)), lengths)
    index = pc.index_in(categories.flatten(), value_set=pa.array(values, pa.string()))
    position = index.fill_null(-1).to_numpy(zero_copy_only=False)
    none = len(views)
    found = np.full(len(categories), none)
    np.minimum.at(found, item[position >= 0], view_of_value[position[position >= 0]])
    return np.where(found < none, found, rest[0] if rest else NO_VIEW).astype(np.int32)


def _of_column(column: pa.Array, name: str, n_buckets: int) -> tuple[Array, Array, Array]:
    """Return the tokens of a column of texts or numbers: one for each item with a value.

    A number is a class: twice log2(1 + |x|), rounded, and the sign.
    """
    if not pa.types.is_string(column.type):
        values = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
        is_known = np.isfinite(values)
        steps = np.rint(2 * np.log2(1 + np.abs(np.where(is_known, values, 0.0)))).astype(np.int64)
        texts = [f"{step}" if value >= 0 else f"-{step}" for step, value in zip(steps, values)]
        column = pa.array(texts, pa.string(), mask=~is_known)
    return _weighed(np.arange(len(column)), *_hashes(column, name), n_buckets)


def _hashes(column: pa.Array, part: str) -> tuple[Array, Array]:
    """Return the hash of each text int64 (n,), and whether there is a text."""
    coded = column.dictionary_encode()
    of_value = np.array([token_hash(part, text) for text in coded.dictionary.to_pylist()], np.int64)
    index = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    hashes = of_value[np.maximum(index, 0)] if len(of_value) else np.zeros(len(index), np.int64)
    return hashes, index >= 0


def _weighed(
    item: Array, hashes: Array, is_valid: Array, n_buckets: int, most: int | None = None
) -> tuple[Array, Array, Array]:
    """Return item, code and weight of the different codes of each item, by item and by code.

    Of each item only the first `most` codes are kept; None = all. The weight is 1 / sqrt(number of
    codes of the item).
    """
    keys = item[is_valid].astype(np.int64) * n_buckets + hashes[is_valid] % n_buckets
    distinct, first = np.unique(keys, return_index=True)
    item, code = distinct // n_buckets, distinct % n_buckets
    if most is not None:
        by_place = np.lexsort((first, item))  # in the order of the text
        n_codes = np.bincount(item) if len(item) else np.zeros(0, np.int64)
        begins = np.cumsum(n_codes) - n_codes
        is_kept = np.zeros(len(item), bool)
        is_kept[by_place] = np.arange(len(item)) - begins[item[by_place]] < most
        item, code = item[is_kept], code[is_kept]
    n_codes = np.bincount(item) if len(item) else np.zeros(0, np.int64)
    return item, code, 1 / np.sqrt(n_codes[item])

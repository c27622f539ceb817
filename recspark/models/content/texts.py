"""What the encoders of texts share: which texts of an item are read, and the words that are known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from recspark import schema
from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.tokens import tokenise
from recspark.engines.compiled import compiled_in_order
from recspark.errors import EmptyDataError
from recspark.models.base import Settings
from recspark.models.setting_types import RefitDays

Part = Literal["item_name", "text", "category"]
_COUNTED = schema.columns(word=schema.STRING, uses=schema.LONG, items=schema.LONG)
_NO_WORD = ""  # no word is empty: its row counts the items that have a word


class TextSettings(Settings):
    """Settings that all encoders of texts share."""

    parts: tuple[Part, ...] = Field(
        ("item_name", "text"),
        min_length=1,
        description="what is read of an item, in this order: item_name, text, category. Words of two "
        "parts are neighbours",
    )


class DictionarySettings(TextSettings):
    """Settings of encoders that know the words of the catalogue."""

    min_items: int = Field(
        2,
        ge=1,
        description="a word of fewer items is unknown: it says nothing about other items",
    )
    max_words: int = Field(
        100_000,
        ge=1,
        le=10_000_000,
        description="words in the dictionary, those of the most items. The driver and each task "
        "hold them. Guess",
    )
    refit_days: RefitDays = 7


class LearntWordsSettings(DictionarySettings):
    """Settings of encoders that learn the vectors of words by negative sampling."""

    n_negatives: int = Field(
        5, ge=1, description="negative sampling: noise words per example. Mikolov et al.: 5 to 20"
    )
    ns_exponent: float = Field(
        0.75,
        ge=-2,
        le=2,
        description="noise words are drawn in proportion to uses^ns_exponent. Source: word2vec",
    )
    subsample: float | None = Field(
        1e-3,
        gt=0,
        description="words with more than this share of all uses lose some of their uses at random; "
        "null = no subsampling. Source: word2vec",
    )
    learning_rate: float = Field(
        0.025,
        gt=0,
        description="learning rate at the first example; it falls linearly to 0.0001. Source: word2vec",
    )


@dataclass(frozen=True)
class Dictionary:
    """The words that an encoder knows; the position of a word is its number.

    `words` strings (n_words,), ascending; `uses` int64: how often each occurs in all items; `items`
    int64: in how many items it occurs. `n_items` is the number of items that have a word at all.
    """

    words: pa.StringArray
    uses: Array
    items: Array
    n_items: int

    def __len__(self) -> int:
        return len(self.words)

    @property
    def idf(self) -> Array:
        """What a word tells about an item, float32 (n_words,): ln((1 + n_items) / (1 + items)).

        It is 0 for a word of all items, which tells nothing. Source: Sparck Jones 1972; 1 is added
        twice, so that a night's first items do not weigh too much.
        """
        ratio = (1 + self.n_items) / (1 + self.items.astype(np.float64))
        return np.log(ratio).astype(np.float32)

    def numbers(self, batch: pa.RecordBatch, parts: tuple[Part, ...]) -> tuple[Array, Array]:
        """Return the known words of the items of a batch: (start, numbers).

        Item i has the words `numbers[start[i]:start[i + 1]]`, int32, in the order of its text.
        """
        tokens = tokenise(texts_of(batch, parts))
        numbers = pc.index_in(tokens.words, value_set=self.words).fill_null(-1).to_numpy()
        is_known = numbers >= 0
        n_known_before = np.concatenate([[0], np.cumsum(is_known)])
        return n_known_before[tokens.start], numbers[is_known].astype(np.int32)

    def to_arrays(self) -> dict[str, Array]:
        """Return the dictionary as arrays, to be saved beside a model's arrays."""
        texts = [word.encode() for word in self.words.to_pylist()]
        return {
            "words": np.frombuffer(b"".join(texts), np.uint8),
            "words.length": np.array([len(text) for text in texts], np.int32),
            "words.uses": self.uses,
            "words.items": self.items,
            "words.n_items": np.array([self.n_items], np.int64),
        }

    @classmethod
    def of_arrays(cls, arrays: dict[str, Array]) -> Self:
        """Return the dictionary that `to_arrays` wrote into `arrays`."""
        ends = np.cumsum(arrays["words.length"], dtype=np.int32)
        offsets = np.concatenate([np.zeros(1, np.int32), ends])
        words = pa.StringArray.from_buffers(
            len(ends), pa.py_buffer(offsets), pa.py_buffer(arrays["words"].tobytes())
        )
        n_items = int(arrays["words.n_items"][0])
        return cls(words, arrays["words.uses"], arrays["words.items"], n_items)


def catalogue_of(data: Dataset) -> DataFrame:
    """Return `schema.CONTENT` of the items; raises EmptyDataError where nothing describes them."""
    if data.catalogue is None:
        raise EmptyDataError(
            "an encoder of texts needs descriptions of items; the tables have none"
        )
    return data.catalogue


def make_dictionary(catalogue: DataFrame, settings: DictionarySettings) -> Dictionary:
    """Return the words of `catalogue` that are in at least `min_items` items, at most `max_words`.

    The words of the most items are kept; of words that are equally frequent, the smaller ones. Raises
    EmptyDataError where no word is left. Cost: one job with a shuffle of the distinct words of each
    batch; the driver holds the dictionary.
    """
    parts = settings.parts

    def count(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            yield count_words(batch, parts)

    counted = (
        catalogue.select(*schema.CONTENT.names)
        .mapInArrow(count, _COUNTED)
        .groupBy("word")
        .agg(F.sum("uses").alias("uses"), F.sum("items").alias("items"))
        .where((F.col("items") >= settings.min_items) | (F.col("word") == _NO_WORD))
        .orderBy(F.col("word") != _NO_WORD, F.desc("items"), "word")
        .limit(settings.max_words + 1)
        .toArrow()
        .sort_by("word")
        .combine_chunks()
    )
    if counted.num_rows < 2:
        raise EmptyDataError(
            f"no word is in {settings.min_items} items or more; have the items a name or a text "
            f"(parts = {list(settings.parts)}), and is min_items not too high?"
        )
    uses, items = (counted.column(name).to_numpy().astype(np.int64) for name in ("uses", "items"))
    words = counted.column("word").combine_chunks()[1:]  # the row of no word comes first
    return Dictionary(words, uses[1:], items[1:], int(items[0]))


def count_words(batch: pa.RecordBatch, parts: tuple[Part, ...]) -> pa.RecordBatch:
    """Return the distinct words of a batch: `word, uses, items`; the row of the empty word has the
    number of items that have a word.
    """
    tokens = tokenise(texts_of(batch, parts))
    coded = tokens.words.dictionary_encode()
    numbers = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    item = np.repeat(np.arange(batch.num_rows), np.diff(tokens.start))
    n_words = len(coded.dictionary)
    pairs = np.unique(item * max(n_words, 1) + numbers)
    uses = np.bincount(numbers, minlength=n_words)
    items = np.bincount(pairs % max(n_words, 1), minlength=n_words)
    n_items = len(np.unique(item))
    return pa.RecordBatch.from_arrays(
        [
            pa.array([*coded.dictionary.to_pylist(), _NO_WORD]),
            pa.array(np.append(uses, n_items), pa.int64()),
            pa.array(np.append(items, n_items), pa.int64()),
        ],
        names=_COUNTED.names,
    )


def numbered(
    catalogue: DataFrame, dictionary: Dictionary, parts: tuple[Part, ...], names: tuple[str, str]
) -> DataFrame:
    """Return the known words of each item as numbers: a bigint, the item, and an array<int>.

    `names` : the names of the two columns. Items without a known word are left out. Narrow, lazy.
    """

    def number(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            start, words = dictionary.numbers(batch, parts)
            lists = pa.ListArray.from_arrays(pa.array(start, pa.int32()), pa.array(words))
            has_word = pa.array(np.diff(start) > 0)
            item = batch.column("item_idx").cast(pa.int64())
            columns = [item.filter(has_word), lists.filter(has_word)]
            yield pa.RecordBatch.from_arrays(columns, names=list(names))

    result = schema.columns(**{names[0]: schema.LONG, names[1]: schema.ITEM_IDXS})
    return catalogue.select(*schema.CONTENT.names).mapInArrow(number, result)


def texts_of(batch: pa.RecordBatch, parts: tuple[Part, ...]) -> list[str]:
    """Return the text of each item of a batch of `schema.CONTENT`: its `parts`, a line each.

    Each category is a line of its own.
    """
    columns = []
    for part in parts:
        column = batch.column(part)
        column = pc.binary_join(column, "\n") if part == "category" else column
        # Filled here: `binary_join_element_wise` drops a row of nulls only when it skips nulls.
        columns.append(column.fill_null(""))
    texts: list[str] = pc.binary_join_element_wise(*columns, "\n").to_pylist()
    return texts


@compiled_in_order
def weighted_means(start: Array, numbers: Array, weights: Array, vectors: Array) -> Array:
    """Return the weighted mean of each item's vectors, float32 (n, size); NaN for an item without.

    Item i has the vectors `vectors[numbers[start[i]:start[i + 1]]]`, each with the weight of its
    number. Sums go in the order of `numbers`, so they depend on no other item.
    """
    size = vectors.shape[1]
    means = np.empty((len(start) - 1, size), np.float32)
    total = np.empty(size, np.float64)
    for item in range(len(means)):
        total[:] = 0
        weight = 0.0
        for position in range(start[item], start[item + 1]):
            number = numbers[position]
            weight += weights[number]
            for f in range(size):
                total[f] += weights[number] * vectors[number, f]
        for f in range(size):
            means[item, f] = total[f] / weight if weight > 0 else np.nan
    return means

"""Tf-idf: an item is the words of its texts, each as often as it is used and the more, the rarer it is."""

from __future__ import annotations

from datetime import datetime
from typing import Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.engines.compiled import compiled_in_order
from recspark.engines.word2vec_kernels import key, mix
from recspark.models.base import NOTHING, Algorithm, EncoderModel, FitOptions, Needed, Settings
from recspark.models.content.texts import (
    Dictionary,
    DictionarySettings,
    Part,
    catalogue_of,
    make_dictionary,
)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # step of the state of SplitMix64, see `word2vec_kernels`


class TfidfSettings(DictionarySettings):
    """Settings of `Tfidf`."""

    max_words: int = Field(
        2_000,
        ge=1,
        le=1_000_000,
        description="words in the dictionary, those of the most items, and with embedding_size null "
        "the length of a vector. NDCG@10 of cold films by their plots: 2,000 words .130, all 13,000 "
        "words .136",
    )
    embedding_size: int | None = Field(
        None,
        ge=1,
        description="null = a component for each word of the dictionary, exact; a number = the words are "
        "projected at random into so many components, and a cosine is wrong by about "
        "1 / sqrt(embedding_size). Cold films: 13,000 words in 1,024 components .103, in 2,048 .119",
    )
    sublinear: bool = Field(
        True,
        description="a word that an item uses n times counts 1 + ln(n) times, not n times (Salton and "
        "Buckley 1988). Cold films: .136, without it .122",
    )


class TfidfModel(EncoderModel):
    """`dictionary` of n_words; `seed` of the projection."""

    def __init__(
        self, settings: TfidfSettings, cutoff: datetime, dictionary: Dictionary, seed: int
    ) -> None:
        super().__init__(settings, cutoff)
        self.dictionary, self.seed = dictionary, seed
        self._settings = settings

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`."""
        return {"seed": np.array([self.seed], np.int64), **self.dictionary.to_arrays()}

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        assert isinstance(settings, TfidfSettings)
        return cls(settings, cutoff, Dictionary.of_arrays(arrays), int(arrays["seed"][0]))

    def coder(self) -> TfidfCoder:
        """See `EncoderModel`."""
        settings = self._settings
        size = settings.embedding_size
        return TfidfCoder(self.dictionary, settings.parts, size, settings.sublinear, self.seed)


class TfidfCoder:
    """Vectors of length 1: of the known words, or of their projection."""

    def __init__(
        self,
        dictionary: Dictionary,
        parts: tuple[Part, ...],
        size: int | None,
        sublinear: bool,
        seed: int,
    ) -> None:
        self.dictionary, self.parts, self.size = dictionary, parts, size
        self.sublinear, self.seed = sublinear, seed

    def encode(self, batch: pa.RecordBatch) -> Array:
        """See `Coder`."""
        start, numbers = self.dictionary.numbers(batch, self.parts)
        item = np.repeat(np.arange(batch.num_rows), np.diff(start))
        n_words = len(self.dictionary)
        pairs, uses = np.unique(item * n_words + numbers, return_counts=True)
        items, words = np.divmod(pairs, n_words)
        weights = (1 + np.log(uses) if self.sublinear else uses) * self.dictionary.idf[words]
        pair_start = np.searchsorted(items, np.arange(batch.num_rows + 1))
        size = n_words if self.size is None else self.size
        return unit_sums(
            pair_start, words, weights.astype(np.float64), size, self.size is not None, self.seed
        )


@compiled_in_order
def unit_sums(
    start: Array, words: Array, weights: Array, size: int, is_projected: bool, seed: int
) -> Array:
    """Return the vector of each item, scaled to length 1, float32 (n, size); NaN without a word.

    Item i has the distinct words `words[start[i]:start[i + 1]]` with their `weights`. If
    `is_projected`, word w is a vector of +1 and -1 that is drawn from (seed, w), else component w.
    Sums depend on no other item.
    """
    vectors = np.zeros((len(start) - 1, size), np.float32)
    total = np.zeros(size, np.float64)
    for item in range(len(vectors)):
        norm = 0.0
        if is_projected:
            _add_projected(start[item], start[item + 1], words, weights, seed, total)
            for f in range(size):
                norm += total[f] * total[f]
        else:
            for position in range(start[item], start[item + 1]):
                norm += weights[position] * weights[position]
        if norm == 0:
            vectors[item, :] = np.nan
        elif is_projected:
            for f in range(size):
                vectors[item, f] = total[f] / np.sqrt(norm)
        else:
            for position in range(start[item], start[item + 1]):
                vectors[item, words[position]] = weights[position] / np.sqrt(norm)
    return vectors


@compiled_in_order
def _add_projected(
    begin: int, end: int, words: Array, weights: Array, seed: int, total: Array
) -> None:
    # Sets `total` to the sum of the words' random signs, each times its weight.
    total[:] = 0
    for position in range(begin, end):
        weight = weights[position]
        state = key(seed, words[position], 0, 11)
        bits = np.uint64(0)
        for f in range(len(total)):
            if f % 64 == 0:
                state += _GOLDEN
                bits = mix(state)
            total[f] += weight if bits & np.uint64(1) else -weight
            bits >>= np.uint64(1)


class Tfidf(Algorithm[TfidfSettings]):
    """The bar of all encoders of texts: it knows which words two items share, and not what they mean.

    The weight of a word is its uses in the item times its idf (`Dictionary.idf`), and a vector has the
    length 1.

    What is lost? By default, the words beyond the `max_words` that most items have: these are the
    rarest, each of which few pairs of items share, but an item that has no others has no vector. A
    vector takes 4 bytes per word in memory (8 kB); in the table, where most components are 0, it takes
    little more than its words. With `embedding_size` a large dictionary fits a short vector, and every
    cosine gets an error. Measured on plots, the shorter dictionary is the better choice of the two.

    Source: Salton and Buckley 1988; projection by random signs: Achlioptas 2003, "Database-friendly
    random projections".
    """

    settings_class = TfidfSettings
    tags = frozenset()

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> TfidfModel:
        """See `Algorithm.fit`. Cost: one job; driver: word-sized. Raises EmptyDataError without words."""
        dictionary = make_dictionary(catalogue_of(data), self.settings)
        return TfidfModel(self.settings, data.cutoff, dictionary, options.seed)

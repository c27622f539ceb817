"""Vectors that somebody else has trained: from a file, by the words of an item or by its id.

The file stays where it is: the settings name it and its SHA-256, so that another file is another
encoder, whose vectors have a key of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.data.tokens import tokenise
from recspark.data.vector_files import Format, VectorFile, read_vectors
from recspark.errors import ConfigError, EmptyDataError
from recspark.models.base import NOTHING, Algorithm, EncoderModel, FitOptions, Needed, Settings
from recspark.models.content.texts import (
    Dictionary,
    DictionarySettings,
    Part,
    catalogue_of,
    make_dictionary,
    texts_of,
    weighted_means,
)
from recspark.models.kinds import Kind

# A word that is this frequent weighs a half. Source: Arora, Liang and Ma 2017, section 4.1.
_HALF_WEIGHT_SHARE = 1e-3
_NO_WORDS, _UNKNOWN_WORDS, _UNKNOWN_ITEM = "no words", "no known word", "not in the file"


class FileVectorsSettings(DictionarySettings):
    """Settings of `FileVectors`."""

    file: str = Field(
        "",
        description="URI of the file of vectors. With weighting: plain or rank, and with tokens: "
        "items, executors read it too",
    )
    sha256: str = Field(
        "", pattern="^([0-9a-f]{64})?$", description="SHA-256 of the file, as it lies there"
    )
    format: Format = Field(
        "text",
        description="text, binary = the formats of word2vec, compressed by gzip or not; npy = an array "
        "of numpy with a row per vector, and `index`",
    )
    index: str = Field(
        "",
        description="with format: npy, URI of the text file with the token of each row, a line each",
    )
    index_sha256: str = Field("", pattern="^([0-9a-f]{64})?$", description="SHA-256 of the index")
    tokens: Literal["words", "items"] = Field(
        "words",
        description="what a token of the file is. words = a word, in lower case as our tokeniser gives "
        "it; items = the item_id of an item",
    )
    weighting: Literal["idf", "rank", "plain"] = Field(
        "idf",
        description="with tokens: words, the weight of a word in the mean. idf = how rare it is among "
        "the items: as this changes with the catalogue, all items are encoded again every refit_days. "
        "rank = how rare it is by its place in a file whose most frequent words come first (Arora et al. "
        "2017, with shares by Zipf's law); plain = 1",
    )
    min_items: int = Field(
        1,
        ge=1,
        description="with weighting: idf, a word of fewer items is unknown. The file knows a word "
        "that only one item has, too",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if (self.format == "npy") != bool(self.index):
            raise ValueError(
                "format: npy needs the setting index, a text file with the token of each row"
                if self.format == "npy"
                else f"index is for format: npy; format = {self.format}"
            )
        return self

    @property
    def source(self) -> tuple[str, str, Format, str, str]:
        """The arguments of `read_vectors`."""
        return self.file, self.sha256, self.format, self.index, self.index_sha256


class FileVectorsModel(EncoderModel):
    """With `weighting: idf`, the dictionary and the vectors of its words; else nothing.

    The arrays are `vectors` float32 (n_words, size), 0 for a word that the file does not have, and
    those of `Dictionary`.
    """

    settings: FileVectorsSettings

    def __init__(self, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> None:
        super().__init__(settings, cutoff)
        self._arrays = arrays

    @property
    def reads_item_ids(self) -> bool:
        """See `EncoderModel`."""
        return self.settings.tokens == "items"

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`."""
        return self._arrays

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        return cls(settings, cutoff, arrays)

    def coder(self) -> ItemsOfFileCoder | WordsOfFileCoder | DictionaryCoder:
        """See `EncoderModel`."""
        settings = self.settings
        if settings.tokens == "items":
            return ItemsOfFileCoder(settings.source)
        if settings.weighting == "idf":
            dictionary, vectors = Dictionary.of_arrays(self._arrays), self._arrays["vectors"]
            weights = np.where(np.any(vectors != 0, axis=1), dictionary.idf, np.float32(0))
            return DictionaryCoder(dictionary.words, weights, vectors, settings.parts)
        return WordsOfFileCoder(settings.source, settings.weighting == "rank", settings.parts)


@lru_cache(maxsize=2)
def vectors_of_file(source: tuple[str, str, Format, str, str]) -> VectorFile:
    """Return the vectors of a file; the last two files are kept in memory. See `read_vectors`."""
    return read_vectors(*source)


@dataclass(frozen=True)
class ItemsOfFileCoder:
    """The vector of the item's id. Each worker reads the file once, at its first item."""

    source: tuple[str, str, Format, str, str]

    def encode(self, batch: pa.RecordBatch) -> Array:
        """See `Coder`."""
        return self.encode_or_explain(batch)[0]

    def encode_or_explain(self, batch: pa.RecordBatch) -> tuple[Array, list[str | None]]:
        """See `ExplainingCoder`."""
        file = vectors_of_file(self.source)
        row = file.numbers_of(batch.column("item_id"))
        vectors = np.where((row >= 0)[:, None], file.vectors[row], np.float32(np.nan))
        return vectors, [None if r >= 0 else _UNKNOWN_ITEM for r in row.tolist()]


@dataclass(frozen=True)
class WordsOfFileCoder:
    """The mean of the vectors of an item's words. Each worker reads the file once."""

    source: tuple[str, str, Format, str, str]
    by_rank: bool
    parts: tuple[Part, ...]

    def encode(self, batch: pa.RecordBatch) -> Array:
        """See `Coder`."""
        return self.encode_or_explain(batch)[0]

    def encode_or_explain(self, batch: pa.RecordBatch) -> tuple[Array, list[str | None]]:
        """See `ExplainingCoder`."""
        file = vectors_of_file(self.source)
        n = len(file.tokens)
        weights = rank_weights(n) if self.by_rank else np.ones(n, np.float32)
        return DictionaryCoder(file.tokens, weights, file.vectors, self.parts).encode_or_explain(
            batch
        )


@dataclass(frozen=True)
class DictionaryCoder:
    """The weighted mean of the vectors of an item's known words; a word counts for each use.

    `words` strings (n_words,); `weights` float32 (n_words,), 0 = unknown; `vectors` float32
    (n_words, size).
    """

    words: pa.StringArray
    weights: Array
    vectors: Array
    parts: tuple[Part, ...]

    def encode(self, batch: pa.RecordBatch) -> Array:
        """See `Coder`."""
        return self.encode_or_explain(batch)[0]

    def encode_or_explain(self, batch: pa.RecordBatch) -> tuple[Array, list[str | None]]:
        """See `ExplainingCoder`."""
        tokens = tokenise(texts_of(batch, self.parts))
        number = pc.index_in(tokens.words, value_set=self.words).fill_null(-1).to_numpy()
        is_known = number >= 0
        start = np.concatenate([[0], np.cumsum(is_known)])[tokens.start]
        means = weighted_means(start, number[is_known].astype(np.int32), self.weights, self.vectors)
        n_words = np.diff(tokens.start).tolist()
        has_vector = np.isfinite(means).all(axis=1).tolist()
        return means, [
            None if known else _UNKNOWN_WORDS if n else _NO_WORDS
            for known, n in zip(has_vector, n_words, strict=True)
        ]


def rank_weights(n: int) -> Array:
    """Return the weight of the words of a file whose most frequent words come first, float32 (n,).

    It is a / (a + p), a = .001, with the share p(r) = 1 / (r H(n)) of the r-th word by Zipf's law.

    >>> rank_weights(10_000)[[0, 9, 9_999]].round(3)
    array([0.01 , 0.089, 0.99 ], dtype=float32)
    """
    rank = np.arange(1, n + 1, dtype=np.float64)
    share = 1 / rank / np.sum(1 / rank)
    return (_HALF_WEIGHT_SHARE / (_HALF_WEIGHT_SHARE + share)).astype(np.float32)


class FileVectors(Algorithm[FileVectorsSettings]):
    """The vector of an item's id, or the weighted mean of the vectors of its words.

    Nothing is trained. Words that the file does not have are left out; an item without any known
    word, or whose id the file does not have, has no vector.

    Source: mean weighted by idf, De Boom et al. 2016 (see `word_vectors`); by rank, Arora, Liang and
    Ma 2017, "A simple but tough-to-beat baseline for sentence embeddings", without its second step,
    which removes a common direction of all items.
    """

    settings_class = FileVectorsSettings

    @property
    def keeps_vectors(self) -> bool:
        """See `Algorithm`. Only idf depends on data."""
        return self.settings.tokens == "items" or self.settings.weighting != "idf"

    def check_needs(self, kinds: Mapping[str, Kind]) -> None:
        """See `Algorithm`. Built on no model. Raises ConfigError without a file of vectors."""
        super().check_needs(kinds)
        settings = self.settings
        if not settings.file or not settings.sha256:
            raise ConfigError(
                "file_vectors needs the settings file (vectors in the format "
                f"{settings.format}) and sha256 (its checksum); recspark ships no vectors. To train "
                "vectors on the shop's own texts, use word_vectors"
            )
        if settings.format == "npy" and not settings.index_sha256:
            raise ConfigError("file_vectors needs the setting index_sha256, the checksum of index")

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> FileVectorsModel:
        """See `Algorithm.fit`.

        The driver reads the file once, to check it. With `weighting: idf` one job makes the
        dictionary, and the model holds the vectors of its words: executors do not read the file.
        Raises ModelError where the file is not as it should be, EmptyDataError where it has no word
        of the catalogue.
        """
        settings = self.settings
        self.check_needs({})
        file = read_vectors(*settings.source)
        if self.keeps_vectors:
            return FileVectorsModel(settings, data.cutoff, {})
        dictionary = make_dictionary(catalogue_of(data), settings)
        row = file.numbers_of(dictionary.words)
        is_known = row >= 0
        options.progress(
            f"  file_vectors: the file has {is_known.sum():,} of the catalogue's {len(dictionary):,} words"
        )
        if not is_known.any():
            raise EmptyDataError(
                f"file_vectors: {settings.file} has none of the catalogue's {len(dictionary):,} words, "
                f"such as '{dictionary.words[0]}'; is it of another language, or are its tokens items? "
                "Words are in lower case here"
            )
        vectors = np.where(is_known[:, None], file.vectors[row], np.float32(0))
        return FileVectorsModel(
            settings, data.cutoff, {"vectors": vectors, **dictionary.to_arrays()}
        )

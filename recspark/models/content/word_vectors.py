"""Word vectors: words that stand beside the same words get similar vectors, and an item their mean."""

from __future__ import annotations

from datetime import datetime
from typing import Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.engines.word2vec import train_vectors
from recspark.engines.word2vec_step import Word2Vec
from recspark.models.base import NOTHING, Algorithm, EncoderModel, FitOptions, Needed, Settings
from recspark.models.content.texts import (
    Dictionary,
    LearntWordsSettings,
    Part,
    catalogue_of,
    make_dictionary,
    numbered,
    weighted_means,
)


class WordVectorsSettings(LearntWordsSettings):
    """Settings of `WordVectors`."""

    embedding_size: int = Field(100, ge=1, description="length of a vector. Source: word2vec")
    window: int = Field(
        8,
        ge=1,
        description="words to either side that predict each other; each target draws a window of 1 "
        "to this. Source: word2vec's script for phrases",
    )
    epochs: int = Field(
        10,
        ge=1,
        description="passes over the texts. A catalogue of thousands of items needs more of them than "
        "one of millions: 30 on 3,845 film plots",
    )
    max_length: int = Field(
        1000,
        ge=2,
        le=10_000,
        description="most words of a sentence; longer texts are cut into more",
    )
    n_blocks: int = Field(
        2,
        ge=1,
        le=4096,
        description="blocks of words, which is the number of tasks that run at once; see item2vec",
    )
    n_rotations: int = Field(
        4, ge=1, le=16, description="times per epoch that each pair of blocks meets; see item2vec"
    )


class WordVectorsModel(EncoderModel):
    """`dictionary` of n_words; `vectors` float32 (n_words, size), 0 for a word without a vector."""

    def __init__(
        self,
        settings: WordVectorsSettings,
        cutoff: datetime,
        dictionary: Dictionary,
        vectors: Array,
    ) -> None:
        super().__init__(settings, cutoff)
        self.dictionary, self.vectors = dictionary, vectors
        self._parts = settings.parts

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`."""
        return {"vectors": self.vectors, **self.dictionary.to_arrays()}

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        assert isinstance(settings, WordVectorsSettings)
        return cls(settings, cutoff, Dictionary.of_arrays(arrays), arrays["vectors"])

    def coder(self) -> WordVectorsCoder:
        """See `EncoderModel`."""
        return WordVectorsCoder(self.dictionary, self.vectors, self._parts)


class WordVectorsCoder:
    """The mean of the vectors of an item's known words; a word weighs its idf, for each use."""

    def __init__(self, dictionary: Dictionary, vectors: Array, parts: tuple[Part, ...]) -> None:
        self.dictionary, self.parts = dictionary, parts
        self.vectors = vectors
        # A word that stood alone in all its texts has no vector: it counts as unknown.
        self.weights = np.where(np.any(vectors != 0, axis=1), dictionary.idf, np.float32(0))

    def encode(self, batch: pa.RecordBatch) -> Array:
        """See `Coder`."""
        start, numbers = self.dictionary.numbers(batch, self.parts)
        return weighted_means(start, numbers, self.weights, self.vectors)


class WordVectors(Algorithm[WordVectorsSettings]):
    """Skip-gram with negative sampling over the words of each item; an item is the mean of its words.

    Words weigh their idf, so that `the` decides nothing. Words that the dictionary does not have are
    left out, and an item without any known word has no vector.

    Source: Mikolov et al. 2013; mean weighted by idf: De Boom et al. 2016, "Representation learning for
    very short texts using weighted word embedding aggregation".
    """

    settings_class = WordVectorsSettings
    tags = frozenset()

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> WordVectorsModel:
        """See `Algorithm.fit`.

        Cost: the texts are tokenised twice, for the dictionary and for the sentences; then see
        `engines.word2vec`. Driver: word-sized. Raises EmptyDataError without two words that stand
        together.
        """
        settings, catalogue = self.settings, catalogue_of(data)
        dictionary = make_dictionary(catalogue, settings)
        sentences = numbered(catalogue, dictionary, settings.parts, ("sentence_id", "items"))
        trained = train_vectors(
            sentences,
            np.arange(len(dictionary), dtype=np.int32),
            engine_settings(settings, options.seed),
            scratch=options.scratch,
            progress=options.progress,
        )
        has_vector = (trained.counts > 0)[:, None]
        vectors = np.where(has_vector, trained.inputs, np.float32(0))
        return WordVectorsModel(settings, data.cutoff, dictionary, vectors)


def engine_settings(settings: WordVectorsSettings, seed: int) -> Word2Vec:
    """Return the settings of the engine."""
    return Word2Vec(
        size=settings.embedding_size,
        window=settings.window,
        shrink_window=True,
        n_negatives=settings.n_negatives,
        ns_exponent=settings.ns_exponent,
        subsample=settings.subsample,
        max_length=settings.max_length,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        n_blocks=settings.n_blocks,
        n_rotations=settings.n_rotations,
        seed=seed,
    )

"""Paragraph vectors: the vector of an item's text is learnt by predicting the words of the text."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from recspark.data.blocks import Array
from recspark.data.dataset import Dataset
from recspark.engines.paragraphs import Paragraphs, WordMatrices, infer, train_paragraphs
from recspark.models.base import NOTHING, Algorithm, EncoderModel, FitOptions, Needed, Settings
from recspark.models.content.texts import (
    Dictionary,
    LearntWordsSettings,
    Part,
    catalogue_of,
    make_dictionary,
    numbered,
)


class ParagraphVectorsSettings(LearntWordsSettings):
    """Settings of `ParagraphVectors`."""

    method: Literal["dbow", "dm_mean", "dm_concat"] = Field(
        "dbow",
        description="dbow: the text's vector predicts each of its words; dm_mean: the mean of that "
        "vector and of the words around; dm_concat: all of them side by side, in their order",
    )
    embedding_size: int = Field(100, ge=1, description="length of a vector. Le and Mikolov: 400")
    window: int = Field(
        5,
        ge=1,
        le=50,
        description="dm: words to either side. dm_mean draws a window of 1 to this for each place; "
        "dm_concat takes all, so an output vector is 1 + 2 x window times as long",
    )
    epochs: int = Field(
        20,
        ge=1,
        description="passes over the texts, in training and for each new text. A catalogue of "
        "thousands of items needs more of them than one of millions: 60 on 3,845 film plots",
    )
    n_blocks: int = Field(
        2,
        ge=1,
        le=4096,
        description="blocks of items and of words, which is the number of tasks that run at once",
    )
    n_rotations: int = Field(
        1,
        ge=1,
        le=16,
        description="parts of an epoch: after each, all blocks of words have met all items of the "
        "part, and with dm the workers' copies of the words become one",
    )


class ParagraphVectorsModel(EncoderModel):
    """`dictionary` of n_words; `words`: what the words have learnt; `seed` of the inference."""

    def __init__(
        self,
        settings: ParagraphVectorsSettings,
        cutoff: datetime,
        dictionary: Dictionary,
        words: WordMatrices,
        seed: int,
    ) -> None:
        super().__init__(settings, cutoff)
        self.dictionary, self.words, self.seed = dictionary, words, seed
        self._settings = settings

    def arrays(self) -> dict[str, Array]:
        """See `FittedModel`."""
        return {
            "inputs": self.words.inputs,
            "outputs": self.words.outputs,
            "seed": np.array([self.seed], np.int64),
            **self.dictionary.to_arrays(),
        }

    @classmethod
    def restored(cls, settings: Settings, cutoff: datetime, arrays: dict[str, Array]) -> Self:
        """See `FittedModel`."""
        assert isinstance(settings, ParagraphVectorsSettings)
        words = WordMatrices(arrays["inputs"], arrays["outputs"])
        return cls(settings, cutoff, Dictionary.of_arrays(arrays), words, int(arrays["seed"][0]))

    def coder(self) -> ParagraphVectorsCoder:
        """See `EncoderModel`."""
        engine = engine_settings(self._settings, self.seed)
        return ParagraphVectorsCoder(self.dictionary, self.words, engine, self._settings.parts)


class ParagraphVectorsCoder:
    """Infers the vector of each text, with the vectors of the words as they are."""

    def __init__(
        self,
        dictionary: Dictionary,
        words: WordMatrices,
        settings: Paragraphs,
        parts: tuple[Part, ...],
    ) -> None:
        self.dictionary, self.words, self.settings, self.parts = dictionary, words, settings, parts

    def encode(self, batch: pa.RecordBatch) -> Array:
        """See `Coder`."""
        start, numbers = self.dictionary.numbers(batch, self.parts)
        vectors = infer(self.words, self.dictionary.uses, self.settings, start, numbers)
        vectors[np.diff(start) == 0] = np.nan
        return vectors


class ParagraphVectors(Algorithm[ParagraphVectorsSettings]):
    """PV-DBOW and PV-DM with negative sampling over the texts of the catalogue.

    Training gives the vectors of the words. The vector of an item, one of the catalogue too, is then
    inferred from its own text: so it depends on no other item and stays the same until the text or the
    encoder changes. An item without any known word has no vector.

    Source: Le and Mikolov 2014, "Distributed Representations of Sentences and Documents".
    """

    settings_class = ParagraphVectorsSettings
    tags = frozenset()

    def fit(
        self, data: Dataset, options: FitOptions, needed: Needed = NOTHING
    ) -> ParagraphVectorsModel:
        """See `Algorithm.fit`.

        Cost: the texts are tokenised twice, for the dictionary and for the documents; then see
        `engines.paragraphs`. Driver: word-sized. Raises EmptyDataError without words.
        """
        settings, catalogue = self.settings, catalogue_of(data)
        dictionary = make_dictionary(catalogue, settings)
        words = train_paragraphs(
            numbered(catalogue, dictionary, settings.parts, ("document_id", "words")),
            dictionary.uses,
            engine_settings(settings, options.seed),
            scratch=options.scratch,
            progress=options.progress,
        )
        return ParagraphVectorsModel(settings, data.cutoff, dictionary, words, options.seed)


def engine_settings(settings: ParagraphVectorsSettings, seed: int) -> Paragraphs:
    """Return the settings of the engine."""
    return Paragraphs(
        size=settings.embedding_size,
        method=settings.method,
        window=settings.window,
        n_negatives=settings.n_negatives,
        ns_exponent=settings.ns_exponent,
        subsample=settings.subsample,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        n_blocks=settings.n_blocks,
        n_rotations=settings.n_rotations,
        seed=seed,
    )

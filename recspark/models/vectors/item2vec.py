"""Item2vec: items that occur in the same baskets or sessions get similar vectors."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator
from pyspark.sql import DataFrame, SparkSession

from recspark.data.blocks import Array, micros
from recspark.data.dataset import Dataset
from recspark.engines.word2vec import train_vectors
from recspark.engines.word2vec_step import Word2Vec
from recspark.models.base import (
    NOTHING,
    Algorithm,
    FitOptions,
    Needed,
    RetrieverModel,
    Settings,
    check_k,
)
from recspark.models.scoring import topk
from recspark.models.setting_types import HalfLifeDays
from recspark.models.vectors.scoring import MeanVectorScorer, priors, unit_rows
from recspark.models.vectors.sentences import sentences
from recspark.models.vectors.word2vec_settings import Word2VecSettings
from recspark.models.weights import HistoryWeights


class Item2VecSettings(Word2VecSettings):
    """Settings of `Item2Vec`. For "tuned" see `SamplingSettings`."""

    sentence: Literal["order", "session", "history"] = Field(
        "order",
        description="what counts as one sentence: an order (where an event has none, its session), "
        "a session, or the user's full history. Barkan and Koenigstein 2016: the basket",
        json_schema_extra={"tune": {"choices": ["order", "session", "history"]}},
    )
    architecture: Literal["skipgram", "cbow"] = Field(
        "skipgram",
        description="skipgram predicts an item from each neighbour, cbow from their mean",
    )
    loss: Literal["negative", "hierarchical"] = Field(
        "negative",
        description="negative = negative sampling, hierarchical = hierarchical softmax over a "
        "Huffman tree",
    )
    window: int | None = Field(
        None,
        ge=1,
        description="number of positions to either side whose items are neighbours; null = all "
        "items of the sentence, whatever their order (Barkan and Koenigstein 2016). Tuned, for "
        "sequences: 3, 3, 3, 7",
        json_schema_extra={"tune": {"choices": [None, 3, 5, 10]}},
    )
    shrink_window: bool = Field(
        False, description="draw each window uniformly from 1 to `window`, as word2vec does"
    )
    score: Literal["cosine", "likelihood"] = Field(
        "likelihood",
        description="score of an item for the user's mean vector. cosine = its cosine with the "
        "item's input vector. likelihood (negative sampling only) = log P(item | recent item), "
        "which training fits: the dot product with the item's output vector, plus the log of the "
        "item's share of the noise, minus the log of the share of its uses that subsampling keeps",
        json_schema_extra={"tune": {"choices": ["cosine", "likelihood"]}},
    )
    half_life_days: HalfLifeDays = Field(
        30.0,
        description="days; an event this old counts half in the user's mean vector; null = no "
        "decay. Guess",
    )
    n_recent: int | None = Field(
        None, ge=1, description="only this many of the user's newest events count; null = all"
    )

    @model_validator(mode="after")
    def _check_likelihood_has_outputs(self) -> Self:
        if self.loss == "hierarchical" and self.score == "likelihood":
            raise ValueError(
                "score: likelihood needs an output vector for each item; hierarchical softmax has "
                "them for the nodes of its tree: say score: cosine"
            )
        return self


class Item2VecModel(RetrieverModel):
    """The fitted vectors of the items.

    `vectors` float32 (n_items, size): the input vectors. With `score: likelihood`, `outputs`
    float32 (n_items, size) are the output vectors, and `bias` float32 (n_items,) is explained in
    `priors`. With `score: cosine` both have no rows.
    """

    def __init__(
        self,
        settings: Item2VecSettings,
        cutoff: datetime,
        items: Array,
        vectors: Array,
        outputs: Array,
        bias: Array,
    ) -> None:
        super().__init__(settings, cutoff, items)
        self.vectors, self.outputs, self.bias = vectors, outputs, bias
        self._settings = settings

    def scorer(self) -> topk.Scorer:
        """See `RetrieverModel`."""
        if self._settings.score == "cosine":
            return self._cosine_scorer()
        return self._scorer(self.vectors, self.outputs, self.bias)

    def neighbours(self, k: int, allowed: Array | None = None) -> DataFrame:
        """See `RetrieverModel`. Always by the cosine of input vectors, whatever `score` is."""
        check_k(k)
        spark = SparkSession.active()
        scorer, as_of = self._cosine_scorer(), micros(self.cutoff)
        return topk.neighbours(spark, self.items, scorer, as_of, k, allowed)

    def item_vectors(self) -> Array:
        """See `RetrieverModel`. The input vectors."""
        return self.vectors

    def arrays(self) -> dict[str, Array]:
        """See `RetrieverModel`."""
        return {"vectors": self.vectors, "outputs": self.outputs, "bias": self.bias}

    @classmethod
    def from_arrays(
        cls, settings: Settings, cutoff: datetime, items: Array, arrays: dict[str, Array]
    ) -> Self:
        """See `RetrieverModel`."""
        assert isinstance(settings, Item2VecSettings)
        return cls(settings, cutoff, items, arrays["vectors"], arrays["outputs"], arrays["bias"])

    def _cosine_scorer(self) -> MeanVectorScorer:
        unit_vectors = unit_rows(self.vectors)
        return self._scorer(unit_vectors, unit_vectors, None)

    def _scorer(
        self, vectors: Array, target_vectors: Array, bias: Array | None
    ) -> MeanVectorScorer:
        settings = self._settings
        weights = HistoryWeights.sums(self.cutoff, settings.half_life_days)
        return MeanVectorScorer(
            weights,
            settings.n_recent,
            self.items,
            topk.Shared(vectors),
            topk.Shared(target_vectors),
            bias,
        )


class Item2Vec(Algorithm[Item2VecSettings]):
    """Skip-gram or CBOW over baskets, sessions or histories.

    A user's vector is the mean of the vectors of the user's recent items.

    Source: Barkan and Koenigstein 2016, "Item2Vec"; Mikolov et al. 2013; settings: Caselles-Dupré
    et al. 2018, "Word2vec applied to recommendation: hyperparameters matter"; decayed mean of
    recent purchases: Grbovic et al. 2015.
    """

    settings_class = Item2VecSettings

    def fit(self, data: Dataset, options: FitOptions, needed: Needed = NOTHING) -> Item2VecModel:
        """See `Algorithm.fit`.

        An item that never shares a sentence with another item has no vector and is left out of the
        model. Raises EmptyDataError if no two items share a sentence, and DivergedError if the
        vectors diverge. Vectors and examples pass through files in `options.scratch`; see
        `engines.word2vec` for the cost.
        """
        settings = self.settings
        items = data.vocabulary()
        trained = train_vectors(
            sentences(data.histories, settings.sentence),
            items,
            engine_settings(settings, options.seed),
            scratch=options.scratch,
            progress=options.progress,
        )
        items_with_vector = np.flatnonzero(trained.counts)
        outputs = np.zeros((0, settings.embedding_size), np.float32)
        bias = np.zeros(0, np.float32)
        if settings.score == "likelihood":
            assert trained.outputs is not None
            outputs = trained.outputs[items_with_vector]
            bias = priors(trained.counts, settings)[items_with_vector]
        return Item2VecModel(
            settings,
            data.cutoff,
            items[items_with_vector],
            trained.inputs[items_with_vector],
            outputs,
            bias,
        )


def engine_settings(settings: Item2VecSettings, seed: int) -> Word2Vec:
    """Return the settings of the engine."""
    return replace(
        settings.of_engine(seed),
        architecture=settings.architecture,
        loss=settings.loss,
        window=settings.window,
        shrink_window=settings.shrink_window,
    )

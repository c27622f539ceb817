"""Item2vec: items that occur in the same baskets or sessions get similar vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator
from pyspark.sql import DataFrame, SparkSession
from scipy import sparse

from recspark.data.blocks import Array, Histories, QueryBlock, micros
from recspark.data.dataset import Dataset
from recspark.engines.word2vec import keep_chances, train_vectors
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
from recspark.models.scoring.candidates import dot_pairs
from recspark.models.scoring.contributions import Contributions, entries_of_pairs
from recspark.models.setting_types import HalfLifeDays
from recspark.models.vectors.sentences import sentences
from recspark.models.vectors.word2vec_settings import Word2VecSettings
from recspark.models.weights import HistoryWeights


class Item2VecSettings(Word2VecSettings):
    """Settings of `Item2Vec`. For "tuned" see `Word2VecSettings`."""

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

    def _cosine_scorer(self) -> Item2VecScorer:
        unit_vectors = unit_rows(self.vectors)
        return self._scorer(unit_vectors, unit_vectors, None)

    def _scorer(self, vectors: Array, target_vectors: Array, bias: Array | None) -> Item2VecScorer:
        settings = self._settings
        weights = HistoryWeights.sums(self.cutoff, settings.half_life_days)
        return Item2VecScorer(
            weights,
            settings.n_recent,
            self.items,
            topk.Shared(vectors),
            topk.Shared(target_vectors),
            bias,
        )


@dataclass(frozen=True)
class Item2VecScorer:
    """Scores items by the dot product with the decayed mean vector of the user's recent items.

    The mean is taken of rows of `vectors` and multiplied with the rows of `target_vectors`, both
    float32 (n_items, size). `bias` float32 (n_items,) is added. If `bias` is None, the score is the
    cosine: the rows of both are of length 1 then.
    """

    weights: HistoryWeights
    n_recent: int | None
    items: Array
    vectors: topk.Shared
    target_vectors: topk.Shared
    bias: Array | None

    def score(self, block: QueryBlock) -> topk.Scores:
        """See `topk.Scorer`."""
        history = block.history if self.n_recent is None else newest(block.history, self.n_recent)
        start, items, weights = self.weights.local(history, self.items)
        users = mean_vectors(start, items, weights, np.asarray(self.vectors.array))
        if self.bias is None:
            users = unit_rows(users)
        return topk.DotScores(
            users, np.asarray(self.target_vectors.array), self.bias, np.diff(start) > 0
        )

    def contributions(self, block: QueryBlock, rows: Array, items: Array) -> Contributions:
        """See `ContributingScorer`.

        Item j adds weight_j / (sum of weights) times its vector's product with the target vector of
        the listed item. For the cosine, this is divided by the length of the mean vector.
        """
        history = block.history if self.n_recent is None else newest(block.history, self.n_recent)
        start, own_items, weights = self.weights.local(history, self.items)
        vectors = np.asarray(self.vectors.array)
        row_of_weight = np.repeat(np.arange(len(block)), np.diff(start))
        divisor = np.bincount(row_of_weight, weights, len(block))
        if self.bias is None:
            means = mean_vectors(start, own_items, weights, vectors)
            divisor *= np.sqrt(np.square(means, dtype=np.float64).sum(axis=1))
        start_of_pairs, entries = entries_of_pairs(start, rows)
        listed = np.repeat(items, np.diff(start_of_pairs))
        values = dot_pairs(
            vectors, np.asarray(self.target_vectors.array), own_items[entries], listed
        )
        divisor_of_entry = divisor[row_of_weight[entries]]
        values *= weights[entries]
        np.divide(values, divisor_of_entry, out=values, where=divisor_of_entry > 0)
        rest = np.zeros(len(rows)) if self.bias is None else self.bias[items].astype(np.float64)
        return Contributions(start_of_pairs, own_items[entries], values, rest)


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


def priors(counts: Array, settings: Word2VecSettings) -> Array:
    """Return the number that `score: likelihood` adds to each item's dot product, float32 (n,).

    Training fits in . out = log P(item | recent item) - log noise(item), up to a constant, where P
    is the probability among the uses that subsampling keeps (Levy and Goldberg 2014, equation 7).
    To get back to the probability among all uses, log noise(item) is added, and the log of the
    share of the item's uses that subsampling keeps is subtracted. Items without uses get -inf.
    `counts` int64 (n,): the uses of each item.

    >>> settings = Item2VecSettings(ns_exponent=0.5, subsample=None)
    >>> priors(np.array([1, 4]), settings).round(3)
    array([-1.099, -0.405], dtype=float32)
    """
    is_used = counts > 0
    noise = counts[is_used].astype(np.float64) ** settings.ns_exponent
    log_prior = np.full(len(counts), -np.inf, np.float32)
    log_prior[is_used] = np.log(noise / noise.sum()) - np.log(
        keep_chances(counts, settings.subsample)[is_used]
    )
    return log_prior


def newest(history: Histories, n: int) -> Histories:
    """Return the n newest events of each row."""
    lengths = np.diff(history.start)
    is_newest = np.arange(len(history.item_idx)) >= np.repeat(history.start[1:] - n, lengths)
    start = np.concatenate([[0], np.cumsum(np.minimum(lengths, n))])
    return Histories(
        start, history.item_idx[is_newest], history.event_at[is_newest], history.weight[is_newest]
    )


def mean_vectors(start: Array, items: Array, weights: Array, vectors: Array) -> Array:
    """Return the weighted mean of each row's item vectors, float32 (n, size); 0 for an empty row.

    Row r has the entries `start[r]:start[r + 1]` of `items` and `weights`. Sums run in float64 in
    the order of the row, so the mean of a row depends on no other row. Only the vectors of items
    that occur are copied, not those of the whole catalogue.
    """
    occurring, column = np.unique(items, return_inverse=True)
    sparse_weights = sparse.csr_matrix(
        (weights.astype(np.float64), column, start), shape=(len(start) - 1, len(occurring))
    )
    sums = sparse_weights @ vectors[occurring].astype(np.float64)  # (n, size)
    total_weight = np.asarray(sparse_weights.sum(axis=1)).reshape(-1, 1)  # (n, 1)
    return np.asarray(np.divide(sums, total_weight, out=sums, where=total_weight > 0), np.float32)


def unit_rows(vectors: Array) -> Array:
    """Return the rows of `vectors` scaled to length 1, float32; zero rows stay zero."""
    scaled = vectors.astype(np.float64)
    lengths = np.sqrt(np.square(scaled).sum(axis=1, keepdims=True))
    return np.divide(scaled, lengths, out=scaled, where=lengths > 0).astype(np.float32)

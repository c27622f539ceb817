"""Item2vec: items that occur in the same baskets or sessions get similar vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator
from pyspark.sql import DataFrame, SparkSession
from scipy import sparse

from recspark.data.blocks import Array, Histories, QueryBlock, micros, parse_histories
from recspark.data.dataset import Dataset
from recspark.engines.word2vec import keep_chances, train_vectors
from recspark.engines.word2vec_examples import SENTENCES
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
from recspark.models.setting_types import HalfLifeDays, VectorSize
from recspark.models.weights import HistoryWeights


class Item2VecSettings(Settings):
    """Settings of `Item2Vec`.

    "Tuned" gives the best values that Caselles-Dupré et al. 2018 found for next-event prediction on
    four data sets: music (two sets), e-commerce and click streams. Their repository
    `w2v_reco_hyperparameters_matter` lists them.
    """

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
    embedding_size: VectorSize = Field(
        64,
        description="length of a vector. Guess",
    )
    n_negatives: int = Field(
        10,
        ge=1,
        description="negative sampling: noise items per example. Mikolov et al.: 5 to 20",
    )
    ns_exponent: float = Field(
        1.0,
        ge=-2,
        le=2,
        description="noise items are drawn in proportion to uses^ns_exponent; below 0, rare items "
        "are drawn more often. Tuned: -0.5, -0.5, 1, -1; word2vec: 0.75",
        json_schema_extra={"tune": {"low": -1.0, "high": 1.0}},
    )
    subsample: float | None = Field(
        1e-3,
        gt=0,
        description="subsampling: items with more than this share of all uses lose some of their "
        "uses at random; null = no subsampling. Tuned: 1e-5, 1e-5, 1e-3, 1e-5",
        json_schema_extra={"tune": {"choices": [None, 1e-3, 1e-4, 1e-5]}},
    )
    epochs: int = Field(
        30,
        ge=1,
        description="passes over the sentences. Tuned: 110, 130, 140, 150; 30 is a guess at what a "
        "night allows (word2vec: 5)",
        json_schema_extra={"tune": {"choices": [10, 30, 100]}},
    )
    learning_rate: float = Field(
        0.025,
        gt=0,
        description="learning rate at the first example; it falls linearly to min_learning_rate. "
        "Source: word2vec",
        json_schema_extra={"tune": {"low": 0.005, "high": 0.1, "log": True}},
    )
    min_learning_rate: float = Field(
        0.0001, ge=0, description="learning rate after the last example. Source: word2vec"
    )
    min_count: int = Field(
        1, ge=1, description="an item with fewer uses gets no vector and is not recommended"
    )
    max_length: int = Field(
        100,
        ge=2,
        le=10_000,
        description="most items of a sentence; longer ones are cut. With window null a sentence "
        "of n items gives n^2 pairs. Guess",
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
    n_blocks: int = Field(
        2,
        ge=1,
        le=4096,
        description="blocks of items, which is the number of tasks that run at once. The quality "
        "does not depend on it (benchmarks/item2vec.py), the exact vectors do",
    )
    n_rotations: int = Field(
        8,
        ge=1,
        le=16,
        description="times per epoch that each pair of blocks meets. With 1 and "
        "n_blocks 4, a fifth of the hit rate was lost on Diginetica",
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

    def neighbours(self, k: int) -> DataFrame:
        """See `RetrieverModel`. Always by the cosine of input vectors, whatever `score` is."""
        check_k(k)
        spark = SparkSession.active()
        return topk.neighbours(spark, self.items, self._cosine_scorer(), micros(self.cutoff), k)

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
    return Word2Vec(
        size=settings.embedding_size,
        architecture=settings.architecture,
        loss=settings.loss,
        window=settings.window,
        shrink_window=settings.shrink_window,
        n_negatives=settings.n_negatives,
        ns_exponent=settings.ns_exponent,
        subsample=settings.subsample,
        min_count=settings.min_count,
        max_length=settings.max_length,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        min_learning_rate=settings.min_learning_rate,
        n_blocks=settings.n_blocks,
        n_rotations=settings.n_rotations,
        seed=seed,
    )


def priors(counts: Array, settings: Item2VecSettings) -> Array:
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


def sentences(histories: DataFrame, sentence: str) -> DataFrame:
    """Return the sentences of `histories`: `sentence_id, items`, with items in time order.

    The id is computed from user_idx and the number of the sentence among the user's sentences. So
    it does not depend on partitions, and it stays the same when newer events are added. Narrow,
    lazy.
    """
    return histories.select("user_idx", "history").mapInArrow(
        partial(cut_histories, sentence=sentence), SENTENCES
    )


def cut_histories(batches: Iterable[pa.RecordBatch], sentence: str) -> Iterator[pa.RecordBatch]:
    """Return `SENTENCES` of batches of `user_idx, history`.

    Example with sentence `session`: a user's items 10, 11, 12, 13 in the sessions s1, s2, s1, s2
    give the sentences 0 = [10, 12] and 1 = [11, 13].
    """
    for batch in batches:
        history = parse_histories(batch.column("history"))
        user, rows = batch.column("user_idx").to_numpy(), history.rows
        group = _groups(batch.column("history").flatten(), sentence)
        # A sentence is all events of one (row, group). The sort brings them together; it is stable,
        # so they stay in time order.
        order = np.lexsort((group, rows))
        is_first = np.ones(len(order), bool)
        is_first[1:] = (np.diff(rows[order]) != 0) | (np.diff(group[order]) != 0)
        sentence_of_sorted = np.cumsum(is_first) - 1  # the sentence of each sorted event
        # Number the sentences by row, then by first appearance: by the index of their first event.
        first_event = order[is_first]
        by_first_event = np.argsort(first_event, kind="stable")
        sentence_rank = np.empty(len(first_event), np.int64)
        sentence_rank[by_first_event] = np.arange(len(first_event))
        sentence_of_event = np.empty(len(order), np.int64)
        sentence_of_event[order] = sentence_rank[sentence_of_sorted]
        row_of_sentence = rows[first_event[by_first_event]]
        # The number of each sentence among its user's sentences, from 0.
        sentence_number = np.arange(len(row_of_sentence)) - np.searchsorted(
            row_of_sentence, row_of_sentence
        )
        by_sentence = np.argsort(sentence_of_event, kind="stable")
        start = np.concatenate(
            [[0], np.cumsum(np.bincount(sentence_of_event, minlength=len(first_event)))]
        )
        yield pa.RecordBatch.from_arrays(
            [
                pa.array(user[row_of_sentence] * _USER + sentence_number * _NUMBER, pa.int64()),
                pa.ListArray.from_arrays(
                    pa.array(start, pa.int32()), pa.array(history.item_idx[by_sentence], pa.int32())
                ),
            ],
            names=SENTENCES.names,
        )


# Both multipliers are odd. So the ids of one user's sentences differ, and so do the ids of all
# users' first sentences. Random draws hash the ids once more.
_USER, _NUMBER = np.int64(0x1E3779B97F4A7C15), np.int64(0x3F58476D1CE4E5B9)


def _groups(events: pa.StructArray, sentence: str) -> Array:
    """Return a group number for each event: a row's events with equal numbers form a sentence."""
    if sentence == "history":
        return np.zeros(len(events), np.int64)
    group_names = events.field("session_id")
    if sentence == "order":
        group_names = pc.coalesce(events.field("order_id"), group_names)
    codes = group_names.dictionary_encode(null_encoding="encode")
    return codes.indices.to_numpy(zero_copy_only=False).astype(np.int64)


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
